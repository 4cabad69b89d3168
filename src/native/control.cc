// SPDX-License-Identifier: Apache-2.0
#include "control.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>

#include <algorithm>
#include <string>
#include <vector>

#include "addon.h"
#include "arguments.h"
#include "device_identity.h"
#include "operation.h"
#include "snapshot.h"
#include "store_pieces.h"
#include "uuid.h"

namespace {

constexpr int kSectorBytes = 512;

using Trackers = std::vector<struct stillblock_tracker>;

Outcome<Trackers> ReadTrackers(int device) {
  Trackers trackers(STILLBLOCK_MAX_TRACKERS);
  for (;;) {
    struct stillblock_list list = {};
    list.trackers = reinterpret_cast<uintptr_t>(trackers.data());
    list.capacity = static_cast<uint32_t>(trackers.size());
    if (int error = Ioctl(device, STILLBLOCK_IOC_LIST, &list)) {
      return Failure{.error = error, .call = "list"};
    }
    bool all = list.count <= trackers.size();
    // Room for those that somebody attaches meanwhile.
    trackers.resize(all ? list.count : list.count + STILLBLOCK_MAX_TRACKERS);
    if (all) return trackers;
  }
}

const char* HistoryText(uint32_t history) {
  const char* name = HistoryName(history);
  return name ? name : "UNKNOWN";
}

Napi::Value ToArray(Napi::Env env, Trackers& trackers) {
  Napi::Array array = Napi::Array::New(env, trackers.size());
  for (uint32_t i = 0; i < trackers.size(); i++) {
    const struct stillblock_tracker& tracker = trackers[i];
    Napi::Object object = Napi::Object::New(env);
    object.Set("id", Napi::BigInt::New(env, static_cast<uint64_t>(tracker.tracker)));
    object.Set("major", tracker.major);
    object.Set("minor", tracker.minor);
    object.Set("sizeBytes", static_cast<double>(tracker.nr_sect) * kSectorBytes);
    object.Set("blockSizeBytes", tracker.block_size);
    object.Set("inSnapshot", (tracker.flags & STILLBLOCK_TRACKER_IN_SNAPSHOT) != 0);
    object.Set("resized", (tracker.flags & STILLBLOCK_TRACKER_RESIZED) != 0);
    object.Set("gone", (tracker.flags & STILLBLOCK_TRACKER_GONE) != 0);
    object.Set("takenUp", (tracker.flags & STILLBLOCK_TRACKER_TAKEN_UP) != 0);
    object.Set("began", HistoryText(tracker.began));
    object.Set("kept", HistoryText(tracker.kept));
    object.Set("generation", UuidText(tracker.generation));
    object.Set("number", tracker.number);
    object.Set("writes", static_cast<double>(tracker.nr_writes));
    object.Set("heldWrites", static_cast<double>(tracker.nr_held_writes));
    array.Set(i, object);
  }
  return array;
}

Outcome<uint64_t> AttachDevice(int device, const std::string& path, uint32_t block_size) {
  // O_NONBLOCK: a FIFO must not wait for its writer, nor a drive for its medium.
  UniqueFd bdev(open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (!bdev.valid()) return Failure::Last("open");
  struct stat status;
  if (fstat(bdev.get(), &status) != 0) return Failure::Last("fstat");
  if (!S_ISBLK(status.st_mode)) {
    return Failure{
        .error = ENOTBLK, .call = "attach", .reason = STILLBLOCK_REASON_NOT_BLOCK_DEVICE};
  }
  struct stillblock_attach attach = {};
  attach.bdev_fd = bdev.get();
  attach.block_size = block_size;
  std::string identity = device_identity::Of(major(status.st_rdev), minor(status.st_rdev));
  std::copy(identity.begin(), identity.end(), attach.identity);
  if (int error = Ioctl(device, STILLBLOCK_IOC_ATTACH, &attach)) {
    return Failure{.error = error, .call = "attach", .reason = attach.reason};
  }
  return attach.tracker;
}

using Place = struct stillblock_place;

// @file is what to set; null with the other flags.
Outcome<Place> RunPlace(int device, uint32_t flags, uint32_t why,
                        const std::shared_ptr<const PreparedStore>& file) {
  Place place = {};
  place.flags = flags;
  place.history = why;
  place.bdev_fd = -1;
  place.file_fd = -1;
  UniqueFd bdev;
  if (file) {
    if (!device_identity::BootId(place.boot_id)) return Failure{.error = ENOENT, .call = "place"};
    bdev = UniqueFd(open(device_identity::Node(file->major, file->minor).c_str(),
                         O_RDONLY | O_CLOEXEC | O_NONBLOCK));
    if (!bdev.valid()) return Failure::Last("open");
    place.bdev_fd = bdev.get();
    if (!file->is_device) {
      place.file_fd = file->fd.get();
      place.extents = reinterpret_cast<uintptr_t>(file->extents.data());
      place.nr_extents = static_cast<uint32_t>(file->extents.size());
    }
  }
  if (int error = Ioctl(device, STILLBLOCK_IOC_PLACE, &place)) {
    return Failure{.error = error,
                   .call = "place",
                   .reason = place.reason,
                   .refusal = place.history ? HistoryName(place.history) : nullptr};
  }
  return place;
}

Napi::Value ToPlace(Napi::Env env, Place& place) {
  Napi::Object object = Napi::Object::New(env);
  object.Set("set", (place.flags & STILLBLOCK_PLACE_SET) != 0);
  object.Set("held", (place.flags & STILLBLOCK_PLACE_HELD) != 0);
  object.Set("history", HistoryText(place.history));
  object.Set("capacityBytes", static_cast<double>(place.capacity));
  object.Set("usedBytes", static_cast<double>(place.used));
  return object;
}

// All of a take in plain C++. The mounts are duplicates, so that nobody can close them under it.
struct TakeRequest {
  std::vector<uint64_t> trackers;
  std::vector<UniqueFd> mounts;
  std::vector<StorePiece> stores;
  uint32_t freeze_timeout_ms = 0;
  uint64_t low_watermark_bytes = 0;
};

Outcome<std::shared_ptr<UniqueFd>> TakeSnapshot(int device, const TakeRequest& request) {
  std::vector<__s32> mounts;
  for (const UniqueFd& mount : request.mounts) mounts.push_back(mount.get());
  std::vector<struct stillblock_store> stores;
  for (const StorePiece& piece : request.stores) stores.push_back(piece.ToRequest());
  struct stillblock_take take = {};
  take.trackers = reinterpret_cast<uintptr_t>(request.trackers.data());
  take.mounts = reinterpret_cast<uintptr_t>(mounts.data());
  take.stores = reinterpret_cast<uintptr_t>(stores.data());
  take.nr_trackers = static_cast<uint32_t>(request.trackers.size());
  take.nr_mounts = static_cast<uint32_t>(mounts.size());
  take.nr_stores = static_cast<uint32_t>(stores.size());
  take.freeze_timeout_ms = request.freeze_timeout_ms;
  take.low_watermark = request.low_watermark_bytes;
  if (int error = Ioctl(device, STILLBLOCK_IOC_TAKE, &take)) {
    return Failure{
        .error = error, .call = "take", .reason = take.reason, .culprit = take.culprit};
  }
  return std::make_shared<UniqueFd>(take.snapshot_fd);
}

std::shared_ptr<TakeRequest> ReadTake(Arguments& arguments, Napi::Value value) {
  auto request = std::make_shared<TakeRequest>();
  if (!value.IsObject()) {
    arguments.Refuse("options");
    return request;
  }
  Napi::Object options = value.As<Napi::Object>();
  arguments.Array(options.Get("trackers"), "trackers", [&](Napi::Value id) {
    request->trackers.push_back(arguments.Id(id, "trackers"));
  });
  arguments.Array(options.Get("mounts"), "mounts", [&](Napi::Value mount) {
    UniqueFd fd(fcntl(arguments.Descriptor(mount, "mounts"), F_DUPFD_CLOEXEC, 0));
    if (!fd.valid()) arguments.Refuse("mounts");
    request->mounts.push_back(std::move(fd));
  });
  arguments.Array(options.Get("stores"), "stores", [&](Napi::Value store) {
    request->stores.push_back(StorePiece::From(arguments, store, "stores"));
  });
  request->freeze_timeout_ms = arguments.Small(options.Get("freezeTimeoutMs"), "freezeTimeoutMs");
  request->low_watermark_bytes =
      arguments.Count(options.Get("lowWatermarkBytes"), "lowWatermarkBytes");
  return request;
}

}  // namespace

Napi::Function Control::Define(Napi::Env env) {
  return DefineClass(env, "Control",
                     {InstanceMethod<&Control::Info>("info"), InstanceMethod<&Control::List>("list"),
                      InstanceMethod<&Control::Attach>("attach"),
                      InstanceMethod<&Control::Detach>("detach"),
                      InstanceMethod<&Control::Mark>("mark"),
                      InstanceMethod<&Control::Place>("place"),
                      InstanceMethod<&Control::Identity>("identity"),
                      InstanceMethod<&Control::Take>("take"),
                      InstanceMethod<&Control::TryLock>("tryLock"),
                      InstanceMethod<&Control::Close>("close")});
}

Napi::Value Control::Open(const Napi::CallbackInfo& info) {
  auto device = std::make_shared<UniqueFd>(open(STILLBLOCK_DEVICE, O_RDWR | O_CLOEXEC));
  if (!device->valid()) {
    Failure::Last("open").ToError(info.Env()).ThrowAsJavaScriptException();
    return {};
  }
  auto external = Napi::External<std::shared_ptr<UniqueFd>>::New(info.Env(), &device);
  return info.Env().GetInstanceData<AddonData>()->control.New({external});
}

Control::Control(const Napi::CallbackInfo& info) : Napi::ObjectWrap<Control>(info) {
  if (info[0].IsExternal()) {
    device_ = *info[0].As<Napi::External<std::shared_ptr<UniqueFd>>>().Data();
  }
}

std::shared_ptr<UniqueFd> Control::Device(Napi::Env env) const {
  if (!device_) Failure{.error = EBADF, .call = "ioctl"}.ToError(env).ThrowAsJavaScriptException();
  return device_;
}

Napi::Value Control::Info(const Napi::CallbackInfo& info) {
  auto device = Device(info.Env());
  if (!device) return {};
  struct stillblock_info module = {};
  if (int error = Ioctl(device->get(), STILLBLOCK_IOC_INFO, &module)) {
    Failure{.error = error, .call = "info"}.ToError(info.Env()).ThrowAsJavaScriptException();
    return {};
  }
  module.version[STILLBLOCK_NAME_SIZE - 1] = '\0';
  Napi::Object object = Napi::Object::New(info.Env());
  object.Set("abi", module.abi);
  object.Set("chunkSizeBytes", module.chunk_size);
  object.Set("version", module.version);
  return object;
}

Napi::Value Control::List(const Napi::CallbackInfo& info) {
  auto device = Device(info.Env());
  if (!device) return {};
  return Operation<Trackers>::Start(
      info.Env(), "stillblock:list", [device] { return ReadTrackers(device->get()); }, ToArray);
}

Napi::Value Control::Attach(const Napi::CallbackInfo& info) {
  Arguments arguments(info.Env());
  std::string path = arguments.Text(info[0], "path");
  uint32_t block_size = arguments.Small(info[1], "blockSizeBytes");
  auto device = arguments.ok() ? Device(info.Env()) : nullptr;
  if (!device) return {};
  return Operation<uint64_t>::Start(
      info.Env(), "stillblock:attach",
      [device, path, block_size] { return AttachDevice(device->get(), path, block_size); },
      [](Napi::Env env, uint64_t& id) -> Napi::Value { return Napi::BigInt::New(env, id); });
}

Napi::Value Control::Detach(const Napi::CallbackInfo& info) {
  Arguments arguments(info.Env());
  uint64_t id = arguments.Id(info[0], "id");
  auto device = arguments.ok() ? Device(info.Env()) : nullptr;
  if (!device) return {};
  return Operation<Nothing>::Start(
      info.Env(), "stillblock:detach",
      [device, id]() -> Outcome<Nothing> {
        struct stillblock_detach detach = {};
        detach.tracker = id;
        if (int error = Ioctl(device->get(), STILLBLOCK_IOC_DETACH, &detach)) {
          return Failure{.error = error, .call = "detach", .reason = detach.reason};
        }
        return Nothing();
      },
      Undefined);
}

Napi::Value Control::Mark(const Napi::CallbackInfo& info) {
  Arguments arguments(info.Env());
  struct stillblock_mark mark = {};
  mark.tracker = arguments.Id(info[0], "id");
  mark.offset = arguments.Count(info[1], "offset");
  mark.length = arguments.Count(info[2], "length");
  auto device = arguments.ok() ? Device(info.Env()) : nullptr;
  if (!device) return {};
  return Operation<Nothing>::Start(
      info.Env(), "stillblock:mark",
      [device, mark]() mutable -> Outcome<Nothing> {
        if (int error = Ioctl(device->get(), STILLBLOCK_IOC_MARK, &mark)) {
          return Failure{.error = error, .call = "mark", .reason = mark.reason};
        }
        return Nothing();
      },
      Undefined);
}

Napi::Value Control::Place(const Napi::CallbackInfo& info) {
  Arguments arguments(info.Env());
  std::string what = arguments.Text(info[0], "what");
  auto file = StoreFile::From(info[1]);
  uint32_t flags = what == "query"                      ? STILLBLOCK_PLACE_QUERY
                   : what == "drop" || what == "refuse" ? STILLBLOCK_PLACE_DROP
                   : what == "format"                   ? STILLBLOCK_PLACE_FORMAT
                                                        : 0;
  uint32_t why = what == "refuse" ? STILLBLOCK_HISTORY_PLACE_ABOVE : STILLBLOCK_HISTORY_OK;
  if ((what == "set" || what == "format") != (file != nullptr)) arguments.Refuse("file");
  auto device = arguments.ok() ? Device(info.Env()) : nullptr;
  if (!device) return {};
  return Operation<struct stillblock_place>::Start(
      info.Env(), "stillblock:place",
      [device, flags, why, file] { return RunPlace(device->get(), flags, why, file); }, ToPlace);
}

Napi::Value Control::Identity(const Napi::CallbackInfo& info) {
  Arguments arguments(info.Env());
  std::string path = arguments.Text(info[0], "path");
  if (!arguments.ok()) return {};
  struct stat status;
  if (stat(path.c_str(), &status) != 0) {
    Failure::Last("stat").ToError(info.Env()).ThrowAsJavaScriptException();
    return {};
  }
  return Napi::String::New(
      info.Env(), device_identity::Of(major(status.st_rdev), minor(status.st_rdev)));
}

Napi::Value Control::Take(const Napi::CallbackInfo& info) {
  Arguments arguments(info.Env());
  auto request = ReadTake(arguments, info[0]);
  auto device = arguments.ok() ? Device(info.Env()) : nullptr;
  if (!device) return {};
  return Operation<std::shared_ptr<UniqueFd>>::Start(
      info.Env(), "stillblock:take",
      [device, request] { return TakeSnapshot(device->get(), *request); },
      [](Napi::Env env, std::shared_ptr<UniqueFd>& fd) { return Snapshot::New(env, fd); });
}

Napi::Value Control::TryLock(const Napi::CallbackInfo& info) {
  auto device = Device(info.Env());
  if (!device) return {};
  bool locked = flock(device->get(), LOCK_EX | LOCK_NB) == 0;
  if (!locked && errno != EWOULDBLOCK) {
    Failure::Last("flock").ToError(info.Env()).ThrowAsJavaScriptException();
    return {};
  }
  return Napi::Boolean::New(info.Env(), locked);
}

Napi::Value Control::Close(const Napi::CallbackInfo& info) {
  device_.reset();
  return info.Env().Undefined();
}
