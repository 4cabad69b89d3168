// SPDX-License-Identifier: Apache-2.0
#include "tls_session.h"

#include <openssl/bio.h>
#include <openssl/err.h>
#include <openssl/pem.h>
#include <openssl/rand.h>
#include <openssl/x509.h>
#include <openssl/x509_vfy.h>

#include <algorithm>
#include <cstring>
#include <utility>

namespace engine {

namespace {

// What is encrypted at a time: large enough for few system calls, small enough for the cache.
constexpr size_t kBatchBytes = 256 * 1024;
// Of a key made up for a user whom we don't know.
constexpr size_t kUnknownKeyBytes = 32;

struct Free {
  void operator()(BIO* bio) const { BIO_free(bio); }
  void operator()(X509* certificate) const { X509_free(certificate); }
  void operator()(X509_CRL* list) const { X509_CRL_free(list); }
  void operator()(EVP_PKEY* key) const { EVP_PKEY_free(key); }
  void operator()(SSL_CTX* context) const { SSL_CTX_free(context); }
};
template <typename T>
using Owned = std::unique_ptr<T, Free>;

Owned<BIO> Memory(const std::string& text) {
  return Owned<BIO>(BIO_new_mem_buf(text.data(), static_cast<int>(text.size())));
}

// The reason of this thread's last failure.
std::string Reason() {
  unsigned long error = ERR_peek_last_error();
  const char* reason = error != 0 ? ERR_reason_error_string(error) : nullptr;
  std::string words = reason != nullptr ? reason : "it is not understood";
  ERR_clear_error();
  return words;
}

// Keys in files have no passphrase.
int NoPassphrase(char*, int, int, void*) { return 0; }

// JavaScript judges: see TlsSession.verifyError.
int Accept(int, X509_STORE_CTX*) { return 1; }

bool UseCertificate(SSL_CTX* context, const TlsSpec& spec) {
  Owned<BIO> file = Memory(spec.certificate);
  Owned<X509> own(PEM_read_bio_X509_AUX(file.get(), nullptr, NoPassphrase, nullptr));
  if (!own || SSL_CTX_use_certificate(context, own.get()) != 1) return false;
  while (X509* next = PEM_read_bio_X509(file.get(), nullptr, NoPassphrase, nullptr)) {
    // Takes it over.
    if (SSL_CTX_add0_chain_cert(context, next) != 1) {
      X509_free(next);
      return false;
    }
  }
  // The end of the file is an error to OpenSSL.
  ERR_clear_error();
  Owned<BIO> key_file = Memory(spec.key);
  Owned<EVP_PKEY> key(PEM_read_bio_PrivateKey(key_file.get(), nullptr, NoPassphrase, nullptr));
  return key && SSL_CTX_use_PrivateKey(context, key.get()) == 1 &&
         SSL_CTX_check_private_key(context) == 1;
}

bool TrustAuthorities(SSL_CTX* context, const TlsSpec& spec) {
  X509_STORE* store = SSL_CTX_get_cert_store(context);
  Owned<BIO> file = Memory(spec.authorities);
  bool any = false;
  while (Owned<X509> next{PEM_read_bio_X509_AUX(file.get(), nullptr, NoPassphrase, nullptr)}) {
    if (X509_STORE_add_cert(store, next.get()) != 1 ||
        SSL_CTX_add_client_CA(context, next.get()) != 1) {
      return false;
    }
    any = true;
  }
  if (!any) return false;
  if (!spec.revoked.empty()) {
    Owned<BIO> list_file = Memory(spec.revoked);
    Owned<X509_CRL> list(PEM_read_bio_X509_CRL(list_file.get(), nullptr, NoPassphrase, nullptr));
    if (!list || X509_STORE_add_crl(store, list.get()) != 1) return false;
    X509_STORE_set_flags(store, X509_V_FLAG_CRL_CHECK | X509_V_FLAG_CRL_CHECK_ALL);
  }
  ERR_clear_error();
  SSL_CTX_set_verify(context, SSL_VERIFY_PEER, Accept);
  return true;
}

}  // namespace

std::shared_ptr<TlsContext> TlsContext::Make(TlsSpec spec, std::string* why) {
  ERR_clear_error();
  Owned<SSL_CTX> context(SSL_CTX_new(TLS_server_method()));
  bool good = context && SSL_CTX_set_min_proto_version(context.get(), TLS1_2_VERSION) == 1 &&
              SSL_CTX_set_max_proto_version(context.get(), TLS1_3_VERSION) == 1 &&
              SSL_CTX_set_cipher_list(context.get(), spec.ciphers.c_str()) == 1 &&
              SSL_CTX_set_ciphersuites(context.get(), spec.suites.c_str()) == 1;
  if (good) {
    SSL_CTX_set_options(context.get(), SSL_OP_NO_RENEGOTIATION | SSL_OP_NO_TICKET |
                                           SSL_OP_NO_COMPRESSION | SSL_OP_CIPHER_SERVER_PREFERENCE |
                                           SSL_OP_IGNORE_UNEXPECTED_EOF);
    SSL_CTX_set_mode(context.get(), SSL_MODE_RELEASE_BUFFERS);
    SSL_CTX_set_session_cache_mode(context.get(), SSL_SESS_CACHE_OFF);
    SSL_CTX_set_num_tickets(context.get(), 0);
    // OpenSSL takes a pre-shared key for a session, and wants to know whose before it asks for
    // certificates, too.
    static constexpr unsigned char kWhose[] = "stillblock";
    SSL_CTX_set_session_id_context(context.get(), kWhose, sizeof(kWhose) - 1);
    SSL_CTX_set_read_ahead(context.get(), 1);
    SSL_CTX_set_dh_auto(context.get(), 1);
    if (spec.has_keys) SSL_CTX_set_psk_server_callback(context.get(), TlsSession::FindKey);
    good = (spec.certificate.empty() || UseCertificate(context.get(), spec)) &&
           (!spec.asks_clients || TrustAuthorities(context.get(), spec));
  }
  if (!good) {
    *why = Reason();
    return nullptr;
  }
  return std::shared_ptr<TlsContext>(new TlsContext(context.release(), std::move(spec.keys)));
}

const std::vector<uint8_t>* TlsContext::Find(const std::string& user) const {
  auto found = keys_.find(user);
  return found == keys_.end() ? nullptr : &found->second;
}

std::unique_ptr<TlsSession> TlsSession::Make(std::shared_ptr<TlsContext> context) {
  std::unique_ptr<TlsSession> made(new TlsSession(std::move(context)));
  BIO* bio = Method() != nullptr ? BIO_new(Method()) : nullptr;
  made->ssl_ = SSL_new(made->context_->get());
  if (bio == nullptr || made->ssl_ == nullptr) {
    BIO_free(bio);
    return nullptr;
  }
  BIO_set_data(bio, made.get());
  BIO_set_init(bio, 1);
  // Takes it over, once for both directions.
  SSL_set_bio(made->ssl_, bio, bio);
  SSL_set_app_data(made->ssl_, reinterpret_cast<char*>(made.get()));
  SSL_set_accept_state(made->ssl_);
  return made;
}

BIO_METHOD* TlsSession::Method() {
  static BIO_METHOD* const method = [] {
    BIO_METHOD* made = BIO_meth_new(BIO_get_new_index() | BIO_TYPE_SOURCE_SINK, "stillblock");
    if (made != nullptr) {
      BIO_meth_set_read(made, BioRead);
      BIO_meth_set_write(made, BioWrite);
      BIO_meth_set_ctrl(made, BioControl);
    }
    return made;
  }();
  return method;
}

int TlsSession::BioRead(BIO* bio, char* data, int size) {
  auto* session = static_cast<TlsSession*>(BIO_get_data(bio));
  BIO_clear_retry_flags(bio);
  if (size_t left = session->input_.size() - session->input_at_) {
    size_t taken = std::min(left, static_cast<size_t>(size));
    std::memcpy(data, session->input_.data() + session->input_at_, taken);
    session->input_at_ += taken;
    if (taken == left) {
      session->input_.clear();
      session->input_at_ = 0;
    }
    return static_cast<int>(taken);
  }
  ssize_t got = -1;
  errno = EAGAIN;
  if (session->fd_ >= 0) got = recv(session->fd_, data, static_cast<size_t>(size), MSG_DONTWAIT);
  if (got < 0 && (errno == EAGAIN || errno == EINTR)) BIO_set_retry_read(bio);
  return static_cast<int>(got);
}

// Takes everything: what goes out is bounded by whoever writes.
int TlsSession::BioWrite(BIO* bio, const char* data, int size) {
  auto* session = static_cast<TlsSession*>(BIO_get_data(bio));
  BIO_clear_retry_flags(bio);
  session->output_.insert(session->output_.end(), data, data + size);
  return size;
}

long TlsSession::BioControl(BIO*, int command, long, void*) {
  return command == BIO_CTRL_FLUSH ? 1 : 0;
}

// An unknown user fails as one with a wrong key does: nobody learns which users there are.
unsigned TlsSession::FindKey(SSL* ssl, const char* user, unsigned char* key, unsigned most) {
  auto* session = reinterpret_cast<TlsSession*>(SSL_get_app_data(ssl));
  session->user_ = user != nullptr ? user : "";
  const std::vector<uint8_t>* found = session->context_->Find(session->user_);
  if (found != nullptr && found->size() <= most) {
    std::memcpy(key, found->data(), found->size());
    return static_cast<unsigned>(found->size());
  }
  if (most < kUnknownKeyBytes || RAND_bytes(key, kUnknownKeyBytes) != 1) return 0;
  return kUnknownKeyBytes;
}

std::vector<uint8_t> TlsSession::TakeOutput() {
  output_at_ = 0;
  return std::exchange(output_, {});
}

int TlsSession::Failed(int result) {
  switch (SSL_get_error(ssl_, result)) {
    case SSL_ERROR_WANT_READ:
    case SSL_ERROR_WANT_WRITE:
      return -EAGAIN;
    case SSL_ERROR_ZERO_RETURN:
      return 0;
    case SSL_ERROR_SYSCALL:
      ERR_clear_error();
      why_ = "client left";
      return errno != 0 && errno != EAGAIN ? -errno : -ECONNRESET;
    default:
      why_ = Reason();
      return -EPROTO;
  }
}

int TlsSession::Accept() {
  ERR_clear_error();
  errno = 0;
  int result = SSL_do_handshake(ssl_);
  if (result == 1) return 0;
  int error = Failed(result);
  return error == 0 ? -ECONNRESET : error;
}

ssize_t TlsSession::Read(void* buffer, size_t bytes) {
  ERR_clear_error();
  errno = 0;
  size_t got = 0;
  int result = SSL_read_ex(ssl_, buffer, bytes, &got);
  return result == 1 ? static_cast<ssize_t>(got) : Failed(result);
}

int TlsSession::Write(const void* data, size_t bytes) {
  if (bytes == 0) return 0;
  ERR_clear_error();
  errno = 0;
  size_t written = 0;
  int result = SSL_write_ex(ssl_, data, bytes, &written);
  if (result == 1) return 0;
  int error = Failed(result);
  return error == 0 || error == -EAGAIN ? -EPROTO : error;
}

void TlsSession::End() {
  ERR_clear_error();
  (void)SSL_shutdown(ssl_);
  ERR_clear_error();
}

int TlsSession::Flush() {
  while (output_at_ < output_.size()) {
    ssize_t sent = send(fd_, output_.data() + output_at_, output_.size() - output_at_,
                        MSG_DONTWAIT | MSG_NOSIGNAL);
    if (sent < 0 && errno == EINTR) continue;
    if (sent < 0) return -errno;
    output_at_ += static_cast<size_t>(sent);
  }
  output_.clear();
  output_at_ = 0;
  return 0;
}

// Whoever gets less than asked for believes that there is no more, so all that is there is given.
ssize_t TlsTransport::Receive(void* buffer, size_t bytes) {
  size_t got = 0;
  ssize_t result = -EAGAIN;
  while (got < bytes) {
    result = session_->Read(static_cast<uint8_t*>(buffer) + got, bytes - got);
    if (result <= 0) break;
    got += static_cast<size_t>(result);
  }
  return got > 0 ? static_cast<ssize_t>(got) : result;
}

ssize_t TlsTransport::Send(const struct iovec* pieces, size_t count, bool) {
  if (int error = session_->Flush()) return error;
  if (owed_ > 0) return static_cast<ssize_t>(std::exchange(owed_, 0));
  size_t taken = 0;
  for (size_t index = 0; index < count && taken < kBatchBytes; index++) {
    size_t bytes = std::min(pieces[index].iov_len, kBatchBytes - taken);
    if (int error = session_->Write(pieces[index].iov_base, bytes)) return error;
    taken += bytes;
  }
  int error = session_->Flush();
  if (error == -EAGAIN) {
    owed_ = taken;
    return -EAGAIN;
  }
  return error != 0 ? error : static_cast<ssize_t>(taken);
}

void TlsTransport::EndSending() {
  session_->End();
  (void)session_->Flush();
  (void)shutdown(fd_.get(), SHUT_WR);
}

}  // namespace engine
