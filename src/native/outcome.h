// SPDX-License-Identifier: Apache-2.0
// Failures as values, and the names of what the module's header numbers.
#ifndef STILLBLOCK_NATIVE_OUTCOME_H_
#define STILLBLOCK_NATIVE_OUTCOME_H_

#include <errno.h>
#include <linux/stillblock.h>
#include <linux/stillblock_assert.h>
#include <napi.h>

#include <cstdint>
#include <variant>

// Why something did not work. Becomes an Error with code, errno, syscall, reason and culprit.
struct Failure {
  int error = 0;
  const char* call = "";
  // enum stillblock_reason
  uint32_t reason = STILLBLOCK_REASON_NONE;
  // Index of the tracker, mount or store that the reason is about.
  uint32_t culprit = 0;
  // Why a store file will not do, where neither errno nor the module says it.
  const char* refusal = nullptr;

  static Failure Last(const char* call) { return {.error = errno, .call = call}; }
  static Failure Refused(const char* refusal) {
    return {.error = EINVAL, .call = "prepareStore", .refusal = refusal};
  }

  Napi::Error ToError(Napi::Env env) const;
};

template <typename T>
using Outcome = std::variant<T, Failure>;

// For work without a result.
using Nothing = std::monostate;

// The enumerator's name without its prefix, or null for a number that the header does not know.
const char* ReasonName(uint32_t reason);

// The same for why a change history began, or will not be kept.
const char* HistoryName(uint32_t history);

// ioctl() that is begun again when a signal interrupts it; returns 0 or an errno.
int Ioctl(int fd, unsigned long request, void* argument);

#endif  // STILLBLOCK_NATIVE_OUTCOME_H_
