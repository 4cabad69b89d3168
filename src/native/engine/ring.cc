// SPDX-License-Identifier: Apache-2.0
#include "ring.h"

#include <errno.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

namespace engine {

namespace {

// Both rings in one mapping (5.4), no completion is lost (5.5), reads of the cache in the
// submitter (5.7), and of what is not there without a thread each (5.9).
constexpr uint32_t kFeatures =
    IORING_FEAT_SINGLE_MMAP | IORING_FEAT_NODROP | IORING_FEAT_FAST_POLL;

template <typename T>
T* At(void* base, uint32_t offset) {
  return reinterpret_cast<T*>(static_cast<char*>(base) + offset);
}

}  // namespace

Ring::~Ring() {
  if (rings_ != nullptr) munmap(rings_, rings_bytes_);
  if (sqes_ != nullptr) munmap(sqes_, sqes_bytes_);
}

bool Ring::Open() {
  struct io_uring_params params = {};
  UniqueFd fd(static_cast<int>(syscall(SYS_io_uring_setup, kEntries, &params)));
  if (!fd.valid() || (params.features & kFeatures) != kFeatures) return false;
  rings_bytes_ = std::max<size_t>(
      params.sq_off.array + params.sq_entries * sizeof(uint32_t),
      params.cq_off.cqes + params.cq_entries * sizeof(struct io_uring_cqe));
  sqes_bytes_ = params.sq_entries * sizeof(struct io_uring_sqe);
  void* rings = mmap(nullptr, rings_bytes_, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE,
                     fd.get(), IORING_OFF_SQ_RING);
  if (rings == MAP_FAILED) return false;
  rings_ = rings;
  void* sqes = mmap(nullptr, sqes_bytes_, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE,
                    fd.get(), IORING_OFF_SQES);
  if (sqes == MAP_FAILED) return false;
  sqes_ = static_cast<struct io_uring_sqe*>(sqes);
  sq_tail_ = At<uint32_t>(rings_, params.sq_off.tail);
  sq_mask_ = *At<uint32_t>(rings_, params.sq_off.ring_mask);
  cq_head_ = At<uint32_t>(rings_, params.cq_off.head);
  cq_tail_ = At<uint32_t>(rings_, params.cq_off.tail);
  cq_mask_ = *At<uint32_t>(rings_, params.cq_off.ring_mask);
  cqes_ = At<struct io_uring_cqe>(rings_, params.cq_off.cqes);
  auto* array = At<uint32_t>(rings_, params.sq_off.array);
  for (uint32_t i = 0; i < params.sq_entries; i++) array[i] = i;
  fd_ = std::move(fd);
  return true;
}

bool Ring::Read(int fd, void* at, uint32_t bytes, uint64_t offset, void* tag) {
  if (in_flight_ == kEntries) return false;
  uint32_t tail = *sq_tail_;
  struct io_uring_sqe& sqe = sqes_[tail & sq_mask_];
  std::memset(&sqe, 0, sizeof(sqe));
  sqe.opcode = IORING_OP_READ;
  sqe.fd = fd;
  sqe.addr = reinterpret_cast<uintptr_t>(at);
  sqe.len = bytes;
  sqe.off = offset;
  sqe.user_data = reinterpret_cast<uintptr_t>(tag);
  __atomic_store_n(sq_tail_, tail + 1, __ATOMIC_RELEASE);
  in_flight_++;
  queued_++;
  return true;
}

void Ring::Submit() {
  while (queued_ > 0) {
    long taken = syscall(SYS_io_uring_enter, fd_.get(), queued_, 0, 0, nullptr, 0);
    // EAGAIN, EBUSY: it lacks memory just now, and is asked again at the next turn.
    if (taken < 0 && errno != EINTR) return;
    if (taken > 0) queued_ -= static_cast<uint32_t>(taken);
  }
}

bool Ring::Take(void** tag, int* result) {
  uint32_t head = *cq_head_;
  if (head == __atomic_load_n(cq_tail_, __ATOMIC_ACQUIRE)) return false;
  const struct io_uring_cqe& cqe = cqes_[head & cq_mask_];
  *tag = reinterpret_cast<void*>(static_cast<uintptr_t>(cqe.user_data));
  *result = cqe.res;
  __atomic_store_n(cq_head_, head + 1, __ATOMIC_RELEASE);
  in_flight_--;
  return true;
}

}  // namespace engine
