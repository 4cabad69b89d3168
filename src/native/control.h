// SPDX-License-Identifier: Apache-2.0
// /dev/stillblock: the module's version, its trackers, and the taking of snapshots.
#ifndef STILLBLOCK_NATIVE_CONTROL_H_
#define STILLBLOCK_NATIVE_CONTROL_H_

#include <napi.h>

#include <memory>

#include "unique_fd.h"

// JavaScript: { info(), list(), attach(), detach(), mark(), place(), take(), tryLock(), close() }. An operation that runs
// keeps the descriptor; close() only lets go of it.
class Control final : public Napi::ObjectWrap<Control> {
 public:
  static Napi::Function Define(Napi::Env env);
  // openControl(): Control; throws if there is no device, or one may not open it.
  static Napi::Value Open(const Napi::CallbackInfo& info);

  explicit Control(const Napi::CallbackInfo& info);

 private:
  // { abi, chunkSizeBytes, version }
  Napi::Value Info(const Napi::CallbackInfo& info);
  // Promise of [{ id, major, minor, sizeBytes, blockSizeBytes, inSnapshot, stale, generation,
  // number, writes, heldWrites }]
  Napi::Value List(const Napi::CallbackInfo& info);
  // attach(path, blockSizeBytes | 0): Promise<bigint>
  Napi::Value Attach(const Napi::CallbackInfo& info);
  // detach(id: bigint): Promise<void>
  Napi::Value Detach(const Napi::CallbackInfo& info);
  // mark(id, offset, length): Promise<void>; bytes
  Napi::Value Mark(const Napi::CallbackInfo& info);
  // place('query' | 'drop' | 'refuse' | 'set' | 'format', StoreFile | null): Promise<{ set, held,
  // history, capacityBytes, usedBytes }>; the error's refusal says what is wrong with what lies
  // there
  Napi::Value Place(const Napi::CallbackInfo& info);
  // identity(path): string, as attach() gives it to the module; empty for none
  Napi::Value Identity(const Napi::CallbackInfo& info);
  // take({ trackers: bigint[], mounts: number[], stores: (StoreFile | number)[],
  // freezeTimeoutMs, lowWatermarkBytes }): Promise<Snapshot>; a number is a limit of memory
  Napi::Value Take(const Napi::CallbackInfo& info);
  // tryLock(): boolean. Only one open control device has the lock, until it is closed.
  Napi::Value TryLock(const Napi::CallbackInfo& info);
  Napi::Value Close(const Napi::CallbackInfo& info);

  // Throws and returns null when closed.
  std::shared_ptr<UniqueFd> Device(Napi::Env env) const;

  std::shared_ptr<UniqueFd> device_;
};

#endif  // STILLBLOCK_NATIVE_CONTROL_H_
