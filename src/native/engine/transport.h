// SPDX-License-Identifier: Apache-2.0
// What carries the bytes of a connection. Everything is non-blocking; readiness is told by the
// worker's epoll set on fd(), edge-triggered.
#ifndef STILLBLOCK_NATIVE_ENGINE_TRANSPORT_H_
#define STILLBLOCK_NATIVE_ENGINE_TRANSPORT_H_

#include <errno.h>
#include <fcntl.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include <cstddef>

#include "../unique_fd.h"

namespace engine {

class Transport {
 public:
  virtual ~Transport() = default;
  virtual int fd() const = 0;
  // Each returns bytes, or a negative errno: -EAGAIN when it must wait for readiness. A transport
  // that needs to read before it can write, or the reverse, says so as well: connections try both
  // after any readiness.
  virtual ssize_t Receive(void* buffer, size_t bytes) = 0;
  // @more: more bytes follow at once.
  virtual ssize_t Send(const struct iovec* pieces, size_t count, bool more) = 0;
  // Moves bytes from a pipe without touching them; only if CanSplice().
  virtual ssize_t SendPipe(int pipe, size_t bytes, bool more) = 0;
  virtual bool CanSplice() const = 0;
  // No more bytes will be sent.
  virtual void EndSending() = 0;
};

// A plain socket of TCP or unix(7).
class PlainTransport final : public Transport {
 public:
  explicit PlainTransport(UniqueFd fd) : fd_(std::move(fd)) {
    int family = AF_UNSPEC;
    socklen_t length = sizeof(family);
    (void)getsockopt(fd_.get(), SOL_SOCKET, SO_DOMAIN, &family, &length);
    if (family == AF_UNIX) {
      // A send of 256 KiB shall not need two turns. Beyond the system's limit only root may go.
      int bytes = kUnixSendBufferBytes;
      if (setsockopt(fd_.get(), SOL_SOCKET, SO_SNDBUFFORCE, &bytes, sizeof(bytes)) != 0) {
        (void)setsockopt(fd_.get(), SOL_SOCKET, SO_SNDBUF, &bytes, sizeof(bytes));
      }
    }
  }

  int fd() const override { return fd_.get(); }

  ssize_t Receive(void* buffer, size_t bytes) override {
    return Result(recv(fd_.get(), buffer, bytes, MSG_DONTWAIT));
  }

  ssize_t Send(const struct iovec* pieces, size_t count, bool more) override {
    struct msghdr message = {};
    message.msg_iov = const_cast<struct iovec*>(pieces);
    message.msg_iovlen = count;
    return Result(
        sendmsg(fd_.get(), &message, MSG_DONTWAIT | MSG_NOSIGNAL | (more ? MSG_MORE : 0)));
  }

  ssize_t SendPipe(int pipe, size_t bytes, bool more) override {
    unsigned flags = SPLICE_F_NONBLOCK | SPLICE_F_MOVE | (more ? SPLICE_F_MORE : 0);
    return Result(splice(pipe, nullptr, fd_.get(), nullptr, bytes, flags));
  }

  bool CanSplice() const override { return true; }
  void EndSending() override { (void)shutdown(fd_.get(), SHUT_WR); }

 private:
  static constexpr int kUnixSendBufferBytes = 1 << 20;

  static ssize_t Result(ssize_t result) { return result < 0 ? -errno : result; }

  UniqueFd fd_;
};

}  // namespace engine

#endif  // STILLBLOCK_NATIVE_ENGINE_TRANSPORT_H_
