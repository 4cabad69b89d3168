// SPDX-License-Identifier: Apache-2.0
// TLS sessions for JavaScript, and their way into an engine.
#ifndef STILLBLOCK_NATIVE_TLS_BINDING_H_
#define STILLBLOCK_NATIVE_TLS_BINDING_H_

#include <napi.h>

#include <memory>

#include "engine/tls_session.h"

// Takes the session out of its JavaScript object. Null if it is none, or has been taken.
std::unique_ptr<engine::TlsSession> TakeTlsSession(Napi::Value value);

#endif  // STILLBLOCK_NATIVE_TLS_BINDING_H_
