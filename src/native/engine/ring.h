// SPDX-License-Identifier: Apache-2.0
// One io_uring of one thread, for reads, by the bare system calls. Containers may forbid it.
#ifndef STILLBLOCK_NATIVE_ENGINE_RING_H_
#define STILLBLOCK_NATIVE_ENGINE_RING_H_

#include <linux/io_uring.h>

#include <cstddef>
#include <cstdint>

#include "../unique_fd.h"

namespace engine {

class Ring {
 public:
  Ring() = default;
  Ring(const Ring&) = delete;
  Ring& operator=(const Ring&) = delete;
  ~Ring();

  // Returns false if there is none to be had.
  bool Open();
  bool valid() const { return fd_.valid(); }
  // Whether reads could not be handed over yet.
  bool pending() const { return queued_ > 0; }
  // Becomes readable when a read is done.
  int fd() const { return fd_.get(); }

  // Queues a read; Submit() hands the queued ones over. Returns false if no more may be in flight.
  bool Read(int fd, void* at, uint32_t bytes, uint64_t offset, void* tag);
  void Submit();
  // Takes one read that is done: @result are bytes, or a negative errno. Returns false if none is.
  bool Take(void** tag, int* result);

 private:
  // As many reads as devices have queues for, and a page of memory.
  static constexpr uint32_t kEntries = 128;

  UniqueFd fd_;
  void* rings_ = nullptr;
  size_t rings_bytes_ = 0;
  struct io_uring_sqe* sqes_ = nullptr;
  size_t sqes_bytes_ = 0;
  uint32_t* sq_tail_ = nullptr;
  uint32_t* cq_head_ = nullptr;
  uint32_t* cq_tail_ = nullptr;
  struct io_uring_cqe* cqes_ = nullptr;
  uint32_t sq_mask_ = 0;
  uint32_t cq_mask_ = 0;
  uint32_t in_flight_ = 0;
  uint32_t queued_ = 0;
};

}  // namespace engine

#endif  // STILLBLOCK_NATIVE_ENGINE_RING_H_
