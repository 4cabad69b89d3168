// SPDX-License-Identifier: Apache-2.0
// A few threads for what may block: reads of data that is not in the page cache where the kernel
// allows no io_uring, and asking the page cache to forget.
#ifndef STILLBLOCK_NATIVE_ENGINE_READ_POOL_H_
#define STILLBLOCK_NATIVE_ENGINE_READ_POOL_H_

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>

#include "thread.h"

namespace engine {

class ReadPool {
 public:
  ReadPool() = default;
  ReadPool(const ReadPool&) = delete;
  ReadPool& operator=(const ReadPool&) = delete;
  // Carries out what is queued first.
  ~ReadPool() { Stop(); }

  // Threads are started as they are needed. Returns false if there is none and none can be had.
  bool Submit(std::function<void()> work);
  void Stop();

 private:
  static constexpr size_t kThreads = 16;

  void Loop();

  std::mutex lock_;
  std::condition_variable wake_;
  // Protected by lock_.
  std::deque<std::function<void()>> queue_;
  size_t threads_ = 0;
  size_t idle_ = 0;
  bool stopping_ = false;
  Thread thread_[kThreads];
};

}  // namespace engine

#endif  // STILLBLOCK_NATIVE_ENGINE_READ_POOL_H_
