// SPDX-License-Identifier: Apache-2.0
// The native engine's core in a plain program: an engine, a file, and clients that say whatever
// they please on one end of a socket pair. What comes back is checked as far as it can be.
#ifndef STILLBLOCK_TEST_NATIVE_HARNESS_H_
#define STILLBLOCK_TEST_NATIVE_HARNESS_H_

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "../../src/native/engine/clock.h"
#include "../../src/native/engine/engine.h"

namespace harness {

// Ends the program: the sanitizers and the fuzzer take it for a crash.
[[noreturn]] inline void Fail(const char* what) {
  fprintf(stderr, "fault: %s (the last error: %s)\n", what, strerror(errno));
  abort();
}

inline void Require(bool condition, const char* what) {
  if (!condition) Fail(what);
}

// xorshift64*, for the same run again.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 2 + 1) {}
  uint64_t Next() {
    state_ ^= state_ >> 12;
    state_ ^= state_ << 25;
    state_ ^= state_ >> 27;
    return state_ * 2685821657736338717ull;
  }
  uint64_t Below(uint64_t bound) { return Next() % bound; }
  bool Once(uint64_t in) { return Below(in) == 0; }

 private:
  uint64_t state_;
};

constexpr uint64_t kSize = (3 << 20) + 777;
constexpr uint64_t kCut = (2 << 20) + 5000;

inline uint8_t ByteAt(uint64_t offset) {
  return static_cast<uint8_t>((offset * 2654435761u) >> 13 ^ offset >> 9);
}

// Counts what has ended.
class Counter final : public engine::Events {
 public:
  void Closed(uint64_t, const char*, bool) override {
    std::lock_guard<std::mutex> guard(lock_);
    closed_++;
    change_.notify_all();
  }
  void ReadFailed(uint64_t, int, uint64_t, uint64_t) override {}
  void WaitClosed(uint64_t count) {
    std::unique_lock<std::mutex> guard(lock_);
    change_.wait(guard, [&] { return closed_ >= count; });
  }

 private:
  std::mutex lock_;
  std::condition_variable change_;
  uint64_t closed_ = 0;
};

// A file whose bytes are known, on a disk; with @cut it ends before its size, so that reads fail
// there.
inline UniqueFd MakeFile(bool cut) {
  char path[] = "/var/tmp/stillblock-native-XXXXXX";
  UniqueFd fd(mkstemp(path));
  Require(fd.valid(), "mkstemp");
  unlink(path);
  std::vector<uint8_t> data(cut ? kCut : kSize);
  for (size_t i = 0; i < data.size(); i++) data[i] = ByteAt(i);
  Require(write(fd.get(), data.data(), data.size()) == static_cast<ssize_t>(data.size()), "write");
  return fd;
}

// What the exports' contexts say: holes that are none of the file's, so that no data is checked
// there.
struct Maps {
  std::vector<double> starts = {0, 1 << 20, (1 << 20) + 200'000, 2 << 20, (2 << 20) + 4096};
  std::vector<uint32_t> flags = {0, 3, 0, 2, 0};
  std::vector<double> dirty_starts;
  std::vector<uint32_t> dirty_flags;
  Maps() {
    for (uint64_t at = 0; at < kSize; at += 5000) {
      dirty_starts.push_back(static_cast<double>(at));
      dirty_flags.push_back((at / 5000) % 2);
    }
  }
};

// An engine with exports: whole, cut off, capped and forgetting. @probe: what it is allowed to see
// the page cache with.
class World {
 public:
  World(bool ring, engine::CacheProbe probe) : probe_(probe) {
    engine::Options options;
    options.workers = 2;
    options.allow_ring = ring;
    // Small enough that clients wait for each other.
    options.limits.bytes_in_flight = 4 << 20;
    options.limits.idle_buffer_bytes = 8 << 20;
    options.limits.drain_ms = 200;
    engine_ = std::make_unique<engine::Engine>(options, &counter_);
    Require(engine_->Start() == 0, "start");
    for (int kind = 0; kind < kExports; kind++) AddExport(kind);
  }

  ~World() {
    engine_->Stop();
    counter_.WaitClosed(adopted_.load());
    for (auto& served : exports_) served.reset();
    Require(engine_->BytesInFlight() == 0, "bytes stay in flight");
    Require(gone_.load() == kExports, "an export stays");
  }

  static constexpr int kExports = 3;
  static constexpr int kCapped = 2;

  // Until when all is paid for that has passed the first cap of kCapped, CLOCK_MONOTONIC.
  int64_t PaidUntilNs() { return std::atomic_ref<int64_t>(paid_until_).load(); }

  // Says what may keep a client waiting.
  void Describe() {
    fprintf(stderr, "%llu bytes in flight, the cap is paid for in %lld ms\n",
            static_cast<unsigned long long>(engine_->BytesInFlight()),
            static_cast<long long>((PaidUntilNs() - engine::NowNs()) / 1'000'000));
  }

  // Returns the client's end. @first: bytes that came with the handshake.
  UniqueFd Connect(int served, engine::Headers headers, std::vector<uint8_t> first, bool tcp,
                   uint64_t* id = nullptr) {
    int fds[2];
    if (tcp) {
      TcpPair(fds);
    } else {
      Require(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds) == 0, "socketpair");
    }
    UniqueFd mine(fds[0]);
    auto transport = std::make_unique<engine::PlainTransport>(UniqueFd(fds[1]));
    std::vector<uint32_t> contexts = {0, 1};
    if (headers == engine::Headers::kSimple) contexts.clear();
    std::lock_guard<std::mutex> guard(lock_);
    uint64_t given = engine_->Adopt(std::move(transport), exports_[served], headers,
                                    std::move(contexts), std::move(first));
    adopted_.fetch_add(1);
    if (id) *id = given;
    return mine;
  }

  // The engine is one thread's; here several take turns.
  void Drain(uint64_t id) {
    std::lock_guard<std::mutex> guard(lock_);
    engine_->Drain(id);
  }
  void Destroy(uint64_t id) {
    std::lock_guard<std::mutex> guard(lock_);
    engine_->Destroy(id);
  }

 private:
  void AddExport(int kind) {
    engine::ExportSpec spec;
    spec.fd = MakeFile(kind == 1);
    spec.size_bytes = kSize;
    spec.forget = kind == 2;
    spec.contexts.emplace_back(maps_.starts.data(), maps_.flags.data(), maps_.starts.size(), kSize);
    spec.contexts.emplace_back(maps_.dirty_starts.data(), maps_.dirty_flags.data(),
                               maps_.dirty_starts.size(), kSize);
    spec.allocation = kind == 2 ? -1 : 0;
    spec.best_probe = probe_;
    if (kind == kCapped) spec.caps = {{&paid_until_, 200 << 20}, {&paid_until_too_, 1000 << 20}};
    spec.on_gone = [this] { gone_.fetch_add(1); };
    exports_.push_back(std::make_shared<engine::Export>(std::move(spec)));
  }

  static void TcpPair(int fds[2]) {
    UniqueFd listener(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
    struct sockaddr_in address = {};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t length = sizeof(address);
    auto* at = reinterpret_cast<struct sockaddr*>(&address);
    Require(bind(listener.get(), at, length) == 0 && listen(listener.get(), 1) == 0, "listen");
    Require(getsockname(listener.get(), at, &length) == 0, "getsockname");
    fds[0] = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    // A signal ends the wait, not the attempt: said again, it is finished or waited for.
    while (connect(fds[0], at, length) != 0 && errno != EISCONN) {
      Require(errno == EINTR || errno == EALREADY, "connect");
    }
    do {
      fds[1] = accept4(listener.get(), nullptr, nullptr, SOCK_CLOEXEC);
    } while (fds[1] < 0 && errno == EINTR);
    Require(fds[1] >= 0, "accept");
  }

  const engine::CacheProbe probe_;
  Maps maps_;
  int64_t paid_until_ = 0;
  int64_t paid_until_too_ = 0;
  Counter counter_;
  std::atomic<uint64_t> adopted_ = 0;
  std::atomic<int> gone_ = 0;
  std::mutex lock_;
  std::unique_ptr<engine::Engine> engine_;
  std::vector<std::shared_ptr<engine::Export>> exports_;
};

// Takes the server's bytes apart: framing, and data against the file's.
class Checker {
 public:
  Checker(engine::Headers headers, std::vector<engine::Request> asked)
      : headers_(headers), asked_(std::move(asked)) {}

  void Feed(const uint8_t* data, size_t size) {
    bytes_.insert(bytes_.end(), data, data + size);
    size_t at = 0;
    while (Take(at)) {
    }
    bytes_.erase(bytes_.begin(), bytes_.begin() + static_cast<ptrdiff_t>(at));
  }
  // Replies and chunks that were whole.
  uint64_t taken() const { return taken_; }

 private:
  bool Take(size_t& at) {
    using namespace engine;
    const uint8_t* from = bytes_.data() + at;
    size_t left = bytes_.size() - at;
    size_t header = headers_ == Headers::kSimple ? kSimpleReplyBytes : ChunkHeaderBytes(headers_);
    if (left < header) return false;
    uint64_t size = header;
    if (headers_ == Headers::kSimple) {
      Require(Get32(from) == kSimpleReplyMagic, "magic of a simple reply");
      const Request* request = Find(Get64(from + 8));
      if (request == nullptr) return false;
      if (Get32(from + 4) == 0 && request->type == kCmdRead) size += request->length;
      if (left < size) return false;
      if (size > header) CheckData(request->offset, from + header, size - header);
    } else {
      bool extended = headers_ == Headers::kExtended;
      Require(Get32(from) == (extended ? kExtendedReplyMagic : kStructuredReplyMagic),
              "magic of a chunk");
      uint64_t payload = extended ? Get64(from + 24) : Get32(from + 16);
      Require(payload <= (2 << 20), "length of a chunk");
      size += payload;
      if (left < size) return false;
      uint16_t type = Get16(from + 6);
      if (type == kReplyOffsetData) {
        CheckData(Get64(from + header), from + header + 8, payload - 8);
      }
    }
    at += size;
    taken_++;
    return true;
  }

  const engine::Request* Find(uint64_t cookie) const {
    return cookie < asked_.size() ? &asked_[cookie] : nullptr;
  }

  static void CheckData(uint64_t offset, const uint8_t* data, uint64_t size) {
    for (uint64_t i = 0; i < size; i += 97) {
      if (data[i] != ByteAt(offset + i)) Fail("wrong data");
    }
  }

  const engine::Headers headers_;
  const std::vector<engine::Request> asked_;
  std::vector<uint8_t> bytes_;
  uint64_t taken_ = 0;
};

inline void Append(std::vector<uint8_t>& bytes, const engine::Request& request,
                   engine::Headers headers) {
  uint8_t buffer[engine::kExtendedRequestBytes];
  uint8_t* at = engine::Put32(buffer, engine::RequestMagic(headers));
  at = engine::Put16(at, request.flags);
  at = engine::Put16(at, request.type);
  at = engine::Put64(at, request.cookie);
  at = engine::Put64(at, request.offset);
  at = headers == engine::Headers::kExtended
           ? engine::Put64(at, request.length)
           : engine::Put32(at, static_cast<uint32_t>(request.length));
  bytes.insert(bytes.end(), buffer, at);
}

// How long a server may say nothing before it is taken for dead. It must be more than a whole turn
// of the cap: six clients with 128 pieces of 1 MiB each wait for less than 4 s at 200 MiB/s.
constexpr int64_t kSilenceNs = 20'000'000'000;

// Waits until there is something to do, whatever signals come: libFuzzer has an alarm of its own.
// Returns false if there is nothing in time.
inline bool WaitFor(struct pollfd& ready, int64_t most_ns) {
  const int64_t end = engine::NowNs() + most_ns;
  for (;;) {
    const int64_t left = std::max<int64_t>(end - engine::NowNs(), 0);
    const struct timespec timeout = {left / 1'000'000'000, left % 1'000'000'000};
    int count = ppoll(&ready, 1, &timeout, nullptr);
    if (count >= 0) return count > 0;
    Require(errno == EINTR, "poll");
  }
}

// Sends bytes in pieces, receives all the while, and returns when the server has closed, or when
// it has had enough: a client that leaves in the middle.
inline void Converse(World& world, UniqueFd socket, const std::vector<uint8_t>& bytes,
                     Random& random, Checker* checker, bool leave) {
  (void)fcntl(socket.get(), F_SETFL, O_NONBLOCK);
  size_t sent = 0;
  uint64_t received = 0;
  std::vector<uint8_t> buffer(256 * 1024);
  uint64_t turns = leave ? random.Below(6) : UINT64_MAX;
  bool ended = false;
  for (; turns > 0; turns--) {
    if (sent == bytes.size() && !ended) {
      ended = true;
      shutdown(socket.get(), SHUT_WR);
    }
    struct pollfd ready = {socket.get(), POLLIN, 0};
    if (sent < bytes.size()) ready.events |= POLLOUT;
    if (!WaitFor(ready, kSilenceNs)) {
      fprintf(stderr, "%zu of %zu bytes sent, %llu received, ", sent, bytes.size(),
              static_cast<unsigned long long>(received));
      world.Describe();
      Fail("the server does not close");
    }
    if ((ready.revents & POLLOUT) && sent < bytes.size()) {
      size_t most = random.Once(3) ? 40 : 70'000;
      size_t size = std::min<size_t>(1 + random.Below(most), bytes.size() - sent);
      ssize_t result = send(socket.get(), bytes.data() + sent, size, MSG_NOSIGNAL);
      if (result > 0) sent += static_cast<size_t>(result);
      if (result < 0 && errno != EAGAIN) sent = bytes.size();
    }
    if (ready.revents & (POLLIN | POLLHUP | POLLERR)) {
      ssize_t got = recv(socket.get(), buffer.data(), 1 + random.Below(buffer.size()), 0);
      if (got == 0 || (got < 0 && errno != EAGAIN)) return;
      if (got > 0) received += static_cast<uint64_t>(got);
      if (got > 0 && checker) checker->Feed(buffer.data(), static_cast<size_t>(got));
    }
  }
}

}  // namespace harness

#endif  // STILLBLOCK_TEST_NATIVE_HARNESS_H_
