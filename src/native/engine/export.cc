// SPDX-License-Identifier: Apache-2.0
#include "export.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>

namespace engine {

namespace {

// How much is read before the page cache is asked to forget it: calls cost, too.
constexpr uint64_t kForgetBytes = 4 << 20;
// The page cache forgets only whole folios, which are no larger than this on x86.
constexpr uint64_t kFolioBytes = 2 << 20;
// With more ranges than this one for all of them costs less.
constexpr size_t kForgetRanges = 16;

constexpr uint64_t kPageBytes = 4096;

// linux/mman.h has them since 6.5.
constexpr long kSysCachestat = 451;
struct CachestatRange {
  uint64_t offset;
  uint64_t length;
};
struct Cachestat {
  uint64_t cached;
  uint64_t dirty;
  uint64_t writeback;
  uint64_t evicted;
  uint64_t recently_evicted;
};

uint64_t PagesOf(uint64_t offset, uint64_t length) {
  return (offset + length + kPageBytes - 1) / kPageBytes - offset / kPageBytes;
}

// Tells everything to be resident unless the file is ours or the user is root.
bool MayAskMincore(const struct stat& status) {
  return geteuid() == 0 || status.st_uid == geteuid();
}

}  // namespace

Export::Export(ExportSpec spec) : spec_(std::move(spec)) {
  struct stat status;
  if (fstat(fd(), &status) != 0 || !S_ISREG(status.st_mode) || size_bytes() == 0 ||
      sysconf(_SC_PAGESIZE) != static_cast<long>(kPageBytes)) {
    return;
  }
  CachestatRange range = {0, 1};
  Cachestat answer;
  if (spec_.best_probe >= CacheProbe::kCachestat &&
      syscall(kSysCachestat, fd(), &range, &answer, 0) == 0) {
    probe_ = CacheProbe::kCachestat;
  } else if (spec_.best_probe >= CacheProbe::kMincore && MayAskMincore(status)) {
    void* map = mmap(nullptr, size_bytes(), PROT_READ, MAP_SHARED, fd(), 0);
    if (map == MAP_FAILED) return;
    map_ = static_cast<uint8_t*>(map);
    probe_ = CacheProbe::kMincore;
  }
}

Export::~Export() {
  if (map_ != nullptr) munmap(map_, size_bytes());
  spec_.fd.Reset();
  if (spec_.on_gone) spec_.on_gone();
}

bool Export::IsCached(uint64_t offset, uint64_t length) const {
  if (probe_ == CacheProbe::kCachestat) {
    CachestatRange range = {offset, length};
    Cachestat answer;
    return syscall(kSysCachestat, fd(), &range, &answer, 0) == 0 &&
           answer.cached >= PagesOf(offset, length);
  }
  unsigned char resident[257];
  uint64_t pages = PagesOf(offset, length);
  if (pages > sizeof(resident)) return false;
  uint8_t* start = map_ + offset / kPageBytes * kPageBytes;
  if (mincore(start, pages * kPageBytes, resident) != 0) return false;
  return std::all_of(resident, resident + pages, [](unsigned char page) { return page & 1; });
}

std::vector<Range> Export::OnRead(uint64_t offset, uint64_t length) {
  std::lock_guard<std::mutex> guard(lock_);
  if (!read_.empty() && read_.back().offset + read_.back().length == offset) {
    read_.back().length += length;
  } else {
    read_.push_back({offset, length});
  }
  read_bytes_ += length;
  return read_bytes_ >= kForgetBytes ? TakeReadLocked() : std::vector<Range>();
}

std::vector<Range> Export::TakeRead() {
  std::lock_guard<std::mutex> guard(lock_);
  return TakeReadLocked();
}

std::vector<Range> Export::TakeReadLocked() {
  std::vector<Range> ranges = std::move(read_);
  read_.clear();
  read_bytes_ = 0;
  if (ranges.size() > kForgetRanges) {
    uint64_t start = UINT64_MAX;
    uint64_t end = 0;
    for (const Range& range : ranges) {
      start = std::min(start, range.offset);
      end = std::max(end, range.offset + range.length);
    }
    ranges.assign(1, {start, end - start});
  }
  for (Range& range : ranges) {
    uint64_t extra = range.offset % kFolioBytes;
    range.offset -= extra;
    range.length += extra;
  }
  return ranges;
}

void Export::Forget(const std::vector<Range>& ranges) const {
  for (const Range& range : ranges) {
    // What fails is not told: it is a courtesy to others.
    (void)posix_fadvise(fd(), static_cast<off_t>(range.offset), static_cast<off_t>(range.length),
                        POSIX_FADV_DONTNEED);
  }
}

}  // namespace engine
