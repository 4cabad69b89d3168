// SPDX-License-Identifier: Apache-2.0
// What the workers of an engine have in common.
#ifndef STILLBLOCK_NATIVE_ENGINE_SHARED_H_
#define STILLBLOCK_NATIVE_ENGINE_SHARED_H_

#include <atomic>
#include <cstdint>
#include <functional>

#include "limits.h"
#include "read_pool.h"

namespace engine {

// Told what happens, on any thread. Must not block.
class Events {
 public:
  virtual ~Events() = default;
  // Nothing uses the connection or its export any more. @reason is a literal, or null if it ended
  // as it should.
  virtual void Closed(uint64_t id, const char* reason, bool peers_fault) = 0;
  // A read of an export failed; the client has been told.
  virtual void ReadFailed(uint64_t id, int error, uint64_t offset, uint64_t length) = 0;
};

// The share of data in flight that all connections have in common, as SharedBudget of
// nbd/budget.ts.
class SharedBudget {
 public:
  explicit SharedBudget(uint64_t limit_bytes) : limit_bytes_(limit_bytes) {}

  uint64_t used() const { return used_.load(std::memory_order_relaxed); }
  bool TryTake(uint64_t bytes) {
    if (used_.fetch_add(bytes) + bytes <= limit_bytes_) return true;
    used_.fetch_sub(bytes);
    return false;
  }
  // Takes bytes, whether or not there is room: the asker has decided.
  void Take(uint64_t bytes) { used_.fetch_add(bytes); }
  void Give(uint64_t bytes) { used_.fetch_sub(bytes); }

  // Workers with connections that wait for room: a bit each.
  std::atomic<uint64_t> waiting = 0;

 private:
  const uint64_t limit_bytes_;
  std::atomic<uint64_t> used_ = 0;
};

struct Shared {
  Shared(const Limits& given, Events* told)
      : limits(given), events(told), budget(given.bytes_in_flight) {}

  const Limits limits;
  Events* const events;
  SharedBudget budget;
  ReadPool pool;
  uint32_t workers = 1;
  // Whether io_uring may be used where the kernel has it.
  bool allow_ring = true;
  // Workers that have a connection which asks and waits, one request at a time.
  std::atomic<uint32_t> active = 0;
  uint32_t cores = 1;
  // Wakes the workers of these bits.
  std::function<void(uint64_t)> wake;
};

}  // namespace engine

#endif  // STILLBLOCK_NATIVE_ENGINE_SHARED_H_
