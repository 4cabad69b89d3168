// SPDX-License-Identifier: Apache-2.0
// The addon's exports: the module's constants, the classes, and what Node cannot ask a kernel.
#include "addon.h"

#include "control.h"
#include "outcome.h"
#include "snapshot.h"
#include "store_file.h"

namespace {

Napi::Object Constants(Napi::Env env) {
  Napi::Object constants = Napi::Object::New(env);
  constants.Set("abi", STILLBLOCK_ABI);
  constants.Set("device", STILLBLOCK_DEVICE);
  constants.Set("maxTrackers", STILLBLOCK_MAX_TRACKERS);
  constants.Set("maxMounts", STILLBLOCK_MAX_MOUNTS);
  constants.Set("maxStores", STILLBLOCK_MAX_STORES);
  constants.Set("maxExtents", STILLBLOCK_MAX_EXTENTS);
  constants.Set("maxNumber", STILLBLOCK_MAX_NUMBER);
  constants.Set("maxFreezeMs", STILLBLOCK_MAX_FREEZE_MS);
  Napi::Array reasons = Napi::Array::New(env);
  for (uint32_t reason = 0; const char* name = ReasonName(reason); reason++) {
    reasons.Set(reason, Napi::String::New(env, name));
  }
  constants.Set("reasons", reasons);
  Napi::Array histories = Napi::Array::New(env);
  for (uint32_t history = 0; const char* name = HistoryName(history); history++) {
    histories.Set(history, Napi::String::New(env, name));
  }
  constants.Set("histories", histories);
  return constants;
}

Napi::Object Init(Napi::Env env, Napi::Object exports) {
  auto* data = new AddonData();
  env.SetInstanceData(data);
  data->control = Napi::Persistent(Control::Define(env));
  data->snapshot = Napi::Persistent(Snapshot::Define(env));
  data->store_file = Napi::Persistent(StoreFile::Define(env));
  exports.Set("constants", Constants(env));
  exports.Set("openControl", Napi::Function::New(env, Control::Open, "openControl"));
  exports.Set("createStore", Napi::Function::New(env, StoreFile::Create, "createStore"));
  exports.Set("openStore", Napi::Function::New(env, StoreFile::Open, "openStore"));
  ExportEngine(env, exports);
  ExportFiles(env, exports);
  ExportNotify(env, exports);
  ExportTls(env, exports);
  return exports;
}

}  // namespace

NODE_API_MODULE(stillblock, Init)
