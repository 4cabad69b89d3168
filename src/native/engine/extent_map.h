// SPDX-License-Identifier: Apache-2.0
// What a context says about every byte of an export: the arrays of an ExtentMap of nbd/extents.ts,
// shared with it, for a large disk has millions of runs.
#ifndef STILLBLOCK_NATIVE_ENGINE_EXTENT_MAP_H_
#define STILLBLOCK_NATIVE_ENGINE_EXTENT_MAP_H_

#include <cstddef>
#include <cstdint>

namespace engine {

// Runs, sorted and contiguous from 0 to the size, none empty, no two neighbours with equal flags.
// Does not own its arrays.
class ExtentMap {
 public:
  ExtentMap() = default;
  // @starts are whole numbers below 2^53, as JavaScript has them.
  ExtentMap(const double* starts, const uint32_t* flags, size_t count, uint64_t size_bytes)
      : starts_(starts), flags_(flags), count_(count), size_bytes_(size_bytes) {}

  size_t count() const { return count_; }
  uint32_t FlagsOf(size_t index) const { return index < count_ ? flags_[index] : 0; }
  // The size for the index after the last.
  uint64_t StartOf(size_t index) const {
    return index < count_ ? static_cast<uint64_t>(starts_[index]) : size_bytes_;
  }
  uint64_t EndOf(size_t index) const { return StartOf(index + 1); }

  // The last run that starts at or before @offset.
  size_t IndexAt(uint64_t offset) const {
    size_t low = 0;
    size_t high = count_;
    while (high - low > 1 && high > 0) {
      size_t middle = low + (high - low) / 2;
      if (StartOf(middle) <= offset) {
        low = middle;
      } else {
        high = middle;
      }
    }
    return low;
  }

 private:
  const double* starts_ = nullptr;
  const uint32_t* flags_ = nullptr;
  size_t count_ = 0;
  uint64_t size_bytes_ = 0;
};

}  // namespace engine

#endif  // STILLBLOCK_NATIVE_ENGINE_EXTENT_MAP_H_
