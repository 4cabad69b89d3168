// SPDX-License-Identifier: Apache-2.0
// What Node cannot ask about files: where their data is.
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
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

}  // namespace

void ExportFiles(Napi::Env env, Napi::Object exports) {
  exports.Set("dataRanges", Napi::Function::New(env, DataRanges, "dataRanges"));
}
