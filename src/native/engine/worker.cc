// SPDX-License-Identifier: Apache-2.0
#include "worker.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>

#include "clock.h"

namespace engine {

namespace {

constexpr int kEvents = 64;
// Idle pipes that are kept.
constexpr size_t kPipes = 4;
// How long a reply's successor is waited for without sleeping, and how recent a connection's last
// request must be for that.
constexpr int64_t kSpinNs = 50'000;
// How long other sockets are not looked at for that.
constexpr int64_t kUnseenNs = 100'000;
constexpr int kMostCredit = 16;

// What an epoll event is about, if it is no connection.
int wake_tag;
int timer_tag;
int ring_tag;

bool AddTo(int epoll, int fd, uint32_t events, void* tag) {
  struct epoll_event event = {};
  event.events = events;
  event.data.ptr = tag;
  return epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event) == 0;
}

void Clear(int fd) {
  uint64_t count;
  (void)!read(fd, &count, sizeof(count));
}

}  // namespace

Worker::Worker(Shared* shared, uint32_t index)
    : shared_(shared),
      index_(index),
      buffers_(shared->limits.idle_buffer_bytes / shared->workers),
      receive_buffer_(new uint8_t[kReceiveRoom + kReceiveBytes]) {}

Worker::~Worker() { Stop(); }

int Worker::Start() {
  epoll_ = UniqueFd(epoll_create1(EPOLL_CLOEXEC));
  wake_ = UniqueFd(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  timer_ = UniqueFd(timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK));
  if (!epoll_.valid() || !wake_.valid() || !timer_.valid()) return errno;
  if (!AddTo(epoll_.get(), wake_.get(), EPOLLIN, &wake_tag) ||
      !AddTo(epoll_.get(), timer_.get(), EPOLLIN, &timer_tag)) {
    return errno;
  }
  if (shared_->allow_ring && ring_.Open() &&
      !AddTo(epoll_.get(), ring_.fd(), EPOLLIN, &ring_tag)) {
    return errno;
  }
  return thread_.Start<Worker, &Worker::Loop>(this);
}

void Worker::Stop() {
  stopping_.store(true);
  if (wake_.valid()) Wake();
  thread_.Join();
}

// ---- from any thread

void Worker::Wake() {
  if (woken_.exchange(true)) return;
  uint64_t one = 1;
  (void)!write(wake_.get(), &one, sizeof(one));
}

void Worker::Post(Order order) {
  {
    std::lock_guard<std::mutex> guard(lock_);
    orders_.push_back(std::move(order));
  }
  Wake();
}

void Worker::Adopt(uint64_t id, std::unique_ptr<Transport> transport, Service service,
                   std::vector<uint8_t> received) {
  load_.fetch_add(1, std::memory_order_relaxed);
  Order order;
  order.kind = Order::Kind::kAdopt;
  order.id = id;
  order.transport = std::move(transport);
  order.service = std::move(service);
  order.received = std::move(received);
  Post(std::move(order));
}

void Worker::Drain(uint64_t id) {
  Order order;
  order.kind = Order::Kind::kDrain;
  order.id = id;
  Post(std::move(order));
}

void Worker::Destroy(uint64_t id) {
  Order order;
  order.kind = Order::Kind::kDestroy;
  order.id = id;
  Post(std::move(order));
}

// ---- the loop

void Worker::Loop() {
  // Naps of the length they are meant to have; the default is 50 us more.
  (void)prctl(PR_SET_TIMERSLACK, 1000UL, 0UL, 0UL, 0UL);
  bool ending = false;
  while (!ending || !connections_.empty()) {
    WaitForEvents();
    if (woken_.load()) {
      woken_.store(false);
      TakeOrders();
      for (Connection* connection : std::exchange(budget_waiters_, {})) Enqueue(connection);
    }
    if (ring_.valid()) TakeReads();
    RunTimers();
    RunConnections();
    if (ring_.valid()) ring_.Submit();
    if (!ending && stopping_.load()) {
      ending = true;
      TakeOrders();
      std::vector<Connection*> all;
      for (auto& [id, connection] : connections_) all.push_back(connection.get());
      for (Connection* connection : all) connection->Destroy(nullptr, false);
    }
    Reap();
    SetTimer();
  }
}

bool Worker::SpinsNow() {
  Connection* last = last_active_;
  bool wanted = last != nullptr && run_.empty() && spin_credit_ > 0 && last->waits_for_one();
  if (wanted != counted_active_) {
    counted_active_ = wanted;
    shared_->active.fetch_add(wanted ? 1 : -1);
  }
  return wanted && shared_->active.load(std::memory_order_relaxed) <= shared_->cores;
}

// Asks for the next request of the connection that asked last, without sleeping. Returns whether
// it has come.
bool Worker::Spin() {
  const int64_t began = NowNs();
  Connection* connection = last_active_;
  bool came = false;
  do {
    came = connection->ReceiveNow();
    if (!came) sched_yield();
  } while (!came && !woken_.load(std::memory_order_relaxed) && NowNs() - began < kSpinNs);
  // What comes later came while others had the processor: there is none to spare.
  const bool in_time = came && NowNs() - began < kSpinNs;
  spin_credit_ = std::min(spin_credit_ + (in_time ? 1 : -4), kMostCredit);
  if (came && !connection->closed()) Enqueue(connection);
  return came;
}

// Lets requests of the connection that asked last gather, if that pays. Returns whether there is
// something to do.
bool Worker::LetGather() {
  Connection* last = last_active_;
  if (last == nullptr || !run_.empty() || !last->waits() || ring_.pending()) return false;
  const int64_t nap_ns = last->gather().NapNs(NowNs());
  if (nap_ns == 0) return false;
  const struct timespec nap = {0, nap_ns};
  (void)clock_nanosleep(CLOCK_MONOTONIC, 0, &nap, nullptr);
  const bool found = Look(0);
  // Or others would wait for naps that bring nothing.
  if (!last->readable()) last->gather().OnBurst(0, looked_ns_);
  return found;
}

// Waits until there is something to do.
void Worker::WaitForEvents() {
  if (LetGather()) return;
  bool spins = SpinsNow();
  // All others are looked at meanwhile.
  if (spins && NowNs() - looked_ns_ > kUnseenNs) {
    if (Look(0)) return;
    spins = SpinsNow();
  }
  if (spins && Spin()) return;
  if (!run_.empty() || ring_.pending()) {
    Look(0);
    return;
  }
  const int64_t began = NowNs();
  Look(-1);
  // It would have been worth it.
  if (looked_ns_ - began < kSpinNs) spin_credit_ = std::min(spin_credit_ + 1, kMostCredit);
}

// Tells connections what their sockets are ready for. Returns whether there was anything.
bool Worker::Look(int timeout_ms) {
  struct epoll_event events[kEvents];
  int count = epoll_wait(epoll_.get(), events, kEvents, timeout_ms);
  looked_ns_ = NowNs();
  for (int i = 0; i < count; i++) {
    void* tag = events[i].data.ptr;
    const uint32_t ready = events[i].events;
    if (tag == &ring_tag) continue;
    if (tag == &wake_tag) {
      // Whether or not woken_ is still set: who sets it may write long after we have seen it.
      Clear(wake_.get());
      continue;
    }
    if (tag == &timer_tag) {
      Clear(timer_.get());
      timer_at_ns_ = 0;
      continue;
    }
    auto* connection = static_cast<Connection*>(tag);
    connection->OnReady(ready);
    if (connection->closed()) continue;
    Enqueue(connection);
    if (ready & EPOLLIN) last_active_ = connection;
  }
  return count > 0;
}

void Worker::TakeOrders() {
  std::vector<Order> orders;
  {
    std::lock_guard<std::mutex> guard(lock_);
    orders.swap(orders_);
  }
  for (Order& order : orders) Carry(std::move(order));
}

void Worker::Carry(Order order) {
  if (order.kind == Order::Kind::kRead) {
    Finish(std::move(order.read));
    return;
  }
  if (order.kind == Order::Kind::kAdopt) {
    auto connection = std::make_unique<Connection>(order.id, this, std::move(order.transport),
                                                   std::move(order.service),
                                                   std::move(order.received));
    Connection* added = connection.get();
    connections_.emplace(order.id, std::move(connection));
    if (!AddTo(epoll_.get(), added->fd(), EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET, added)) {
      added->Destroy("the socket cannot be waited for", false);
    }
    Enqueue(added);
    return;
  }
  auto found = connections_.find(order.id);
  if (found == connections_.end()) return;
  Connection* connection = found->second.get();
  if (order.kind == Order::Kind::kDestroy) {
    connection->Destroy(nullptr, false);
  } else {
    connection->Drain();
    SetDeadline(connection);
  }
  Enqueue(connection);
}

void Worker::Enqueue(Connection* connection) {
  if (connection->queued) return;
  connection->queued = true;
  run_.push_back(connection);
}

void Worker::RunConnections() {
  // Those that are queued meanwhile have their turn after the sockets were looked at again.
  for (size_t turns = run_.size(); turns > 0; turns--) {
    Connection* connection = run_.front();
    run_.pop_front();
    connection->queued = false;
    if (connection->Run()) Enqueue(connection);
  }
}

void Worker::OnClosed(Connection* connection, const char* reason, bool peers_fault) {
  connection->reason = reason;
  connection->peers_fault = peers_fault;
  (void)epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, connection->fd(), nullptr);
  std::erase(budget_waiters_, connection);
  std::erase_if(deadlines_, [connection](auto& entry) { return entry.second == connection; });
  if (last_active_ == connection) last_active_ = nullptr;
  closed_.push_back(connection);
}

// Lets go of connections that are closed and whose reads have come back.
void Worker::Reap() {
  std::erase_if(closed_, [this](Connection* connection) {
    if (!connection->Idle()) return false;
    std::erase(run_, connection);
    const std::shared_ptr<Export> served = connection->served();
    served->totals.Add(connection->tally());
    if (served->users.fetch_sub(1) == 1 && served->forgets()) Forget(served, served->TakeRead());
    const uint64_t id = connection->id();
    const char* reason = connection->reason;
    const bool peers_fault = connection->peers_fault;
    connections_.erase(id);
    load_.fetch_sub(1, std::memory_order_relaxed);
    shared_->events->Closed(id, reason, peers_fault);
    return true;
  });
  if (connections_.empty()) caps_.clear();
}

// ---- reads that take time

int Worker::ReadAll(ColdRead& read) {
  while (read.left > 0) {
    ssize_t got = pread(read.fd, read.at, read.left, static_cast<off_t>(read.offset));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return errno;
    // The source ends before its size.
    if (got == 0) return EIO;
    read.Took(static_cast<uint32_t>(got));
  }
  return 0;
}

void Worker::Read(Connection* connection, uint8_t* at, uint64_t offset, uint32_t bytes, Task task) {
  auto read = std::make_unique<ColdRead>(ColdRead{.connection = connection,
                                                  .fd = connection->served()->fd(),
                                                  .at = at,
                                                  .offset = offset,
                                                  .left = bytes,
                                                  .task = std::move(task)});
  if (ring_.valid()) {
    ReadByRing(std::move(read));
  } else {
    ReadByPool(std::move(read));
  }
}

void Worker::ReadByRing(std::unique_ptr<ColdRead> read) {
  if (ring_.Read(read->fd, read->at, read->left, read->offset, read.get())) {
    // The kernel has it now, and TakeReads() takes it back.
    (void)read.release();
  } else {
    ReadByPool(std::move(read));
  }
}

void Worker::TakeReads() {
  void* tag;
  int result;
  while (ring_.Take(&tag, &result)) {
    std::unique_ptr<ColdRead> read(static_cast<ColdRead*>(tag));
    if (result == -EAGAIN || result == -EOPNOTSUPP) {
      // What the ring cannot do a thread can.
      ReadByPool(std::move(read));
    } else if (result == -EINTR) {
      ReadByRing(std::move(read));
    } else if (result > 0 && static_cast<uint32_t>(result) < read->left) {
      read->Took(static_cast<uint32_t>(result));
      ReadByRing(std::move(read));
    } else {
      // The source ends before its size.
      read->task.read_errno = result < 0 ? -result : result == 0 ? EIO : 0;
      Finish(std::move(read));
    }
  }
}

void Worker::ReadByPool(std::unique_ptr<ColdRead> read) {
  // A std::function can be copied, and so must what it holds.
  auto shared = std::make_shared<std::unique_ptr<ColdRead>>(std::move(read));
  auto work = [this, shared] {
    std::unique_ptr<ColdRead> mine = std::move(*shared);
    mine->task.read_errno = ReadAll(*mine);
    Order order;
    order.kind = Order::Kind::kRead;
    order.read = std::move(mine);
    Post(std::move(order));
  };
  if (shared_->pool.Submit(work)) return;
  (*shared)->task.read_errno = ENOMEM;
  Order order;
  order.kind = Order::Kind::kRead;
  order.read = std::move(*shared);
  Post(std::move(order));
}

void Worker::Finish(std::unique_ptr<ColdRead> read) {
  Connection* connection = read->connection;
  connection->OnRead(std::move(read->task));
  if (!connection->closed()) Enqueue(connection);
}

void Worker::Forget(std::shared_ptr<Export> served, std::vector<Range> ranges) {
  if (ranges.empty()) return;
  (void)shared_->pool.Submit(
      [served = std::move(served), ranges = std::move(ranges)] { served->Forget(ranges); });
}

// ---- what connections wait for

bool Worker::TryPass(const CapSpec& cap, uint64_t bytes) {
  auto [found, added] = caps_.try_emplace(cap.paid_until_ns);
  CapQueue& queue = found->second;
  if (added) queue.turn = CapTurn(cap.paid_until_ns, cap.bytes_per_second);
  return queue.waiters.empty() && queue.turn.TryTake(bytes);
}

void Worker::WaitForCap(const CapSpec& cap, Connection* connection, Task task) {
  CapQueue& queue = caps_[cap.paid_until_ns];
  queue.waiters.push_back({connection, std::move(task)});
  // Only the first has its bytes reserved.
  if (queue.waiters.size() == 1) queue.due_ns = queue.turn.Reserve(queue.waiters[0].task.piece_bytes);
}

uint64_t Worker::LeaveCaps(Connection* connection) {
  uint64_t budget = 0;
  for (auto& [key, queue] : caps_) {
    if (queue.waiters.empty()) continue;
    bool first = queue.waiters.front().connection == connection;
    // Or who asks and leaves, again and again, would have all the turns.
    if (first) queue.turn.GiveBack(queue.waiters.front().task.piece_bytes);
    std::erase_if(queue.waiters, [&](const CapWaiter& waiter) {
      if (waiter.connection != connection) return false;
      budget += waiter.task.budget;
      return true;
    });
    if (first && !queue.waiters.empty()) {
      queue.due_ns = queue.turn.Reserve(queue.waiters.front().task.piece_bytes);
    }
  }
  return budget;
}

// Lets those pass whose time has come.
void Worker::ServeCap(CapQueue& queue, int64_t now) {
  while (!queue.waiters.empty() && queue.due_ns <= now) {
    queue.turn.Came(queue.due_ns);
    CapWaiter waiter = std::move(queue.waiters.front());
    queue.waiters.pop_front();
    waiter.connection->OnPaced(std::move(waiter.task));
    Enqueue(waiter.connection);
    if (!queue.waiters.empty()) {
      queue.due_ns = queue.turn.Reserve(queue.waiters.front().task.piece_bytes);
    }
  }
}

void Worker::WaitForBudget(Connection* connection) {
  if (std::find(budget_waiters_.begin(), budget_waiters_.end(), connection) ==
      budget_waiters_.end()) {
    budget_waiters_.push_back(connection);
  }
  shared_->budget.waiting.fetch_or(uint64_t{1} << index_);
}

void Worker::SetDeadline(Connection* connection) {
  if (connection->closed()) return;
  std::erase_if(deadlines_, [connection](auto& entry) { return entry.second == connection; });
  deadlines_.emplace(NowNs() + int64_t{shared_->limits.drain_ms} * 1'000'000, connection);
}

void Worker::RunTimers() {
  bool waiting = std::any_of(caps_.begin(), caps_.end(),
                             [](auto& entry) { return !entry.second.waiters.empty(); });
  if (deadlines_.empty() && !waiting) return;
  const int64_t now = NowNs();
  while (!deadlines_.empty() && deadlines_.begin()->first <= now) {
    deadlines_.begin()->second->Destroy("client does not fetch its replies", true);
  }
  for (auto& [key, queue] : caps_) ServeCap(queue, now);
}

void Worker::SetTimer() {
  int64_t at = deadlines_.empty() ? 0 : deadlines_.begin()->first;
  for (auto& [key, queue] : caps_) {
    if (!queue.waiters.empty() && (at == 0 || queue.due_ns < at)) at = queue.due_ns;
  }
  if (at == timer_at_ns_) return;
  timer_at_ns_ = at;
  struct itimerspec when = {};
  when.it_value.tv_sec = at / 1'000'000'000;
  when.it_value.tv_nsec = at % 1'000'000'000;
  (void)timerfd_settime(timer_.get(), TFD_TIMER_ABSTIME, &when, nullptr);
}

std::unique_ptr<Pipe> Worker::TakePipe() {
  if (!pipes_.empty()) {
    std::unique_ptr<Pipe> pipe = std::move(pipes_.back());
    pipes_.pop_back();
    return pipe;
  }
  if (no_pipes_) return nullptr;
  int fds[2];
  if (pipe2(fds, O_CLOEXEC | O_NONBLOCK) != 0) return nullptr;
  auto pipe = std::make_unique<Pipe>(Pipe{UniqueFd(fds[0]), UniqueFd(fds[1])});
  if (fcntl(fds[1], F_SETPIPE_SZ, kPipeBytes) < static_cast<int>(kPipeBytes)) {
    // A user has a limit for all his pipes together. Buffers will do.
    no_pipes_ = errno == EPERM;
    return nullptr;
  }
  return pipe;
}

void Worker::GivePipe(std::unique_ptr<Pipe> pipe) {
  if (pipes_.size() < kPipes) pipes_.push_back(std::move(pipe));
}

}  // namespace engine
