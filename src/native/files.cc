// SPDX-License-Identifier: Apache-2.0
// What Node cannot ask about files: where their data is, to forget what is cached of them, and
// to let others' I/O go first.
#include <dirent.h>
#include <fcntl.h>
#include <linux/ioprio.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <vector>

#include "addon.h"
#include "arguments.h"
#include "operation.h"
#include "unique_fd.h"

namespace {

// Offset and length of each range, one after the other, as in a Float64Array.
using Ranges = std::vector<double>;

Outcome<Ranges> FindData(int fd, uint64_t size) {
  Ranges ranges;
  off_t position = 0;
  off_t end = static_cast<off_t>(size);
  while (position < end) {
    off_t data = lseek(fd, position, SEEK_DATA);
    if (data < 0) {
      // Nothing but a hole from here to the end.
      if (errno == ENXIO) break;
      // A file system or device that does not know of holes: all of it is data.
      if (errno == EINVAL || errno == EOPNOTSUPP) return Ranges{0, static_cast<double>(size)};
      return Failure::Last("lseek");
    }
    if (data >= end) break;
    off_t hole = lseek(fd, data, SEEK_HOLE);
    if (hole < 0 && errno != ENXIO) return Failure::Last("lseek");
    // An answer that makes no sense, as from devices that ignore lseek(): the rest is data.
    if (data < position || hole <= data) {
      data = position;
      hole = end;
    }
    if (hole > end) hole = end;
    ranges.push_back(static_cast<double>(data));
    ranges.push_back(static_cast<double>(hole - data));
    position = hole;
  }
  return ranges;
}

Napi::Value ToFloat64Array(Napi::Env env, Ranges& ranges) {
  Napi::Float64Array array = Napi::Float64Array::New(env, ranges.size());
  std::copy(ranges.begin(), ranges.end(), array.Data());
  return array;
}

// dataRanges(fd, sizeBytes): Promise<Float64Array>
Napi::Value DataRanges(const Napi::CallbackInfo& info) {
  Arguments arguments(info.Env());
  int given = arguments.Descriptor(info[0], "fd");
  uint64_t size = arguments.Count(info[1], "sizeBytes");
  if (!arguments.ok()) return {};
  // Our own reference to the file, in case that the caller closes his.
  auto fd = std::make_shared<UniqueFd>(fcntl(given, F_DUPFD_CLOEXEC, 0));
  if (!fd->valid()) {
    Failure::Last("fcntl").ToError(info.Env()).ThrowAsJavaScriptException();
    return {};
  }
  return Operation<Ranges>::Start(
      info.Env(), "stillblock:dataRanges", [fd, size] { return FindData(fd->get(), size); },
      ToFloat64Array);
}

// The page cache lets go of what nobody else uses or has changed in these ranges.
Outcome<bool> Forget(int fd, const Ranges& ranges) {
  for (size_t index = 0; index + 1 < ranges.size(); index += 2) {
    int error = posix_fadvise(fd, static_cast<off_t>(ranges[index]),
                              static_cast<off_t>(ranges[index + 1]), POSIX_FADV_DONTNEED);
    if (error != 0) {
      errno = error;
      return Failure::Last("posix_fadvise");
    }
  }
  return true;
}

// forgetCached(fd, ranges: Float64Array): Promise<void>
Napi::Value ForgetCached(const Napi::CallbackInfo& info) {
  Arguments arguments(info.Env());
  int given = arguments.Descriptor(info[0], "fd");
  if (!arguments.ok()) return {};
  if (!info[1].IsTypedArray() ||
      info[1].As<Napi::TypedArray>().TypedArrayType() != napi_float64_array) {
    Napi::TypeError::New(info.Env(), "ranges is no Float64Array").ThrowAsJavaScriptException();
    return {};
  }
  Napi::Float64Array array = info[1].As<Napi::Float64Array>();
  Ranges ranges(array.Data(), array.Data() + array.ElementLength());
  auto fd = std::make_shared<UniqueFd>(fcntl(given, F_DUPFD_CLOEXEC, 0));
  if (!fd->valid()) {
    Failure::Last("fcntl").ToError(info.Env()).ThrowAsJavaScriptException();
    return {};
  }
  return Operation<bool>::Start(
      info.Env(), "stillblock:forgetCached",
      [fd, ranges = std::move(ranges)] { return Forget(fd->get(), ranges); },
      [](Napi::Env env, bool&) { return env.Undefined(); });
}

// yieldIo(): the I/O of all threads of this process waits for everybody else's, also of those
// that are started later.
Napi::Value YieldIo(const Napi::CallbackInfo& info) {
  // A priority belongs to a thread, and to those that it starts from then on.
  DIR* tasks = opendir("/proc/self/task");
  if (tasks == nullptr) {
    Failure::Last("opendir").ToError(info.Env()).ThrowAsJavaScriptException();
    return {};
  }
  bool failed = false;
  while (dirent* entry = readdir(tasks)) {
    int thread = std::atoi(entry->d_name);
    if (thread > 0 &&
        syscall(SYS_ioprio_set, IOPRIO_WHO_PROCESS, thread,
                IOPRIO_PRIO_VALUE(IOPRIO_CLASS_IDLE, 0)) != 0 &&
        errno != ESRCH) {
      failed = true;
      break;
    }
  }
  if (failed) Failure::Last("ioprio_set").ToError(info.Env()).ThrowAsJavaScriptException();
  closedir(tasks);
  return info.Env().Undefined();
}

}  // namespace

void ExportFiles(Napi::Env env, Napi::Object exports) {
  exports.Set("forgetCached", Napi::Function::New(env, ForgetCached, "forgetCached"));
  exports.Set("yieldIo", Napi::Function::New(env, YieldIo, "yieldIo"));
  exports.Set("dataRanges", Napi::Function::New(env, DataRanges, "dataRanges"));
}
