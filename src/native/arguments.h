// SPDX-License-Identifier: Apache-2.0
// Arguments from JavaScript, converted to plain C++ before anything is queued. The only caller is
// src/native.ts, which is typed; what is wrong all the same throws a TypeError here.
#ifndef STILLBLOCK_NATIVE_ARGUMENTS_H_
#define STILLBLOCK_NATIVE_ARGUMENTS_H_

#include <napi.h>

#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

class Arguments {
 public:
  explicit Arguments(Napi::Env env) : env_(env) {}

  bool ok() const { return ok_; }

  std::string Text(Napi::Value value, const char* name) {
    if (value.IsString()) return value.As<Napi::String>().Utf8Value();
    Refuse(name);
    return {};
  }

  // A number of bytes, or any other count: a safe integer, not negative.
  uint64_t Count(Napi::Value value, const char* name) {
    if (value.IsNumber()) {
      double number = value.As<Napi::Number>().DoubleValue();
      if (number >= 0 && number <= 9007199254740991.0 && std::floor(number) == number) {
        return static_cast<uint64_t>(number);
      }
    }
    Refuse(name);
    return 0;
  }

  uint32_t Small(Napi::Value value, const char* name) {
    uint64_t count = Count(value, name);
    if (count <= UINT32_MAX) return static_cast<uint32_t>(count);
    Refuse(name);
    return 0;
  }

  int Descriptor(Napi::Value value, const char* name) {
    uint64_t count = Count(value, name);
    if (count <= INT32_MAX) return static_cast<int>(count);
    Refuse(name);
    return -1;
  }

  uint64_t Id(Napi::Value value, const char* name) {
    if (value.IsBigInt()) {
      bool lossless = false;
      uint64_t id = value.As<Napi::BigInt>().Uint64Value(&lossless);
      if (lossless) return id;
    }
    Refuse(name);
    return 0;
  }

  // The elements of an array, each given to a function.
  template <typename Each>
  void Array(Napi::Value value, const char* name, Each each) {
    if (!value.IsArray()) {
      Refuse(name);
      return;
    }
    Napi::Array array = value.As<Napi::Array>();
    for (uint32_t i = 0; i < array.Length() && ok_; i++) each(array.Get(i));
  }

  void Refuse(const char* name) {
    if (ok_) Napi::TypeError::New(env_, std::string(name) + " is wrong").ThrowAsJavaScriptException();
    ok_ = false;
  }

 private:
  Napi::Env env_;
  bool ok_ = true;
};

#endif  // STILLBLOCK_NATIVE_ARGUMENTS_H_
