// SPDX-License-Identifier: Apache-2.0
// One export: the descriptor behind it, what its contexts say, what is counted.
#ifndef STILLBLOCK_NATIVE_ENGINE_EXPORT_H_
#define STILLBLOCK_NATIVE_ENGINE_EXPORT_H_

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "../unique_fd.h"
#include "extent_map.h"
#include "figures.h"

namespace engine {

// A range of bytes.
struct Range {
  uint64_t offset;
  uint64_t length;
};

struct CapSpec {
  // See CapTurn. Outlives the export.
  int64_t* paid_until_ns;
  uint64_t bytes_per_second;
};

// How to see what is in the page cache.
enum class CacheProbe : uint8_t { kNone, kMincore, kCachestat };

struct ExportSpec {
  UniqueFd fd;
  uint64_t size_bytes = 0;
  // What was read is to be forgotten by the page cache again.
  bool forget = false;
  // By context id. Their arrays outlive the export.
  std::vector<ExtentMap> contexts;
  // Of base:allocation among them; -1 if there is none.
  int allocation = -1;
  // The best that may be used, of what the kernel has and allows.
  CacheProbe best_probe = CacheProbe::kCachestat;
  // In the order in which data passes them.
  std::vector<CapSpec> caps;
  // Called when the descriptor is closed and nothing uses the arrays any more, on any thread.
  std::function<void()> on_gone;
};

class Export {
 public:
  explicit Export(ExportSpec spec);
  Export(const Export&) = delete;
  Export& operator=(const Export&) = delete;
  ~Export();

  int fd() const { return spec_.fd.get(); }
  uint64_t size_bytes() const { return spec_.size_bytes; }
  const ExtentMap* Context(uint32_t id) const {
    return id < spec_.contexts.size() ? &spec_.contexts[id] : nullptr;
  }
  const ExtentMap* allocation() const {
    return spec_.allocation < 0 ? nullptr : Context(static_cast<uint32_t>(spec_.allocation));
  }
  const std::vector<CapSpec>& caps() const { return spec_.caps; }

  // Nothing it says is to be believed any more.
  void Fail() { failed_.store(true, std::memory_order_release); }
  bool failed() const { return failed_.load(std::memory_order_acquire); }

  // Whether reads say when they would have to wait (RWF_NOWAIT).
  bool nowait() const { return nowait_.load(std::memory_order_relaxed); }
  void ForgoNowait() { nowait_.store(false, std::memory_order_relaxed); }

  // Whether the page cache may be sent as it is: a plain file, of which can be seen what is there.
  bool KnowsCached() const { return probe_ != CacheProbe::kNone; }
  // Whether all of a range is in the page cache now.
  bool IsCached(uint64_t offset, uint64_t length) const;

  bool forgets() const { return spec_.forget; }
  // Takes a range that has been read. Returns ranges to be forgotten, if there are enough.
  std::vector<Range> OnRead(uint64_t offset, uint64_t length);
  // The rest of what is to be forgotten.
  std::vector<Range> TakeRead();
  // Has the page cache let go of ranges. Blocks.
  void Forget(const std::vector<Range>& ranges) const;

  Totals totals;
  // Connections that serve it.
  std::atomic<uint32_t> users = 0;

 private:
  std::vector<Range> TakeReadLocked();

  ExportSpec spec_;
  std::atomic<bool> failed_ = false;
  std::atomic<bool> nowait_ = true;
  CacheProbe probe_ = CacheProbe::kNone;
  // kMincore: the file in memory, which nobody touches.
  uint8_t* map_ = nullptr;
  std::mutex lock_;
  // Protected by lock_.
  std::vector<Range> read_;
  uint64_t read_bytes_ = 0;
};

}  // namespace engine

#endif  // STILLBLOCK_NATIVE_ENGINE_EXPORT_H_
