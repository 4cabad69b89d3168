// SPDX-License-Identifier: Apache-2.0
// A file made ready to be difference storage: allocated in full, its extents known; or a device.
#ifndef STILLBLOCK_NATIVE_STORE_FILE_H_
#define STILLBLOCK_NATIVE_STORE_FILE_H_

#include <memory>
#include <vector>

#include "outcome.h"
#include "unique_fd.h"

// The plain C++ half, shared with the operations that use it.
struct PreparedStore {
  UniqueFd fd;
  // None for a device.
  std::vector<struct stillblock_extent> extents;
  bool is_device = false;
  uint64_t size_bytes = 0;
  // Of the device that the extents lie on.
  uint32_t major = 0;
  uint32_t minor = 0;
};

// JavaScript: { sizeBytes, major, minor, extents(): Float64Array, close(): Promise<void> }
class StoreFile final : public Napi::ObjectWrap<StoreFile> {
 public:
  static Napi::Function Define(Napi::Env env);
  // createStore(folder, sizeBytes): Promise<StoreFile>, of a file without a name
  static Napi::Value Create(const Napi::CallbackInfo& info);
  // openStore(path, sizeBytes | 0 for all of it): Promise<StoreFile>, of a file or a block device
  static Napi::Value Open(const Napi::CallbackInfo& info);
  // The store in a JavaScript value, or null if it is none, or closed.
  static std::shared_ptr<const PreparedStore> From(Napi::Value value);

  explicit StoreFile(const Napi::CallbackInfo& info);

 private:
  Napi::Value SizeBytes(const Napi::CallbackInfo& info);
  Napi::Value Major(const Napi::CallbackInfo& info);
  Napi::Value Minor(const Napi::CallbackInfo& info);
  Napi::Value Extents(const Napi::CallbackInfo& info);
  Napi::Value Close(const Napi::CallbackInfo& info);

  // Null once closed.
  std::shared_ptr<PreparedStore> store_;
};

#endif  // STILLBLOCK_NATIVE_STORE_FILE_H_
