// SPDX-License-Identifier: Apache-2.0
// Memory for replies. Freed buffers are kept for the next ones: a fresh one costs a page fault per
// page.
#ifndef STILLBLOCK_NATIVE_ENGINE_BUFFERS_H_
#define STILLBLOCK_NATIVE_ENGINE_BUFFERS_H_

#include <cstdint>
#include <cstdlib>
#include <utility>
#include <vector>

namespace engine {

// Room for the headers in front of the data, so that both leave in one piece.
constexpr size_t kHeaderRoomBytes = 64;

class BufferPool;

// A buffer that somebody owns; it goes back to its pool, on the pool's thread.
class Buffer {
 public:
  Buffer() = default;
  Buffer(Buffer&& other) noexcept
      : pool_(std::exchange(other.pool_, nullptr)),
        data_(std::exchange(other.data_, nullptr)),
        class_(other.class_) {}
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(pool_, other.pool_);
    std::swap(data_, other.data_);
    std::swap(class_, other.class_);
    return *this;
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { Reset(); }

  uint8_t* data() const { return data_; }
  size_t capacity() const { return (size_t{1} << class_) + kHeaderRoomBytes; }
  explicit operator bool() const { return data_ != nullptr; }
  inline void Reset();

 private:
  friend class BufferPool;
  Buffer(BufferPool* pool, uint8_t* data, uint8_t size_class)
      : pool_(pool), data_(data), class_(size_class) {}

  BufferPool* pool_ = nullptr;
  uint8_t* data_ = nullptr;
  uint8_t class_ = 0;
};

// One worker's buffers, of powers of two and room for a header. Used by its thread alone.
class BufferPool {
 public:
  // @limit_bytes: idle buffers that are kept.
  explicit BufferPool(uint64_t limit_bytes) : limit_bytes_(limit_bytes), idle_(kClasses) {}
  BufferPool(const BufferPool&) = delete;
  BufferPool& operator=(const BufferPool&) = delete;
  ~BufferPool() {
    for (auto& same : idle_) {
      for (uint8_t* data : same) std::free(data);
    }
  }

  // A buffer for headers and @data_bytes of data. Its content is arbitrary.
  Buffer Take(size_t data_bytes) {
    uint8_t size_class = kSmallestClass;
    while ((size_t{1} << size_class) < data_bytes) size_class++;
    auto& same = idle_[size_class];
    if (!same.empty()) {
      uint8_t* data = same.back();
      same.pop_back();
      idle_bytes_ -= size_t{1} << size_class;
      return Buffer(this, data, size_class);
    }
    auto* data = static_cast<uint8_t*>(std::malloc((size_t{1} << size_class) + kHeaderRoomBytes));
    // Like operator new: without memory there is nothing that could be said to anybody.
    if (data == nullptr) std::abort();
    return Buffer(this, data, size_class);
  }

 private:
  friend class Buffer;
  static constexpr uint8_t kSmallestClass = 12;
  static constexpr size_t kClasses = 48;

  void Give(uint8_t* data, uint8_t size_class) {
    size_t bytes = size_t{1} << size_class;
    if (idle_bytes_ + bytes > limit_bytes_) {
      std::free(data);
      return;
    }
    idle_bytes_ += bytes;
    idle_[size_class].push_back(data);
  }

  const uint64_t limit_bytes_;
  uint64_t idle_bytes_ = 0;
  std::vector<std::vector<uint8_t*>> idle_;
};

void Buffer::Reset() {
  if (data_ != nullptr) pool_->Give(std::exchange(data_, nullptr), class_);
}

}  // namespace engine

#endif  // STILLBLOCK_NATIVE_ENGINE_BUFFERS_H_
