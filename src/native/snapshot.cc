// SPDX-License-Identifier: Apache-2.0
#include "snapshot.h"

#include <algorithm>
#include <mutex>
#include <vector>

#include "addon.h"
#include "arguments.h"
#include "operation.h"
#include "store_pieces.h"
#include "uuid.h"

namespace {

constexpr uint64_t kSectorBytes = 512;
// Blocks of a change map read at once.
constexpr uint64_t kMapPiece = 1 << 20;

using Ranges = std::vector<double>;

Failure Closed(const char* call) { return {.error = EBADF, .call = call}; }

// The caller holds the lock shared.
Outcome<struct stillblock_image> ReadImage(const HeldSnapshot& held, uint32_t index) {
  struct stillblock_image image = {};
  image.index = index;
  if (!held.fd.valid()) return Closed("image");
  if (int error = Ioctl(held.fd.get(), STILLBLOCK_SNAP_IOC_IMAGE, &image)) {
    return Failure{.error = error, .call = "image"};
  }
  image.disk_name[STILLBLOCK_NAME_SIZE - 1] = '\0';
  return image;
}

// Merges runs of blocks whose number is above another into ranges of bytes.
class RangeBuilder {
 public:
  RangeBuilder(uint64_t block_bytes, uint64_t size_bytes)
      : block_bytes_(block_bytes), size_bytes_(size_bytes) {}

  void Append(uint64_t first_block, const std::vector<uint8_t>& numbers, uint32_t above) {
    for (size_t i = 0; i < numbers.size(); i++) {
      bool changed = numbers[i] > above;
      if (changed == inside_) continue;
      inside_ = changed;
      uint64_t at = (first_block + i) * block_bytes_;
      if (changed) {
        start_ = at;
      } else {
        Push(at);
      }
    }
  }

  Ranges Finish() {
    if (inside_) Push(size_bytes_);
    return std::move(ranges_);
  }

 private:
  void Push(uint64_t end) {
    // The last block may reach beyond the device.
    end = std::min(end, size_bytes_);
    ranges_.push_back(static_cast<double>(start_));
    ranges_.push_back(static_cast<double>(end - start_));
  }

  const uint64_t block_bytes_;
  const uint64_t size_bytes_;
  bool inside_ = false;
  uint64_t start_ = 0;
  Ranges ranges_;
};

Outcome<Ranges> FindChanges(HeldSnapshot& held, uint32_t index, uint32_t above) {
  std::shared_lock<std::shared_mutex> guard(held.lock);
  Outcome<struct stillblock_image> read = ReadImage(held, index);
  if (Failure* failure = std::get_if<Failure>(&read)) return *failure;
  const auto& image = std::get<struct stillblock_image>(read);
  RangeBuilder builder(image.block_size, image.nr_sect * kSectorBytes);
  std::vector<uint8_t> numbers;
  for (uint64_t first = 0; first < image.nr_blocks; first += numbers.size()) {
    numbers.resize(std::min<uint64_t>(kMapPiece, image.nr_blocks - first));
    struct stillblock_map map = {};
    map.index = index;
    map.first_block = first;
    map.nr_blocks = numbers.size();
    map.buffer = reinterpret_cast<uintptr_t>(numbers.data());
    if (int error = Ioctl(held.fd.get(), STILLBLOCK_SNAP_IOC_MAP, &map)) {
      return Failure{.error = error, .call = "map"};
    }
    builder.Append(first, numbers, above);
  }
  return builder.Finish();
}

const char* StateName(uint32_t state) {
  // Without a default, so that -Wswitch finds a state that is new in the header.
  switch (static_cast<enum stillblock_snapshot_state>(state)) {
    case STILLBLOCK_STATE_HELD: return "held";
    case STILLBLOCK_STATE_FAILED: return "failed";
  }
  return "unknown";
}

void StopEvents(void* held) { static_cast<HeldSnapshot*>(held)->events.Stop(); }

}  // namespace

Napi::Function Snapshot::Define(Napi::Env env) {
  return DefineClass(env, "Snapshot",
                     {InstanceMethod<&Snapshot::State>("state"),
                      InstanceMethod<&Snapshot::Image>("image"),
                      InstanceMethod<&Snapshot::ChangedRanges>("changedRanges"),
                      InstanceMethod<&Snapshot::Watch>("watch"),
                      InstanceMethod<&Snapshot::AddStore>("addStore"),
                      InstanceMethod<&Snapshot::Close>("close")});
}

Napi::Value Snapshot::New(Napi::Env env, std::shared_ptr<UniqueFd> fd) {
  auto held = std::make_shared<HeldSnapshot>();
  held->fd = std::move(*fd);
  auto external = Napi::External<std::shared_ptr<HeldSnapshot>>::New(env, &held);
  return env.GetInstanceData<AddonData>()->snapshot.New({external});
}

Snapshot::Snapshot(const Napi::CallbackInfo& info) : Napi::ObjectWrap<Snapshot>(info) {
  if (info[0].IsExternal()) {
    held_ = *info[0].As<Napi::External<std::shared_ptr<HeldSnapshot>>>().Data();
  }
}

void Snapshot::Finalize(Napi::BasicEnv env) {
  if (watched_) napi_remove_env_cleanup_hook(env, StopEvents, held_.get());
}

std::shared_ptr<HeldSnapshot> Snapshot::Held(Napi::Env env) const {
  if (held_ && !closing_) return held_;
  Closed("ioctl").ToError(env).ThrowAsJavaScriptException();
  return nullptr;
}

Napi::Value Snapshot::State(const Napi::CallbackInfo& info) {
  auto held = Held(info.Env());
  if (!held) return {};
  std::shared_lock<std::shared_mutex> guard(held->lock);
  struct stillblock_state state = {};
  if (int error = Ioctl(held->fd.get(), STILLBLOCK_SNAP_IOC_STATE, &state)) {
    Failure{.error = error, .call = "state"}.ToError(info.Env()).ThrowAsJavaScriptException();
    return {};
  }
  const char* reason = ReasonName(state.reason);
  Napi::Object object = Napi::Object::New(info.Env());
  object.Set("state", StateName(state.state));
  object.Set("reason", reason ? reason : "UNKNOWN");
  object.Set("imageCount", state.nr_images);
  object.Set("takenNs", Napi::BigInt::New(info.Env(), static_cast<uint64_t>(state.taken_ns)));
  object.Set("freezeNs", static_cast<double>(state.freeze_ns));
  object.Set("gateNs", static_cast<double>(state.gate_ns));
  object.Set("storeCapacityBytes", static_cast<double>(state.store_capacity));
  object.Set("storeUsedBytes", static_cast<double>(state.store_used));
  object.Set("heldWrites", static_cast<double>(state.nr_held_writes));
  return object;
}

Napi::Value Snapshot::Image(const Napi::CallbackInfo& info) {
  Arguments arguments(info.Env());
  uint32_t index = arguments.Small(info[0], "index");
  auto held = arguments.ok() ? Held(info.Env()) : nullptr;
  if (!held) return {};
  std::shared_lock<std::shared_mutex> guard(held->lock);
  Outcome<struct stillblock_image> read = ReadImage(*held, index);
  if (Failure* failure = std::get_if<Failure>(&read)) {
    failure->ToError(info.Env()).ThrowAsJavaScriptException();
    return {};
  }
  const auto& image = std::get<struct stillblock_image>(read);
  Napi::Object object = Napi::Object::New(info.Env());
  object.Set("tracker", Napi::BigInt::New(info.Env(), static_cast<uint64_t>(image.tracker)));
  object.Set("major", image.major);
  object.Set("minor", image.minor);
  object.Set("sizeBytes", static_cast<double>(image.nr_sect * kSectorBytes));
  object.Set("blockSizeBytes", image.block_size);
  object.Set("generation", UuidText(image.generation));
  object.Set("number", image.number);
  object.Set("checkpointGeneration", UuidText(image.checkpoint_generation));
  object.Set("checkpointNumber", image.checkpoint_number);
  object.Set("diskName", image.disk_name);
  return object;
}

Napi::Value Snapshot::ChangedRanges(const Napi::CallbackInfo& info) {
  Arguments arguments(info.Env());
  uint32_t index = arguments.Small(info[0], "index");
  uint32_t above = arguments.Small(info[1], "number");
  auto held = arguments.ok() ? Held(info.Env()) : nullptr;
  if (!held) return {};
  return Operation<Ranges>::Start(
      info.Env(), "stillblock:changedRanges",
      [held, index, above] { return FindChanges(*held, index, above); },
      [](Napi::Env env, Ranges& ranges) -> Napi::Value {
        Napi::Float64Array array = Napi::Float64Array::New(env, ranges.size());
        std::copy(ranges.begin(), ranges.end(), array.Data());
        return array;
      });
}

Napi::Value Snapshot::Watch(const Napi::CallbackInfo& info) {
  Arguments arguments(info.Env());
  if (!info[0].IsFunction() || watched_) arguments.Refuse("callback");
  auto held = arguments.ok() ? Held(info.Env()) : nullptr;
  if (!held) return {};
  auto function = Napi::ThreadSafeFunction::New(info.Env(), info[0].As<Napi::Function>(),
                                                "stillblock:events", 0, 1);
  // Waiting for events alone is no reason for the process to go on.
  function.Unref(info.Env());
  if (int error = held->events.Start(held->fd.get(), function)) {
    Failure{.error = error, .call = "watch"}.ToError(info.Env()).ThrowAsJavaScriptException();
    return {};
  }
  // Hooks run last in, first out: the thread ends before the function that it calls is torn down.
  watched_ = true;
  napi_add_env_cleanup_hook(info.Env(), StopEvents, held.get());
  return info.Env().Undefined();
}

Napi::Value Snapshot::AddStore(const Napi::CallbackInfo& info) {
  Arguments arguments(info.Env());
  StorePiece piece = StorePiece::From(arguments, info[0], "store");
  auto held = arguments.ok() ? Held(info.Env()) : nullptr;
  if (!held) return {};
  return Operation<Nothing>::Start(
      info.Env(), "stillblock:addStore",
      [held, piece]() -> Outcome<Nothing> {
        std::shared_lock<std::shared_mutex> guard(held->lock);
        if (!held->fd.valid()) return Closed("addStore");
        struct stillblock_add_store add = {};
        add.store = piece.ToRequest();
        if (int error = Ioctl(held->fd.get(), STILLBLOCK_SNAP_IOC_ADD_STORE, &add)) {
          return Failure{.error = error, .call = "addStore", .reason = add.reason};
        }
        return Nothing();
      },
      Undefined);
}

Napi::Value Snapshot::Close(const Napi::CallbackInfo& info) {
  closing_ = true;
  return Operation<Nothing>::Start(
      info.Env(), "stillblock:closeSnapshot",
      [held = held_]() -> Outcome<Nothing> {
        if (!held) return Nothing();
        held->events.Stop();
        std::unique_lock<std::shared_mutex> guard(held->lock);
        held->fd.Reset();
        return Nothing();
      },
      Undefined);
}
