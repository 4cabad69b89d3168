// SPDX-License-Identifier: Apache-2.0
// A blocking call on libuv's pool that settles a promise.
#ifndef STILLBLOCK_NATIVE_OPERATION_H_
#define STILLBLOCK_NATIVE_OPERATION_H_

#include <functional>
#include <optional>
#include <utility>

#include "outcome.h"

// Both functions own, by value or shared pointer, all that they use: whatever JavaScript closes
// or forgets meanwhile stays until the operation ends.
template <typename T>
class Operation final : public Napi::AsyncWorker {
 public:
  // Runs on a thread of the pool and touches no JavaScript.
  using Run = std::function<Outcome<T>()>;
  // Runs on the main thread.
  using Convert = std::function<Napi::Value(Napi::Env, T&)>;

  static Napi::Value Start(Napi::Env env, const char* name, Run run, Convert convert) {
    // Deletes itself after it has settled the promise.
    auto* operation = new Operation(env, name, std::move(run), std::move(convert));
    Napi::Promise promise = operation->deferred_.Promise();
    operation->Queue();
    return promise;
  }

 private:
  Operation(Napi::Env env, const char* name, Run run, Convert convert)
      : Napi::AsyncWorker(env, name),
        deferred_(Napi::Promise::Deferred::New(env)),
        run_(std::move(run)),
        convert_(std::move(convert)) {}

  void Execute() override { outcome_.emplace(run_()); }

  void OnOK() override {
    // While an environment goes down nobody is left to be told, and no value can be made.
    napi_value probe;
    if (napi_coerce_to_bool(Env(), Env().Undefined(), &probe) != napi_ok) return;
    if (Failure* failure = std::get_if<Failure>(&*outcome_)) {
      deferred_.Reject(failure->ToError(Env()).Value());
      return;
    }
    Napi::Value value = convert_(Env(), std::get<T>(*outcome_));
    if (Env().IsExceptionPending()) {
      deferred_.Reject(Env().GetAndClearPendingException().Value());
      return;
    }
    deferred_.Resolve(value);
  }

  Napi::Promise::Deferred deferred_;
  Run run_;
  Convert convert_;
  std::optional<Outcome<T>> outcome_;
};

inline Napi::Value Undefined(Napi::Env env, Nothing&) { return env.Undefined(); }

#endif  // STILLBLOCK_NATIVE_OPERATION_H_
