// SPDX-License-Identifier: Apache-2.0
// What one JavaScript environment holds of the addon.
#ifndef STILLBLOCK_NATIVE_ADDON_H_
#define STILLBLOCK_NATIVE_ADDON_H_

#include <napi.h>

struct AddonData {
  Napi::FunctionReference control;
  Napi::FunctionReference snapshot;
  Napi::FunctionReference store_file;
};

// The class of engine_binding.cc.
void ExportEngine(Napi::Env env, Napi::Object exports);
// Functions of files.cc.
void ExportFiles(Napi::Env env, Napi::Object exports);

// Functions of notify.cc.
void ExportNotify(Napi::Env env, Napi::Object exports);

// The classes of tls_binding.cc, if this Node has OpenSSL for us.
void ExportTls(Napi::Env env, Napi::Object exports);

#endif  // STILLBLOCK_NATIVE_ADDON_H_
