// SPDX-License-Identifier: Apache-2.0
// A file descriptor that somebody owns.
#ifndef STILLBLOCK_NATIVE_UNIQUE_FD_H_
#define STILLBLOCK_NATIVE_UNIQUE_FD_H_

#include <unistd.h>

#include <utility>

class UniqueFd {
 public:
  explicit UniqueFd(int fd = -1) : fd_(fd) {}
  UniqueFd(UniqueFd&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  UniqueFd& operator=(UniqueFd&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  UniqueFd(const UniqueFd&) = delete;
  UniqueFd& operator=(const UniqueFd&) = delete;
  ~UniqueFd() { Reset(); }

  int get() const { return fd_; }
  bool valid() const { return fd_ >= 0; }

  // Linux closes the descriptor even when close() fails, so there is nothing to do about that.
  void Reset() {
    if (valid()) close(std::exchange(fd_, -1));
  }

 private:
  int fd_;
};

#endif  // STILLBLOCK_NATIVE_UNIQUE_FD_H_
