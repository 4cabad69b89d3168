// SPDX-License-Identifier: Apache-2.0
// Pieces of difference storage as the module's requests name them.
#ifndef STILLBLOCK_NATIVE_STORE_PIECES_H_
#define STILLBLOCK_NATIVE_STORE_PIECES_H_

#include <memory>

#include "arguments.h"
#include "store_file.h"

// A file or device, or memory of a limit.
struct StorePiece {
  std::shared_ptr<const PreparedStore> file;
  uint64_t memory_bytes = 0;

  static StorePiece From(Arguments& arguments, Napi::Value value, const char* name) {
    StorePiece piece;
    if (value.IsNumber()) {
      piece.memory_bytes = arguments.Count(value, name);
    } else if (!(piece.file = StoreFile::From(value))) {
      arguments.Refuse(name);
    }
    return piece;
  }

  // Points into this piece.
  struct stillblock_store ToRequest() const {
    struct stillblock_store store = {};
    if (file && file->is_device) {
      store.kind = STILLBLOCK_STORE_DEVICE;
      store.file_fd = file->fd.get();
    } else if (file) {
      store.kind = STILLBLOCK_STORE_FILE;
      store.file_fd = file->fd.get();
      store.extents = reinterpret_cast<uintptr_t>(file->extents.data());
      store.nr_extents = static_cast<uint32_t>(file->extents.size());
    } else {
      store.kind = STILLBLOCK_STORE_MEMORY;
      store.file_fd = -1;
      store.limit = memory_bytes;
    }
    return store;
  }
};

#endif  // STILLBLOCK_NATIVE_STORE_PIECES_H_
