// SPDX-License-Identifier: Apache-2.0
// Caps of nbd/bandwidth.ts, which says how they work: one number in memory, shared with it.
#ifndef STILLBLOCK_NATIVE_ENGINE_BANDWIDTH_H_
#define STILLBLOCK_NATIVE_ENGINE_BANDWIDTH_H_

#include <atomic>
#include <cstdint>

#include "clock.h"

namespace engine {

// One cap as one worker sees it: who reserves waits before he reserves again.
class CapTurn {
 public:
  CapTurn() = default;
  // @paid_until_ns: CLOCK_MONOTONIC at which all that was taken is paid for.
  CapTurn(int64_t* paid_until_ns, uint64_t bytes_per_second)
      : paid_until_ns_(paid_until_ns), bytes_per_second_(bytes_per_second) {}

  // Takes bytes that may pass at once. Returns false, and takes nothing, if they may not.
  bool TryTake(uint64_t bytes) {
    int64_t now = NowNs();
    std::atomic_ref<int64_t> paid(*paid_until_ns_);
    int64_t before = paid.load();
    int64_t until = PaidWith(bytes, before, now);
    return until <= now && paid.compare_exchange_strong(before, until);
  }

  // Reserves bytes behind all that was reserved before. Returns when they may pass.
  int64_t Reserve(uint64_t bytes) {
    std::atomic_ref<int64_t> paid(*paid_until_ns_);
    int64_t before = paid.load();
    for (;;) {
      int64_t until = PaidWith(bytes, before, NowNs());
      if (paid.compare_exchange_strong(before, until)) return until;
    }
  }

  // Gives back what was reserved by one who leaves before its turn.
  void GiveBack(uint64_t bytes) { std::atomic_ref<int64_t>(*paid_until_ns_).fetch_sub(Cost(bytes)); }

  // A wait that was to end at @due_ns has ended now.
  void Came(int64_t due_ns) {
    due_ns_ = due_ns;
    came_ns_ = NowNs();
  }

 private:
  static constexpr int64_t kBurstNs = 20'000'000;
  static constexpr int64_t kMostLateNs = 1'000'000'000;

  int64_t PaidWith(uint64_t bytes, int64_t before, int64_t now) const {
    // Who comes right behind a late timer would have come earlier, had it not been late.
    bool is_next = now - came_ns_ <= kBurstNs && came_ns_ - due_ns_ <= kMostLateNs;
    int64_t saved = (is_next ? now - came_ns_ + due_ns_ : now) - kBurstNs;
    return (before > saved ? before : saved) + Cost(bytes);
  }

  int64_t Cost(uint64_t bytes) const {
    return static_cast<int64_t>(bytes * 1'000'000'000 / bytes_per_second_);
  }

  int64_t* paid_until_ns_ = nullptr;
  uint64_t bytes_per_second_ = 1;
  int64_t due_ns_ = 0;
  int64_t came_ns_ = 0;
};

}  // namespace engine

#endif  // STILLBLOCK_NATIVE_ENGINE_BANDWIDTH_H_
