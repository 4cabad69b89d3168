// SPDX-License-Identifier: Apache-2.0
#include "read_pool.h"

#include <utility>

namespace engine {

bool ReadPool::Submit(std::function<void()> work) {
  std::lock_guard<std::mutex> guard(lock_);
  if (idle_ <= queue_.size() && threads_ < kThreads &&
      thread_[threads_].Start<ReadPool, &ReadPool::Loop>(this) == 0) {
    threads_++;
  }
  if (threads_ == 0) return false;
  queue_.push_back(std::move(work));
  wake_.notify_one();
  return true;
}

void ReadPool::Stop() {
  {
    std::lock_guard<std::mutex> guard(lock_);
    stopping_ = true;
  }
  wake_.notify_all();
  for (Thread& thread : thread_) thread.Join();
}

void ReadPool::Loop() {
  std::unique_lock<std::mutex> guard(lock_);
  for (;;) {
    if (queue_.empty()) {
      if (stopping_) return;
      idle_++;
      wake_.wait(guard);
      idle_--;
      continue;
    }
    std::function<void()> work = std::move(queue_.front());
    queue_.pop_front();
    guard.unlock();
    work();
    work = nullptr;
    guard.lock();
  }
}

}  // namespace engine
