// SPDX-License-Identifier: Apache-2.0
// The native transmission engine for JavaScript. Its threads touch no JavaScript: what they tell
// comes through one thread-safe function.
#include <fcntl.h>

#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "addon.h"
#include "arguments.h"
#include "engine/engine.h"
#include "operation.h"
#include "tls_binding.h"

namespace {

// What a thread of the engine tells, carried to the main thread.
struct Told {
  enum class Kind : uint8_t { kClosed, kReadFailed, kExportGone } kind;
  uint64_t id;
  const char* reason = nullptr;
  bool peers_fault = false;
  int error = 0;
  uint64_t offset = 0;
  uint64_t length = 0;
};

// On the main thread, or with a null environment when that goes down.
void Tell(Napi::Env env, Napi::Function callback, void*, Told* data) {
  std::unique_ptr<Told> told(data);
  if (env == nullptr) return;
  Napi::Object event = Napi::Object::New(env);
  event.Set("id", Napi::Number::New(env, static_cast<double>(told->id)));
  switch (told->kind) {
    case Told::Kind::kClosed:
      event.Set("kind", "closed");
      if (told->reason) event.Set("reason", told->reason);
      event.Set("peersFault", told->peers_fault);
      break;
    case Told::Kind::kReadFailed: {
      const char* code = strerrorname_np(told->error);
      event.Set("kind", "readFailed");
      event.Set("code", code ? code : "UNKNOWN");
      event.Set("offset", Napi::Number::New(env, static_cast<double>(told->offset)));
      event.Set("length", Napi::Number::New(env, static_cast<double>(told->length)));
      break;
    }
    case Told::Kind::kExportGone:
      event.Set("kind", "exportGone");
      break;
  }
  callback.Call({event});
}

using Teller = Napi::TypedThreadSafeFunction<void, Told, Tell>;

// The engine with what it tells to whom. Shared with operations that outlive the wrapper.
class Held final : public engine::Events {
 public:
  Held(const engine::Options& options, Teller teller) : teller_(teller), engine_(options, this) {}
  ~Held() override { Stop(); }

  int Start() { return engine_.Start(); }

  // Returns when all threads have ended. Safe to call again, and from several threads.
  void Stop() {
    std::lock_guard<std::mutex> guard(stopping_);
    if (std::exchange(stopped_, true)) return;
    engine_.Stop();
    std::lock_guard<std::mutex> telling(telling_);
    released_ = true;
    teller_.Release();
  }

  engine::Engine& get() { return engine_; }

  void Closed(uint64_t id, const char* reason, bool peers_fault) override {
    Post({.kind = Told::Kind::kClosed, .id = id, .reason = reason, .peers_fault = peers_fault});
  }
  void ReadFailed(uint64_t id, int error, uint64_t offset, uint64_t length) override {
    Post({.kind = Told::Kind::kReadFailed,
          .id = id,
          .error = error,
          .offset = offset,
          .length = length});
  }
  void ExportGone(uint64_t id) { Post({.kind = Told::Kind::kExportGone, .id = id}); }

 private:
  void Post(Told told) {
    std::lock_guard<std::mutex> telling(telling_);
    if (released_) return;
    auto* data = new Told(told);
    if (teller_.NonBlockingCall(data) != napi_ok) delete data;
  }

  std::mutex telling_;
  // Protected by telling_.
  Teller teller_;
  bool released_ = false;
  std::mutex stopping_;
  // Protected by stopping_.
  bool stopped_ = false;
  engine::Engine engine_;
};

void StopHeld(void* held) { static_cast<Held*>(held)->Stop(); }

// JavaScript: see NativeEngine in src/native.ts.
class EngineWrap final : public Napi::ObjectWrap<EngineWrap> {
 public:
  static Napi::Function Define(Napi::Env env) {
    return DefineClass(env, "Engine",
                       {InstanceMethod<&EngineWrap::AddExport>("addExport"),
                        InstanceMethod<&EngineWrap::RemoveExport>("removeExport"),
                        InstanceMethod<&EngineWrap::FailExport>("failExport"),
                        InstanceMethod<&EngineWrap::Figures>("figures"),
                        InstanceMethod<&EngineWrap::Adopt>("adopt"),
                        InstanceMethod<&EngineWrap::Drain>("drain"),
                        InstanceMethod<&EngineWrap::Destroy>("destroy"),
                        InstanceMethod<&EngineWrap::BytesInFlight>("bytesInFlight"),
                        InstanceMethod<&EngineWrap::KeepAlive>("keepAlive"),
                        InstanceMethod<&EngineWrap::Close>("close")});
  }

  explicit EngineWrap(const Napi::CallbackInfo& info) : Napi::ObjectWrap<EngineWrap>(info) {
    Arguments arguments(info.Env());
    if (!info[0].IsObject() || !info[1].IsFunction()) {
      arguments.Refuse("options");
      return;
    }
    Napi::Object given = info[0].As<Napi::Object>();
    engine::Options options;
    engine::Limits& limits = options.limits;
    auto small = [&](const char* name) { return arguments.Small(given.Get(name), name); };
    auto count = [&](const char* name) { return arguments.Count(given.Get(name), name); };
    limits.requests_in_flight = small("requestsInFlight");
    limits.connection_bytes_in_flight = count("connectionBytesInFlight");
    limits.bytes_in_flight = count("bytesInFlight");
    limits.piece_bytes = small("pieceBytes");
    limits.status_extents = small("statusExtents");
    limits.read_bytes = small("readBytes");
    limits.idle_buffer_bytes = count("idleBufferBytes");
    limits.drain_ms = small("drainMs");
    options.allow_ring = given.Get("ring").ToBoolean();
    if (!arguments.ok()) return;
    teller_ = Teller::New(info.Env(), info[1].As<Napi::Function>(), "stillblock:engine", 0, 1);
    teller_.Unref(info.Env());
    held_ = std::make_shared<Held>(options, teller_);
    if (int error = held_->Start()) {
      held_.reset();
      Failure{.error = error, .call = "engine"}.ToError(info.Env()).ThrowAsJavaScriptException();
      return;
    }
    // Hooks run last in, first out: the threads end before the function that they call.
    napi_add_env_cleanup_hook(info.Env(), StopHeld, held_.get());
  }

  void Finalize(Napi::BasicEnv env) override {
    if (!held_) return;
    napi_remove_env_cleanup_hook(env, StopHeld, held_.get());
    held_->Stop();
  }

 private:
  // An export, and the arrays that it reads.
  struct Offered {
    std::shared_ptr<engine::Export> served;
    std::vector<Napi::ObjectReference> arrays;
  };

  // The memory of a typed array, which stays while the export does.
  void* Share(Arguments& arguments, Napi::Value value, napi_typedarray_type type, size_t* length,
              std::vector<Napi::ObjectReference>& arrays) {
    napi_typedarray_type actual;
    void* data = nullptr;
    if (napi_get_typedarray_info(Env(), value, &actual, length, &data, nullptr, nullptr) !=
            napi_ok ||
        actual != type) {
      arguments.Refuse("array");
      return nullptr;
    }
    arrays.push_back(Napi::Persistent(value.As<Napi::Object>()));
    return data;
  }

  Offered* Find(const Napi::CallbackInfo& info) {
    Arguments arguments(info.Env());
    uint64_t id = arguments.Count(info[0], "export");
    auto found = exports_.find(id);
    if (found != exports_.end()) return &found->second;
    arguments.Refuse("export");
    return nullptr;
  }

  Napi::Value AddExport(const Napi::CallbackInfo& info) {
    Arguments arguments(info.Env());
    if (!info[0].IsObject()) arguments.Refuse("export");
    if (!arguments.ok()) return {};
    Napi::Object given = info[0].As<Napi::Object>();
    engine::ExportSpec spec;
    Offered offered;
    spec.fd = UniqueFd(fcntl(arguments.Descriptor(given.Get("fd"), "fd"), F_DUPFD_CLOEXEC, 0));
    if (!spec.fd.valid()) arguments.Refuse("fd");
    spec.size_bytes = arguments.Count(given.Get("sizeBytes"), "sizeBytes");
    spec.forget = given.Get("forget").ToBoolean();
    if (given.Get("allocation").IsNumber()) {
      spec.allocation = static_cast<int>(arguments.Small(given.Get("allocation"), "allocation"));
    }
    arguments.Array(given.Get("contexts"), "contexts", [&](Napi::Value value) {
      Napi::Object map = value.As<Napi::Object>();
      size_t starts = 0;
      size_t flags = 0;
      auto* start = static_cast<double*>(
          Share(arguments, map.Get("starts"), napi_float64_array, &starts, offered.arrays));
      auto* flag = static_cast<uint32_t*>(
          Share(arguments, map.Get("flags"), napi_uint32_array, &flags, offered.arrays));
      if (starts != flags) arguments.Refuse("contexts");
      spec.contexts.emplace_back(start, flag, starts, spec.size_bytes);
    });
    arguments.Array(given.Get("caps"), "caps", [&](Napi::Value value) {
      Napi::Object cap = value.As<Napi::Object>();
      size_t length = 0;
      auto* paid = static_cast<int64_t*>(Share(arguments, cap.Get("paidUntilNs"),
                                               napi_bigint64_array, &length, offered.arrays));
      uint64_t rate = arguments.Count(cap.Get("bytesPerSecond"), "bytesPerSecond");
      if (length != 1 || rate == 0) arguments.Refuse("caps");
      spec.caps.push_back({paid, rate});
    });
    if (!arguments.ok() || !held_) return {};
    uint64_t id = next_export_++;
    // A circle only while it is served: Stop() ends all connections.
    spec.on_gone = [held = held_, id] { held->ExportGone(id); };
    offered.served = std::make_shared<engine::Export>(std::move(spec));
    exports_.emplace(id, std::move(offered));
    return Napi::Number::New(info.Env(), static_cast<double>(id));
  }

  // The event `exportGone` comes when nothing uses it; then forgetExport drops the arrays.
  Napi::Value RemoveExport(const Napi::CallbackInfo& info) {
    Offered* offered = Find(info);
    if (offered == nullptr) return {};
    if (offered->served) {
      offered->served.reset();
    } else {
      Arguments arguments(info.Env());
      exports_.erase(arguments.Count(info[0], "export"));
    }
    return info.Env().Undefined();
  }

  Napi::Value FailExport(const Napi::CallbackInfo& info) {
    Offered* offered = Find(info);
    if (offered != nullptr && offered->served) offered->served->Fail();
    return info.Env().Undefined();
  }

  // Of nanoseconds 2^53 are reached after a hundred days of waiting in sum.
  Napi::Value Figures(const Napi::CallbackInfo& info) {
    Offered* offered = Find(info);
    if (offered == nullptr || !offered->served) return {};
    std::vector<double> numbers;
    engine::Tally zero;
    offered->served->totals.Zip(zero, [&](std::atomic<uint64_t>& total, uint64_t&) {
      numbers.push_back(static_cast<double>(total.load(std::memory_order_relaxed)));
    });
    Napi::Float64Array array = Napi::Float64Array::New(info.Env(), numbers.size());
    std::copy(numbers.begin(), numbers.end(), array.Data());
    return array;
  }

  // adopt(fd, export, headers, contextIds, received, tls?): number. The descriptor stays the
  // caller's, a TLS session does not.
  Napi::Value Adopt(const Napi::CallbackInfo& info) {
    Arguments arguments(info.Env());
    UniqueFd fd(fcntl(arguments.Descriptor(info[0], "fd"), F_DUPFD_CLOEXEC, 0));
    uint64_t id = arguments.Count(info[1], "export");
    uint32_t headers = arguments.Small(info[2], "headers");
    std::vector<uint32_t> ids;
    arguments.Array(info[3], "contextIds",
                    [&](Napi::Value value) { ids.push_back(arguments.Small(value, "contextIds")); });
    if (!info[4].IsBuffer()) arguments.Refuse("received");
    auto found = exports_.find(id);
    if (found == exports_.end() || !found->second.served) arguments.Refuse("export");
    if (headers > 2) arguments.Refuse("headers");
    if (!fd.valid()) arguments.Refuse("fd");
    if (!arguments.ok() || !held_) return {};
    for (uint32_t context : ids) {
      if (found->second.served->Context(context) == nullptr) arguments.Refuse("contextIds");
    }
    if (!arguments.ok()) return {};
    auto received = info[4].As<Napi::Buffer<uint8_t>>();
    std::unique_ptr<engine::Transport> transport;
    if (info[5].IsUndefined()) {
      transport = std::make_unique<engine::PlainTransport>(std::move(fd));
    } else {
      std::unique_ptr<engine::TlsSession> session = TakeTlsSession(info[5]);
      if (!session) {
        arguments.Refuse("tls");
        return {};
      }
      transport = std::make_unique<engine::TlsTransport>(std::move(fd), std::move(session));
    }
    uint64_t connection = held_->get().Adopt(
        std::move(transport), found->second.served,
        static_cast<engine::Headers>(headers), std::move(ids),
        std::vector<uint8_t>(received.Data(), received.Data() + received.Length()));
    return Napi::Number::New(info.Env(), static_cast<double>(connection));
  }

  Napi::Value Drain(const Napi::CallbackInfo& info) {
    Arguments arguments(info.Env());
    uint64_t id = arguments.Count(info[0], "id");
    if (arguments.ok() && held_) held_->get().Drain(id);
    return info.Env().Undefined();
  }

  Napi::Value Destroy(const Napi::CallbackInfo& info) {
    Arguments arguments(info.Env());
    uint64_t id = arguments.Count(info[0], "id");
    if (arguments.ok() && held_) held_->get().Destroy(id);
    return info.Env().Undefined();
  }

  Napi::Value BytesInFlight(const Napi::CallbackInfo& info) {
    return Napi::Number::New(info.Env(),
                             held_ ? static_cast<double>(held_->get().BytesInFlight()) : 0);
  }

  // keepAlive(boolean): whether the process is to go on for its sake.
  Napi::Value KeepAlive(const Napi::CallbackInfo& info) {
    if (!held_) return info.Env().Undefined();
    if (info[0].ToBoolean()) {
      teller_.Ref(info.Env());
    } else {
      teller_.Unref(info.Env());
    }
    return info.Env().Undefined();
  }

  // On the pool, for threads may be in the middle of a read.
  Napi::Value Close(const Napi::CallbackInfo& info) {
    if (held_) napi_remove_env_cleanup_hook(info.Env(), StopHeld, held_.get());
    return Operation<Nothing>::Start(
        info.Env(), "stillblock:closeEngine",
        [held = std::move(held_)]() mutable -> Outcome<Nothing> {
          if (held) held->Stop();
          held.reset();
          return Nothing();
        },
        Undefined);
  }

  Teller teller_;
  std::map<uint64_t, Offered> exports_;
  std::shared_ptr<Held> held_;
  uint64_t next_export_ = 1;
};

}  // namespace

void ExportEngine(Napi::Env env, Napi::Object exports) {
  exports.Set("Engine", EngineWrap::Define(env));
}
