// SPDX-License-Identifier: Apache-2.0
// A held snapshot: its state, images, changes and events.
#ifndef STILLBLOCK_NATIVE_SNAPSHOT_H_
#define STILLBLOCK_NATIVE_SNAPSHOT_H_

#include <memory>
#include <shared_mutex>

#include "event_thread.h"
#include "unique_fd.h"

// The plain C++ half, shared with the operations in flight. They hold @lock shared while they use
// @fd; closing holds it alone, and so comes after those that have begun and before all others.
struct HeldSnapshot {
  std::shared_mutex lock;
  UniqueFd fd;
  // Declared last: stopped before the descriptor that it polls is closed.
  EventThread events;
};

// JavaScript: { state(), image(index), changedRanges(index, number), watch(callback),
// addStore(store), close() }. close() returns a promise; it settles when the snapshot is gone.
class Snapshot final : public Napi::ObjectWrap<Snapshot> {
 public:
  static Napi::Function Define(Napi::Env env);
  static Napi::Value New(Napi::Env env, std::shared_ptr<UniqueFd> fd);

  explicit Snapshot(const Napi::CallbackInfo& info);
  void Finalize(Napi::BasicEnv env) override;

 private:
  // { state, reason, imageCount, takenNs, freezeNs, gateNs, storeCapacityBytes, storeUsedBytes,
  // heldWrites }
  Napi::Value State(const Napi::CallbackInfo& info);
  // image(index): { tracker, major, minor, sizeBytes, blockSizeBytes, generation, number,
  // checkpointGeneration, checkpointNumber, diskName }
  Napi::Value Image(const Napi::CallbackInfo& info);
  // changedRanges(index, number): Promise<Float64Array> of offset and length of each range whose
  // blocks have a higher number
  Napi::Value ChangedRanges(const Napi::CallbackInfo& info);
  // watch((event: { kind, value | reason, timeNs }) => void), once
  Napi::Value Watch(const Napi::CallbackInfo& info);
  // addStore(StoreFile | number): Promise<void>; a number is a limit of memory
  Napi::Value AddStore(const Napi::CallbackInfo& info);
  Napi::Value Close(const Napi::CallbackInfo& info);

  // Throws and returns null when closed.
  std::shared_ptr<HeldSnapshot> Held(Napi::Env env) const;

  std::shared_ptr<HeldSnapshot> held_;
  bool closing_ = false;
  bool watched_ = false;
};

#endif  // STILLBLOCK_NATIVE_SNAPSHOT_H_
