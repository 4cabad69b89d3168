// SPDX-License-Identifier: Apache-2.0
// The native transmission engine: takes over sockets after the handshake and serves exports that
// are a descriptor, on threads of its own. Separate from Node-API.
#ifndef STILLBLOCK_NATIVE_ENGINE_ENGINE_H_
#define STILLBLOCK_NATIVE_ENGINE_ENGINE_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "export.h"
#include "shared.h"
#include "worker.h"

namespace engine {

struct Options {
  Limits limits;
  // 0: as many as there are processors, within bounds.
  uint32_t workers = 0;
  bool allow_ring = true;
};

// All of it may be called from any one thread.
class Engine {
 public:
  // @events must outlive it, or at least Stop().
  Engine(const Options& options, Events* events);
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;
  ~Engine() { Stop(); }

  // Returns 0 or an errno.
  int Start();
  // Closes all connections, waits for reads in flight, ends all threads.
  void Stop();

  // Serves a connection from here on; Events::Closed() says when it has ended. @received are the
  // bytes that the peer has sent already. Returns its id.
  uint64_t Adopt(std::unique_ptr<Transport> transport, std::shared_ptr<Export> served,
                 Headers headers, std::vector<uint32_t> context_ids,
                 std::vector<uint8_t> received);
  // Answers what is in flight, then closes; by force after Limits::drain_ms.
  void Drain(uint64_t id) { WorkerOf(id).Drain(id); }
  void Destroy(uint64_t id) { WorkerOf(id).Destroy(id); }
  // Data in flight over all connections.
  uint64_t BytesInFlight() const { return shared_.budget.used(); }

 private:
  static constexpr uint32_t kMostWorkers = 8;

  Worker& WorkerOf(uint64_t id) { return *workers_[id % workers_.size()]; }

  Shared shared_;
  std::vector<std::unique_ptr<Worker>> workers_;
  uint64_t next_ = 1;
};

}  // namespace engine

#endif  // STILLBLOCK_NATIVE_ENGINE_ENGINE_H_
