// SPDX-License-Identifier: Apache-2.0
// Refuses every request that is wrong in any way, as nbd/validate.ts does, whose words these are:
// both engines send the same messages.
#ifndef STILLBLOCK_NATIVE_ENGINE_VALIDATE_H_
#define STILLBLOCK_NATIVE_ENGINE_VALIDATE_H_

#include <vector>

#include "limits.h"
#include "wire.h"

namespace engine {

struct Rules {
  uint64_t size_bytes = 0;
  Headers headers = Headers::kSimple;
  // Of the contexts selected for this export.
  std::vector<uint32_t> context_ids;
  Limits limits;
};

enum class Verdict : uint8_t {
  kRead,
  kStatus,
  // A block status that says behind its header what it asks: ValidateStatusPayload().
  kStatusPayload,
  kFlush,
  kDisconnect,
  // Nothing can be answered, and what follows is not to be believed.
  kViolation,
  kRefuse,
};

struct ValidRequest {
  Verdict verdict;
  // kRefuse: the error. Else 0.
  uint32_t error = 0;
  // kRefuse, kViolation: for people.
  const char* message = "";
  // kRefuse: bytes behind the request to be thrown away; kStatusPayload: bytes to wait for.
  uint64_t payload_bytes = 0;
  uint64_t offset = 0;
  uint64_t length = 0;
  // kRead: unfragmented; kStatus: one extent per context.
  bool flag = false;
};

// Total and without effects.
ValidRequest Validate(const Request& request, const Rules& rules);

// Validates a block status by the payload that followed it, of as many bytes as Validate() said.
// The ids are appended to @ids if it is right.
ValidRequest ValidateStatusPayload(const Request& request, const uint8_t* payload, size_t bytes,
                                   const Rules& rules, std::vector<uint32_t>& ids);

}  // namespace engine

#endif  // STILLBLOCK_NATIVE_ENGINE_VALIDATE_H_
