// SPDX-License-Identifier: Apache-2.0
#include "store_file.h"

#include <fcntl.h>
#include <linux/fiemap.h>
#include <linux/fs.h>
#include <linux/magic.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/vfs.h>

#include <algorithm>
#include <string>

#include "addon.h"
#include "arguments.h"
#include "operation.h"

namespace {

// Extents asked for at once: 28 KiB of memory.
constexpr uint32_t kBatch = 512;

// One answer of FIEMAP, whose array has no fixed length.
struct FiemapBatch {
  alignas(struct fiemap) char bytes[sizeof(struct fiemap) + kBatch * sizeof(struct fiemap_extent)];
  struct fiemap* get() { return reinterpret_cast<struct fiemap*>(bytes); }
};

// Names of src/errors.ts, most telling first.
const char* RefusedFlag(uint32_t flags) {
  if (flags & FIEMAP_EXTENT_SHARED) return "SHARED";
  if (flags & FIEMAP_EXTENT_DATA_INLINE) return "INLINE";
  if (flags & (FIEMAP_EXTENT_ENCODED | FIEMAP_EXTENT_DATA_ENCRYPTED)) return "ENCODED";
  if (flags & FIEMAP_EXTENT_DELALLOC) return "DELALLOC";
  if (flags & FIEMAP_EXTENT_UNKNOWN) return "UNKNOWN_PLACE";
  if (flags & (FIEMAP_EXTENT_NOT_ALIGNED | FIEMAP_EXTENT_DATA_TAIL)) return "NOT_ALIGNED";
  return nullptr;
}

// Only file systems whose fully allocated blocks stay where they are while the file is pinned,
// and that lie on the device that stat() names: others copy on write, move blocks, or have none.
const char* RefusedFileSystem(const struct statfs& fs) {
  switch (static_cast<unsigned long>(fs.f_type)) {
    case EXT4_SUPER_MAGIC:
    case XFS_SUPER_MAGIC:
      return nullptr;
    case BTRFS_SUPER_MAGIC:
      return "BTRFS";
    default:
      return "FILE_SYSTEM";
  }
}

Outcome<Nothing> ReadExtents(PreparedStore& store) {
  FiemapBatch batch;
  uint64_t position = 0;
  while (position < store.size_bytes) {
    struct fiemap* map = batch.get();
    *map = {};
    map->fm_start = position;
    map->fm_length = store.size_bytes - position;
    map->fm_flags = FIEMAP_FLAG_SYNC;
    map->fm_extent_count = kBatch;
    if (int error = Ioctl(store.fd.get(), FS_IOC_FIEMAP, map)) {
      return Failure{.error = error, .call = "fiemap"};
    }
    if (map->fm_mapped_extents == 0) return Failure::Refused("HOLES");
    for (uint32_t i = 0; i < map->fm_mapped_extents && position < store.size_bytes; i++) {
      const struct fiemap_extent& extent = map->fm_extents[i];
      if (const char* refusal = RefusedFlag(extent.fe_flags)) return Failure::Refused(refusal);
      if (extent.fe_logical > position) return Failure::Refused("HOLES");
      uint64_t skip = position - extent.fe_logical;
      if (extent.fe_length <= skip) continue;
      uint64_t length = std::min<uint64_t>(extent.fe_length - skip, store.size_bytes - position);
      uint64_t offset = extent.fe_physical + skip;
      position += length;
      if (!store.extents.empty() &&
          store.extents.back().offset + store.extents.back().length == offset) {
        store.extents.back().length += length;
        continue;
      }
      if (store.extents.size() == STILLBLOCK_MAX_EXTENTS) return Failure::Refused("FRAGMENTED");
      store.extents.push_back({offset, length});
    }
  }
  return Nothing();
}

// On XFS, extents of a realtime file are offsets into another device than that of stat().
Outcome<Nothing> RefuseRealtime(int fd) {
  struct fsxattr attributes = {};
  if (ioctl(fd, FS_IOC_FSGETXATTR, &attributes) != 0) {
    return errno == ENOTTY ? Outcome<Nothing>(Nothing()) : Failure::Last("fsgetxattr");
  }
  if (attributes.fsx_xflags & FS_XFLAG_REALTIME) return Failure::Refused("REALTIME");
  return Nothing();
}

Outcome<Nothing> Allocate(const PreparedStore& store) {
  int result;
  do {
    result = fallocate(store.fd.get(), 0, 0, static_cast<off_t>(store.size_bytes));
  } while (result != 0 && errno == EINTR);
  // Pinned by the module, to which it lies allocated; extents will tell if not.
  if (result != 0 && errno != ETXTBSY) return Failure::Last("fallocate");
  // Extents are committed, so that their blocks are nobody else's after a crash either.
  if (fsync(store.fd.get()) != 0) return Failure::Last("fsync");
  return Nothing();
}

using Store = std::shared_ptr<PreparedStore>;

// A device is used as a whole. Whether somebody else uses it the module finds out.
Outcome<Store> PrepareDevice(UniqueFd fd, const struct stat& status) {
  auto store = std::make_shared<PreparedStore>();
  if (int error = Ioctl(fd.get(), BLKGETSIZE64, &store->size_bytes)) {
    return Failure{.error = error, .call = "blkgetsize64"};
  }
  store->is_device = true;
  store->fd = std::move(fd);
  store->major = major(status.st_rdev);
  store->minor = minor(status.st_rdev);
  return store;
}

// @size 0 means all of the file; a file of ours (@fresh) is made as long as @size.
Outcome<Store> Prepare(UniqueFd fd, uint64_t size, bool fresh) {
  struct stat status;
  struct statfs fs;
  if (fstat(fd.get(), &status) != 0) return Failure::Last("fstat");
  if (S_ISBLK(status.st_mode)) return PrepareDevice(std::move(fd), status);
  if (!S_ISREG(status.st_mode)) return Failure::Refused("NOT_FILE");
  if (fstatfs(fd.get(), &fs) != 0) return Failure::Last("fstatfs");
  if (const char* refusal = RefusedFileSystem(fs)) return Failure::Refused(refusal);
  auto store = std::make_shared<PreparedStore>();
  store->size_bytes = size ? size : static_cast<uint64_t>(status.st_size);
  if (store->size_bytes == 0) return Failure::Refused("TOO_SMALL");
  if (!fresh && static_cast<uint64_t>(status.st_size) < store->size_bytes) {
    return Failure::Refused("TOO_SMALL");
  }
  store->fd = std::move(fd);
  store->major = major(status.st_dev);
  store->minor = minor(status.st_dev);
  Outcome<Nothing> step = RefuseRealtime(store->fd.get());
  if (std::holds_alternative<Nothing>(step)) step = Allocate(*store);
  if (std::holds_alternative<Nothing>(step)) step = ReadExtents(*store);
  if (Failure* failure = std::get_if<Failure>(&step)) return *failure;
  return store;
}

// The file never has a name, so that nothing is left behind however this process ends.
Outcome<Store> CreateIn(const std::string& folder, uint64_t size) {
  UniqueFd fd(open(folder.c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC, 0600));
  if (!fd.valid()) return Failure::Last("open");
  return Prepare(std::move(fd), size, true);
}

Outcome<Store> OpenExisting(const std::string& path, uint64_t size) {
  UniqueFd fd(open(path.c_str(), O_RDWR | O_CLOEXEC | O_NONBLOCK));
  if (!fd.valid()) return Failure::Last("open");
  return Prepare(std::move(fd), size, false);
}

Napi::Value Start(const Napi::CallbackInfo& info,
                  Outcome<Store> (*prepare)(const std::string&, uint64_t)) {
  Arguments arguments(info.Env());
  std::string path = arguments.Text(info[0], "path");
  uint64_t size = arguments.Count(info[1], "sizeBytes");
  if (!arguments.ok()) return {};
  return Operation<Store>::Start(
      info.Env(), "stillblock:prepareStore", [path, size, prepare] { return prepare(path, size); },
      [](Napi::Env env, Store& store) -> Napi::Value {
        auto external = Napi::External<Store>::New(env, &store);
        return env.GetInstanceData<AddonData>()->store_file.New({external});
      });
}

}  // namespace

Napi::Function StoreFile::Define(Napi::Env env) {
  return DefineClass(env, "StoreFile",
                     {InstanceAccessor<&StoreFile::SizeBytes>("sizeBytes"),
                      InstanceAccessor<&StoreFile::Major>("major"),
                      InstanceAccessor<&StoreFile::Minor>("minor"),
                      InstanceMethod<&StoreFile::Extents>("extents"),
                      InstanceMethod<&StoreFile::Close>("close")});
}

Napi::Value StoreFile::Create(const Napi::CallbackInfo& info) { return Start(info, CreateIn); }

Napi::Value StoreFile::Open(const Napi::CallbackInfo& info) { return Start(info, OpenExisting); }

std::shared_ptr<const PreparedStore> StoreFile::From(Napi::Value value) {
  Napi::Function constructor = value.Env().GetInstanceData<AddonData>()->store_file.Value();
  if (!value.IsObject() || !value.As<Napi::Object>().InstanceOf(constructor)) return nullptr;
  return Unwrap(value.As<Napi::Object>())->store_;
}

StoreFile::StoreFile(const Napi::CallbackInfo& info) : Napi::ObjectWrap<StoreFile>(info) {
  if (info[0].IsExternal()) store_ = *info[0].As<Napi::External<Store>>().Data();
}

Napi::Value StoreFile::SizeBytes(const Napi::CallbackInfo& info) {
  return Napi::Number::New(info.Env(), store_ ? static_cast<double>(store_->size_bytes) : 0);
}

Napi::Value StoreFile::Major(const Napi::CallbackInfo& info) {
  return Napi::Number::New(info.Env(), store_ ? store_->major : 0);
}

Napi::Value StoreFile::Minor(const Napi::CallbackInfo& info) {
  return Napi::Number::New(info.Env(), store_ ? store_->minor : 0);
}

Napi::Value StoreFile::Extents(const Napi::CallbackInfo& info) {
  size_t count = store_ ? store_->extents.size() : 0;
  Napi::Float64Array array = Napi::Float64Array::New(info.Env(), 2 * count);
  for (size_t i = 0; i < count; i++) {
    array[2 * i] = static_cast<double>(store_->extents[i].offset);
    array[2 * i + 1] = static_cast<double>(store_->extents[i].length);
  }
  return array;
}

// On the pool, since freeing the blocks of a large file takes its time.
Napi::Value StoreFile::Close(const Napi::CallbackInfo& info) {
  return Operation<Nothing>::Start(
      info.Env(), "stillblock:closeStore",
      [store = std::move(store_)]() mutable -> Outcome<Nothing> {
        store.reset();
        return Nothing();
      },
      Undefined);
}
