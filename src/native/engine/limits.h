// SPDX-License-Identifier: Apache-2.0
// The part of nbd/limits.ts that engines work with. Its values, and their reasons, are there.
#ifndef STILLBLOCK_NATIVE_ENGINE_LIMITS_H_
#define STILLBLOCK_NATIVE_ENGINE_LIMITS_H_

#include <cstddef>
#include <cstdint>

namespace engine {

struct Limits {
  uint32_t requests_in_flight = 128;
  uint64_t connection_bytes_in_flight = 16 << 20;
  uint64_t bytes_in_flight = 128 << 20;
  uint32_t piece_bytes = 1 << 20;
  uint32_t status_extents = 1 << 17;
  uint32_t read_bytes = 32 << 20;
  uint64_t idle_buffer_bytes = 64 << 20;
  uint32_t drain_ms = 5000;
};

}  // namespace engine

#endif  // STILLBLOCK_NATIVE_ENGINE_LIMITS_H_
