// SPDX-License-Identifier: Apache-2.0
// JavaScript: see NativeTlsContext and NativeTlsSession in src/native.ts.
#include "tls_binding.h"

#include <dlfcn.h>
#include <openssl/x509.h>

#include <string>
#include <utility>
#include <vector>

#include "addon.h"
#include "arguments.h"

namespace {

const napi_type_tag kSessionTag = {0x5d1c9a3be2f04a71, 0x8c37d5e6f1029b44};
const napi_type_tag kContextTag = {0x5d1c9a3be2f04a71, 0x8c37d5e6f1029b45};

Napi::Value ToBuffer(Napi::Env env, const std::vector<uint8_t>& bytes) {
  return Napi::Buffer<uint8_t>::Copy(env, bytes.data(), bytes.size());
}

class ContextWrap final : public Napi::ObjectWrap<ContextWrap> {
 public:
  static Napi::Function Define(Napi::Env env) { return DefineClass(env, "TlsContext", {}); }

  // new TlsContext({certificate?, key?, authorities?, revoked?, ciphers, suites, keys?})
  explicit ContextWrap(const Napi::CallbackInfo& info) : Napi::ObjectWrap<ContextWrap>(info) {
    Arguments arguments(info.Env());
    if (!info[0].IsObject()) arguments.Refuse("credentials");
    if (!arguments.ok()) return;
    info.This().As<Napi::Object>().TypeTag(&kContextTag);
    Napi::Object given = info[0].As<Napi::Object>();
    engine::TlsSpec spec;
    auto text = [&](const char* name) -> std::string {
      Napi::Value value = given.Get(name);
      return value.IsUndefined() ? "" : arguments.Text(value, name);
    };
    spec.certificate = text("certificate");
    spec.key = text("key");
    spec.authorities = text("authorities");
    spec.revoked = text("revoked");
    spec.ciphers = text("ciphers");
    spec.suites = text("suites");
    spec.asks_clients = !spec.authorities.empty();
    spec.has_keys = given.Get("keys").IsArray();
    if (spec.has_keys) {
      arguments.Array(given.Get("keys"), "keys", [&](Napi::Value value) {
        Napi::Object entry = value.As<Napi::Object>();
        std::string user = arguments.Text(entry.Get("user"), "user");
        if (!entry.Get("key").IsBuffer()) {
          arguments.Refuse("key");
          return;
        }
        auto key = entry.Get("key").As<Napi::Buffer<uint8_t>>();
        spec.keys[user] = std::vector<uint8_t>(key.Data(), key.Data() + key.Length());
      });
    }
    if (!arguments.ok()) return;
    std::string why;
    context_ = engine::TlsContext::Make(std::move(spec), &why);
    if (!context_) Napi::Error::New(info.Env(), why).ThrowAsJavaScriptException();
  }

  const std::shared_ptr<engine::TlsContext>& context() const { return context_; }

 private:
  std::shared_ptr<engine::TlsContext> context_;
};

class SessionWrap final : public Napi::ObjectWrap<SessionWrap> {
 public:
  static Napi::Function Define(Napi::Env env) {
    return DefineClass(env, "TlsSession",
                       {InstanceMethod<&SessionWrap::Accept>("accept"),
                        InstanceMethod<&SessionWrap::Feed>("feed"),
                        InstanceMethod<&SessionWrap::Read>("read"),
                        InstanceMethod<&SessionWrap::Write>("write"),
                        InstanceMethod<&SessionWrap::End>("end"),
                        InstanceMethod<&SessionWrap::TakeOutput>("takeOutput"),
                        InstanceMethod<&SessionWrap::Peer>("peer")});
  }

  explicit SessionWrap(const Napi::CallbackInfo& info) : Napi::ObjectWrap<SessionWrap>(info) {
    Arguments arguments(info.Env());
    if (!info[0].IsObject() || !info[0].As<Napi::Object>().CheckTypeTag(&kContextTag)) {
      arguments.Refuse("context");
      return;
    }
    info.This().As<Napi::Object>().TypeTag(&kSessionTag);
    auto* context = ContextWrap::Unwrap(info[0].As<Napi::Object>());
    if (context->context()) session_ = engine::TlsSession::Make(context->context());
    if (!session_) arguments.Refuse("context");
  }

  std::unique_ptr<engine::TlsSession> Take() { return std::move(session_); }

 private:
  // Throws if it has been taken.
  engine::TlsSession* Held(Napi::Env env) {
    if (!session_) Napi::Error::New(env, "session is gone").ThrowAsJavaScriptException();
    return session_.get();
  }

  // Whether the handshake is complete. Throws why there will be none.
  Napi::Value Accept(const Napi::CallbackInfo& info) {
    engine::TlsSession* session = Held(info.Env());
    if (session == nullptr) return {};
    int result = session->Accept();
    if (result != 0 && result != -EAGAIN) {
      Napi::Error::New(info.Env(), session->why()).ThrowAsJavaScriptException();
      return {};
    }
    return Napi::Boolean::New(info.Env(), result == 0);
  }

  Napi::Value Feed(const Napi::CallbackInfo& info) {
    Arguments arguments(info.Env());
    if (!info[0].IsBuffer()) arguments.Refuse("bytes");
    engine::TlsSession* session = Held(info.Env());
    if (!arguments.ok() || session == nullptr) return {};
    auto bytes = info[0].As<Napi::Buffer<uint8_t>>();
    session->Feed(bytes.Data(), bytes.Length());
    return info.Env().Undefined();
  }

  // What can be decrypted now; null at the peer's end, undefined if there is nothing yet.
  Napi::Value Read(const Napi::CallbackInfo& info) {
    engine::TlsSession* session = Held(info.Env());
    if (session == nullptr) return {};
    std::vector<uint8_t> piece(16 * 1024);
    ssize_t got = session->Read(piece.data(), piece.size());
    if (got == -EAGAIN) return info.Env().Undefined();
    if (got == 0) return info.Env().Null();
    if (got < 0) {
      Napi::Error::New(info.Env(), session->why()).ThrowAsJavaScriptException();
      return {};
    }
    piece.resize(static_cast<size_t>(got));
    return ToBuffer(info.Env(), piece);
  }

  Napi::Value Write(const Napi::CallbackInfo& info) {
    Arguments arguments(info.Env());
    if (!info[0].IsBuffer()) arguments.Refuse("bytes");
    engine::TlsSession* session = Held(info.Env());
    if (!arguments.ok() || session == nullptr) return {};
    auto bytes = info[0].As<Napi::Buffer<uint8_t>>();
    if (session->Write(bytes.Data(), bytes.Length()) != 0) {
      Napi::Error::New(info.Env(), session->why()).ThrowAsJavaScriptException();
      return {};
    }
    return info.Env().Undefined();
  }

  Napi::Value End(const Napi::CallbackInfo& info) {
    if (session_) session_->End();
    return info.Env().Undefined();
  }

  Napi::Value TakeOutput(const Napi::CallbackInfo& info) {
    return ToBuffer(info.Env(), session_ ? session_->TakeOutput() : std::vector<uint8_t>());
  }

  Napi::Value Peer(const Napi::CallbackInfo& info) {
    Napi::Env env = info.Env();
    engine::TlsSession* session = Held(env);
    if (session == nullptr) return {};
    SSL* ssl = session->ssl();
    Napi::Object peer = Napi::Object::New(env);
    const char* cipher = SSL_get_cipher_name(ssl);
    peer.Set("protocol", SSL_get_version(ssl));
    peer.Set("cipher", cipher);
    // No session is ever resumed: in TLS 1.3 a hit is a pre-shared key.
    if (SSL_session_reused(ssl) == 1 || std::string(cipher).find("PSK") != std::string::npos) {
      peer.Set("user", session->user());
    }
    if (X509* certificate = SSL_get1_peer_certificate(ssl)) {
      unsigned char* der = nullptr;
      int bytes = i2d_X509(certificate, &der);
      if (bytes > 0) peer.Set("certificate", Napi::Buffer<uint8_t>::Copy(env, der, bytes));
      OPENSSL_free(der);
      X509_free(certificate);
      peer.Set("verifyError", Napi::Number::New(env, SSL_get_verify_result(ssl)));
    }
    return peer;
  }

  std::unique_ptr<engine::TlsSession> session_;
};

// Whether this process has OpenSSL 3 for us: Node's binary has, unless somebody hides it.
bool HasOpenSsl() {
  using Version = unsigned (*)();
  auto version = reinterpret_cast<Version>(dlsym(RTLD_DEFAULT, "OPENSSL_version_major"));
  return version != nullptr && version() == 3 && dlsym(RTLD_DEFAULT, "SSL_write_ex") != nullptr;
}

}  // namespace

std::unique_ptr<engine::TlsSession> TakeTlsSession(Napi::Value value) {
  if (!value.IsObject() || !value.As<Napi::Object>().CheckTypeTag(&kSessionTag)) return nullptr;
  return SessionWrap::Unwrap(value.As<Napi::Object>())->Take();
}

void ExportTls(Napi::Env env, Napi::Object exports) {
  if (!HasOpenSsl()) return;
  exports.Set("TlsContext", ContextWrap::Define(env));
  exports.Set("TlsSession", SessionWrap::Define(env));
}
