// SPDX-License-Identifier: Apache-2.0
// A thread that serves any number of connections: readiness by epoll, turns of bounded length,
// nothing that blocks.
#ifndef STILLBLOCK_NATIVE_ENGINE_WORKER_H_
#define STILLBLOCK_NATIVE_ENGINE_WORKER_H_

#include <atomic>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <set>
#include <unordered_map>
#include <utility>
#include <vector>

#include "bandwidth.h"
#include "buffers.h"
#include "connection.h"
#include "ring.h"
#include "shared.h"
#include "thread.h"

namespace engine {

// A read that has to wait for a device.
struct ColdRead {
  Connection* connection;
  int fd;
  uint8_t* at;
  uint64_t offset;
  uint32_t left;
  Task task;

  void Took(uint32_t bytes) {
    at += bytes;
    offset += bytes;
    left -= bytes;
  }
};

class Worker {
 public:
  Worker(Shared* shared, uint32_t index);
  Worker(const Worker&) = delete;
  Worker& operator=(const Worker&) = delete;
  ~Worker();

  // Returns 0 or an errno.
  int Start();
  // Closes all connections and ends the thread.
  void Stop();

  // From any thread. What it tells of connections that are gone is ignored.
  void Adopt(uint64_t id, std::unique_ptr<Transport> transport, Service service,
             std::vector<uint8_t> received);
  void Drain(uint64_t id);
  void Destroy(uint64_t id);
  void Wake();
  uint32_t load() const { return load_.load(std::memory_order_relaxed); }

  // For its connections, on its thread.
  Shared& shared() { return *shared_; }
  BufferPool& buffers() { return buffers_; }
  uint8_t* receive_buffer() { return receive_buffer_.get(); }
  static constexpr size_t kReceiveBytes = 64 * 1024;
  // In front of what is received there is room for what was left of the last receive.
  static constexpr size_t kReceiveRoom = 4 * 1024;
  // A pipe takes a page per slot, and unprivileged users get no more slots than this.
  static constexpr size_t kPipeBytes = 1 << 20;

  void Enqueue(Connection* connection);
  void Read(Connection* connection, uint8_t* at, uint64_t offset, uint32_t bytes, Task task);
  bool TryPass(const CapSpec& cap, uint64_t bytes);
  void WaitForCap(const CapSpec& cap, Connection* connection, Task task);
  // Returns the budget that its tasks held there.
  uint64_t LeaveCaps(Connection* connection);
  void WaitForBudget(Connection* connection);
  // Closes it by force if it is still there after Limits::drain_ms.
  void SetDeadline(Connection* connection);
  void Forget(std::shared_ptr<Export> served, std::vector<Range> ranges);
  std::unique_ptr<Pipe> TakePipe();
  void GivePipe(std::unique_ptr<Pipe> pipe);
  void OnClosed(Connection* connection, const char* reason, bool peers_fault);

 private:
  struct Order {
    enum class Kind : uint8_t { kAdopt, kDrain, kDestroy, kRead } kind;
    uint64_t id = 0;
    std::unique_ptr<Transport> transport;
    Service service;
    std::vector<uint8_t> received;
    std::unique_ptr<ColdRead> read;
  };
  struct CapWaiter {
    Connection* connection;
    Task task;
  };
  struct CapQueue {
    CapTurn turn;
    std::deque<CapWaiter> waiters;
    int64_t due_ns = 0;
  };

  void Loop();
  void WaitForEvents();
  bool Look(int timeout_ms);
  bool LetGather();
  bool SpinsNow();
  bool Spin();
  void Post(Order order);
  void TakeOrders();
  void Carry(Order order);
  void Finish(std::unique_ptr<ColdRead> read);
  void RunConnections();
  void RunTimers();
  void SetTimer();
  void ServeCap(CapQueue& queue, int64_t now);
  void ReadByRing(std::unique_ptr<ColdRead> read);
  void ReadByPool(std::unique_ptr<ColdRead> read);
  void TakeReads();
  void Reap();
  static int ReadAll(ColdRead& read);

  Shared* const shared_;
  const uint32_t index_;
  UniqueFd epoll_;
  UniqueFd wake_;
  UniqueFd timer_;
  Ring ring_;
  Thread thread_;
  std::atomic<uint32_t> load_ = 0;
  std::atomic<bool> stopping_ = false;
  std::atomic<bool> woken_ = false;

  std::mutex lock_;
  // Protected by lock_.
  std::vector<Order> orders_;

  BufferPool buffers_;
  std::unique_ptr<uint8_t[]> receive_buffer_;
  std::unordered_map<uint64_t, std::unique_ptr<Connection>> connections_;
  std::deque<Connection*> run_;
  // Closed, and waiting for their reads to come back.
  std::vector<Connection*> closed_;
  std::vector<Connection*> budget_waiters_;
  std::set<std::pair<int64_t, Connection*>> deadlines_;
  std::unordered_map<const int64_t*, CapQueue> caps_;
  int64_t timer_at_ns_ = 0;
  std::vector<std::unique_ptr<Pipe>> pipes_;
  bool no_pipes_ = false;
  // Spinning: the connection that asked last, and how well it went.
  Connection* last_active_ = nullptr;
  int spin_credit_ = 0;
  // When epoll was last asked.
  int64_t looked_ns_ = 0;
  bool counted_active_ = false;
};

}  // namespace engine

#endif  // STILLBLOCK_NATIVE_ENGINE_WORKER_H_
