// SPDX-License-Identifier: Apache-2.0
#include "outcome.h"

#include <string.h>
#include <sys/ioctl.h>

#include <string>

// Without a default, so that -Wswitch finds a reason that is new in the header.
const char* ReasonName(uint32_t reason) {
  switch (static_cast<enum stillblock_reason>(reason)) {
    case STILLBLOCK_REASON_NONE: return "NONE";
    case STILLBLOCK_REASON_NOT_BLOCK_DEVICE: return "NOT_BLOCK_DEVICE";
    case STILLBLOCK_REASON_ZONED: return "ZONED";
    case STILLBLOCK_REASON_DAX: return "DAX";
    case STILLBLOCK_REASON_BYPASSES_BIO: return "BYPASSES_BIO";
    case STILLBLOCK_REASON_TOO_SMALL: return "TOO_SMALL";
    case STILLBLOCK_REASON_ALREADY_ATTACHED: return "ALREADY_ATTACHED";
    case STILLBLOCK_REASON_NOT_ATTACHED: return "NOT_ATTACHED";
    case STILLBLOCK_REASON_IN_SNAPSHOT: return "IN_SNAPSHOT";
    case STILLBLOCK_REASON_HOOK_BUSY: return "HOOK_BUSY";
    case STILLBLOCK_REASON_HOOK_UNAVAILABLE: return "HOOK_UNAVAILABLE";
    case STILLBLOCK_REASON_NO_MEMORY: return "NO_MEMORY";
    case STILLBLOCK_REASON_RESIZED: return "RESIZED";
    case STILLBLOCK_REASON_GONE: return "GONE";
    case STILLBLOCK_REASON_FREEZE_FAILED: return "FREEZE_FAILED";
    case STILLBLOCK_REASON_FREEZE_TIMEOUT: return "FREEZE_TIMEOUT";
    case STILLBLOCK_REASON_ALREADY_FROZEN: return "ALREADY_FROZEN";
    case STILLBLOCK_REASON_DRAIN_TIMEOUT: return "DRAIN_TIMEOUT";
    case STILLBLOCK_REASON_STORE_NOT_FILE: return "STORE_NOT_FILE";
    case STILLBLOCK_REASON_STORE_UNSUITABLE: return "STORE_UNSUITABLE";
    case STILLBLOCK_REASON_STORE_TOO_SMALL: return "STORE_TOO_SMALL";
    case STILLBLOCK_REASON_STORE_ON_ORIGIN: return "STORE_ON_ORIGIN";
    case STILLBLOCK_REASON_STORE_FULL: return "STORE_FULL";
    case STILLBLOCK_REASON_STORE_ERROR: return "STORE_ERROR";
    case STILLBLOCK_REASON_STORE_TIMEOUT: return "STORE_TIMEOUT";
    case STILLBLOCK_REASON_ORIGIN_ERROR: return "ORIGIN_ERROR";
    case STILLBLOCK_REASON_FAILED: return "FAILED";
    case STILLBLOCK_REASON_INTERRUPTED: return "INTERRUPTED";
    case STILLBLOCK_REASON_BAD_BLOCK_SIZE: return "BAD_BLOCK_SIZE";
    case STILLBLOCK_REASON_STORE_BUSY: return "STORE_BUSY";
    case STILLBLOCK_REASON_FOREIGN_WRITE: return "FOREIGN_WRITE";
    case STILLBLOCK_REASON_OVERLOADED: return "OVERLOADED";
    case STILLBLOCK_REASON_SHUTDOWN: return "SHUTDOWN";
    case STILLBLOCK_REASON_PLACE_BUSY: return "PLACE_BUSY";
    case STILLBLOCK_REASON_PLACE_UNSUITABLE: return "PLACE_UNSUITABLE";
  }
  return nullptr;
}

const char* HistoryName(uint32_t history) {
  switch (static_cast<enum stillblock_history>(history)) {
    case STILLBLOCK_HISTORY_OK: return "OK";
    case STILLBLOCK_HISTORY_FIRST: return "FIRST";
    case STILLBLOCK_HISTORY_NO_PLACE: return "NO_PLACE";
    case STILLBLOCK_HISTORY_PLACE_EMPTY: return "PLACE_EMPTY";
    case STILLBLOCK_HISTORY_PLACE_DAMAGED: return "PLACE_DAMAGED";
    case STILLBLOCK_HISTORY_PLACE_VERSION: return "PLACE_VERSION";
    case STILLBLOCK_HISTORY_PLACE_ERROR: return "PLACE_ERROR";
    case STILLBLOCK_HISTORY_PLACE_FULL: return "PLACE_FULL";
    case STILLBLOCK_HISTORY_PLACE_LOOSE: return "PLACE_LOOSE";
    case STILLBLOCK_HISTORY_NOT_SAVED: return "NOT_SAVED";
    case STILLBLOCK_HISTORY_DAMAGED: return "DAMAGED";
    case STILLBLOCK_HISTORY_RESIZED: return "RESIZED";
    case STILLBLOCK_HISTORY_BLOCK_SIZE: return "BLOCK_SIZE";
    case STILLBLOCK_HISTORY_WRITTEN: return "WRITTEN";
    case STILLBLOCK_HISTORY_CHANGED: return "CHANGED";
    case STILLBLOCK_HISTORY_NO_IDENTITY: return "NO_IDENTITY";
    case STILLBLOCK_HISTORY_SAME_IDENTITY: return "SAME_IDENTITY";
    case STILLBLOCK_HISTORY_NO_WITNESS: return "NO_WITNESS";
    case STILLBLOCK_HISTORY_CONTAINER: return "CONTAINER";
    case STILLBLOCK_HISTORY_ORIGIN_ERROR: return "ORIGIN_ERROR";
    case STILLBLOCK_HISTORY_EXHAUSTED: return "EXHAUSTED";
    case STILLBLOCK_HISTORY_NO_MEMORY: return "NO_MEMORY";
    case STILLBLOCK_HISTORY_PLACE_ABOVE: return "PLACE_ABOVE";
  }
  return nullptr;
}

Napi::Error Failure::ToError(Napi::Env env) const {
  const char* code = strerrorname_np(error);
  const char* reason_name = ReasonName(reason);
  std::string message = std::string(code ? code : "unknown error") + ": " + strerror(error) +
                        ", " + call;
  Napi::Error result = Napi::Error::New(env, message);
  result.Set("code", Napi::String::New(env, code ? code : "UNKNOWN"));
  // Negative, as in the errors of Node's own calls.
  result.Set("errno", Napi::Number::New(env, -error));
  result.Set("syscall", Napi::String::New(env, call));
  result.Set("reason", Napi::String::New(env, reason_name ? reason_name : "UNKNOWN"));
  result.Set("culprit", Napi::Number::New(env, culprit));
  if (refusal) result.Set("refusal", Napi::String::New(env, refusal));
  return result;
}

int Ioctl(int fd, unsigned long request, void* argument) {
  for (;;) {
    if (ioctl(fd, request, argument) == 0) return 0;
    if (errno != EINTR) return errno;
    // A take that a signal ended has thawed everything: the caller decides what then.
    if (request == STILLBLOCK_IOC_TAKE) return errno;
  }
}
