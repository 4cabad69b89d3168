// SPDX-License-Identifier: Apache-2.0
#ifndef STILLBLOCK_NATIVE_ENGINE_CLOCK_H_
#define STILLBLOCK_NATIVE_ENGINE_CLOCK_H_

#include <time.h>

#include <cstdint>

namespace engine {

// CLOCK_MONOTONIC, nanoseconds: what process.hrtime() of Node counts, too.
inline int64_t NowNs() {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return int64_t{now.tv_sec} * 1'000'000'000 + now.tv_nsec;
}

}  // namespace engine

#endif  // STILLBLOCK_NATIVE_ENGINE_CLOCK_H_
