// SPDX-License-Identifier: Apache-2.0
// TLS 1.2 and 1.3 by OpenSSL, which Node's own binary has. A session begins in memory, where
// JavaScript carries its bytes to and from the socket; an engine may then give it the socket.
#ifndef STILLBLOCK_NATIVE_ENGINE_TLS_SESSION_H_
#define STILLBLOCK_NATIVE_ENGINE_TLS_SESSION_H_

#include <openssl/ssl.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "../unique_fd.h"
#include "transport.h"

namespace engine {

// What sessions begin with: see TlsCredentials in nbd/tls.ts.
struct TlsSpec {
  std::string certificate;
  std::string key;
  std::string authorities;
  std::string revoked;
  std::string ciphers;
  std::string suites;
  bool asks_clients = false;
  bool has_keys = false;
  std::map<std::string, std::vector<uint8_t>> keys;
};

class TlsContext {
 public:
  // Returns null and why, in OpenSSL's words.
  static std::shared_ptr<TlsContext> Make(TlsSpec spec, std::string* why);
  TlsContext(const TlsContext&) = delete;
  TlsContext& operator=(const TlsContext&) = delete;
  ~TlsContext() { SSL_CTX_free(context_); }

  SSL_CTX* get() const { return context_; }
  // The key of a user; null if there is none.
  const std::vector<uint8_t>* Find(const std::string& user) const;

 private:
  TlsContext(SSL_CTX* context, std::map<std::string, std::vector<uint8_t>> keys)
      : context_(context), keys_(std::move(keys)) {}

  SSL_CTX* const context_;
  const std::map<std::string, std::vector<uint8_t>> keys_;
};

// One connection's TLS. One thread at a time may use it.
class TlsSession {
 public:
  // Null if there is no memory.
  static std::unique_ptr<TlsSession> Make(std::shared_ptr<TlsContext> context);
  TlsSession(const TlsSession&) = delete;
  TlsSession& operator=(const TlsSession&) = delete;
  ~TlsSession() { SSL_free(ssl_); }

  // In memory: what has come from the peer, and what is to go there.
  void Feed(const uint8_t* data, size_t size) { input_.insert(input_.end(), data, data + size); }
  std::vector<uint8_t> TakeOutput();

  // Returns 0 when done, -EAGAIN for more input, -EPROTO after a failure: why().
  int Accept();
  // Bytes, 0 at the peer's end, or a negative errno.
  ssize_t Read(void* buffer, size_t bytes);
  // Encrypts all of it. Returns 0 or a negative errno.
  int Write(const void* data, size_t bytes);
  void End();

  // From now on it reads and writes a socket.
  void Attach(int fd) { fd_ = fd; }
  // Sends what has been encrypted. Returns 0 when all has left, or a negative errno.
  int Flush();

  SSL* ssl() const { return ssl_; }
  const std::string& why() const { return why_; }
  // The user whose key was asked for last.
  const std::string& user() const { return user_; }

 private:
  explicit TlsSession(std::shared_ptr<TlsContext> context) : context_(std::move(context)) {}

  static BIO_METHOD* Method();
  static int BioRead(BIO* bio, char* data, int size);
  static int BioWrite(BIO* bio, const char* data, int size);
  static long BioControl(BIO* bio, int command, long number, void* pointer);
  static unsigned FindKey(SSL* ssl, const char* user, unsigned char* key, unsigned most);
  friend class TlsContext;

  int Failed(int result);

  const std::shared_ptr<TlsContext> context_;
  SSL* ssl_ = nullptr;
  int fd_ = -1;
  // From the peer and not decrypted, from input_at_ on.
  std::vector<uint8_t> input_;
  size_t input_at_ = 0;
  // Encrypted and not sent, from output_at_ on.
  std::vector<uint8_t> output_;
  size_t output_at_ = 0;
  std::string why_;
  std::string user_;
};

// A session that has its socket.
class TlsTransport final : public Transport {
 public:
  TlsTransport(UniqueFd fd, std::unique_ptr<TlsSession> session)
      : fd_(std::move(fd)), session_(std::move(session)) {
    session_->Attach(fd_.get());
  }

  int fd() const override { return fd_.get(); }
  ssize_t Receive(void* buffer, size_t bytes) override;
  ssize_t Send(const struct iovec* pieces, size_t count, bool more) override;
  ssize_t SendPipe(int, size_t, bool) override { return -EOPNOTSUPP; }
  bool CanSplice() const override { return false; }
  void EndSending() override;

 private:
  UniqueFd fd_;
  const std::unique_ptr<TlsSession> session_;
  // Bytes that have been encrypted and are not said to be sent, because they have not left: the
  // next Send() begins with them again.
  size_t owed_ = 0;
};

}  // namespace engine

#endif  // STILLBLOCK_NATIVE_ENGINE_TLS_SESSION_H_
