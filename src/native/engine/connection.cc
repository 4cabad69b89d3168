// SPDX-License-Identifier: Apache-2.0
#include "connection.h"

#include <errno.h>
#include <sys/epoll.h>
#include <sys/uio.h>

#include <algorithm>
#include <cstring>
#include <iterator>
#include <utility>

#include "clock.h"
#include "worker.h"

namespace engine {

namespace {

// Shorter holes are read like data: a chunk of their own would cost more.
constexpr uint64_t kShortestHoleBytes = 65536;
// Reads up to this length are gathered in one buffer with their headers.
constexpr uint32_t kSmallBytes = 32 * 1024;
// That buffer.
constexpr size_t kBatchBufferBytes = 64 * 1024;
// Queued for the socket before no more is read: one send's worth.
constexpr uint64_t kQueuedBytes = 1 << 20;
// Sent in one turn before others have theirs.
constexpr uint64_t kTurnBytes = 1 << 20;
constexpr size_t kVectors = 64;
// Kept for a partial request without a thought.
constexpr size_t kRestBytes = 256;
constexpr uint64_t kPageBytes = 4096;

RequestKind KindOf(uint16_t type) {
  switch (type) {
    case kCmdRead:
      return RequestKind::kRead;
    case kCmdBlockStatus:
      return RequestKind::kBlockStatus;
    default:
      return RequestKind::kOther;
  }
}

// What the client is told: only a lack of memory may pass by itself.
uint32_t ErrorFor(int error) { return error == ENOMEM ? kNoMem : kIo; }

constexpr const char* kReadFailed = "read failed";
constexpr const char* kExportFailed = "export has failed";

}  // namespace

Connection::Connection(uint64_t id, Worker* worker, std::unique_ptr<Transport> transport,
                       Service service, std::vector<uint8_t> received)
    : id_(id),
      worker_(worker),
      transport_(std::move(transport)),
      service_(std::move(service)),
      rest_(std::move(received)),
      rest_ready_(!rest_.empty()) {
  service_.served->users.fetch_add(1);
}

Connection::~Connection() = default;

// ---- receiving

void Connection::OnReady(uint32_t events) {
  if (state_ == State::kClosed) return;
  if (events & (EPOLLHUP | EPOLLERR)) {
    // Both directions are over: nobody reads what we might still say.
    Destroy(nullptr, false);
    return;
  }
  if (events & (EPOLLIN | EPOLLRDHUP)) readable_ = true;
  if (events & EPOLLRDHUP) end_is_near_ = true;
  if (events & EPOLLOUT) writable_ = true;
}

void Connection::Keep(const uint8_t* data, size_t size) {
  std::vector<uint8_t> kept(data, data + size);
  rest_.swap(kept);
}

// Parses what is there, at most one receive. Returns whether there was anything.
bool Connection::ParseMore() {
  if (state_ == State::kClosed) return false;
  if (state_ != State::kOpen) {
    // What the peer still says is not looked at; read it is, for a close would reset the stream.
    if (!readable_) return false;
    ssize_t got = transport_->Receive(worker_->receive_buffer(), Worker::kReceiveBytes);
    if (got > 0) return true;
    if (got == -EINTR) return true;
    readable_ = false;
    if (got == 0) ended_ = true;
    if (got != -EAGAIN && state_ == State::kEnding) Destroy(nullptr, false);
    return false;
  }
  if (in_flight_ >= service_.rules.limits.requests_in_flight) return false;
  if (rest_ready_) {
    std::vector<uint8_t> taken = std::move(rest_);
    rest_.clear();
    rest_ready_ = false;
    size_t used = Parse(taken.data(), taken.size());
    if (used < taken.size() && state_ == State::kOpen) Keep(taken.data() + used, taken.size() - used);
    return true;
  }
  if (!readable_) return false;
  uint8_t* room = worker_->receive_buffer() + Worker::kReceiveRoom;
  ssize_t got = transport_->Receive(room, Worker::kReceiveBytes);
  if (got == -EINTR) return true;
  if (got == 0) {
    // The client sends no more, but may still wait for replies, for as long as its link takes.
    readable_ = false;
    ended_ = true;
    Drain();
    return true;
  }
  if (got < 0) {
    readable_ = false;
    if (got != -EAGAIN) Destroy(nullptr, false);
    return got != -EAGAIN;
  }
  // A short receive has emptied the socket, and what comes later is told by a new edge; but the
  // end was told together with what came before it.
  if (static_cast<size_t>(got) < Worker::kReceiveBytes && !end_is_near_) readable_ = false;
  uint8_t* data = room;
  size_t size = static_cast<size_t>(got);
  if (!rest_.empty()) {
    // A partial request, or a few context ids: less than the room in front.
    data -= rest_.size();
    std::memcpy(data, rest_.data(), rest_.size());
    size += rest_.size();
    rest_.clear();
    if (rest_.capacity() > kRestBytes) std::vector<uint8_t>().swap(rest_);
  }
  last_burst_ = 0;
  size_t used = Parse(data, size);
  if (used < size && state_ == State::kOpen) Keep(data + used, size - used);
  singles_ = last_burst_ <= 1 ? singles_ + last_burst_ : 0;
  gather_.OnBurst(last_burst_, last_request_ns_);
  return true;
}

// Returns the bytes that are done with.
size_t Connection::Parse(const uint8_t* data, size_t size) {
  const Rules& rules = service_.rules;
  const size_t request_bytes = RequestBytes(rules.headers);
  const uint32_t magic = RequestMagic(rules.headers);
  const int64_t now = NowNs();
  size_t at = 0;
  while (state_ == State::kOpen) {
    if (skip_ > 0) {
      uint64_t skipped = std::min<uint64_t>(skip_, size - at);
      skip_ -= skipped;
      at += skipped;
      if (skip_ > 0) break;
    }
    if (size - at < wanted_) break;
    if (awaiting_) {
      Task task = std::move(*awaiting_);
      awaiting_.reset();
      if (wanted_ > 0) {
        ValidRequest valid =
            ValidateStatusPayload(awaiting_request_, data + at, wanted_, rules, task.ids);
        at += wanted_;
        wanted_ = 0;
        Begin(task, valid);
      }
      ready_.push_back(std::move(task));
    }
    if (in_flight_ >= rules.limits.requests_in_flight) {
      rest_ready_ = at < size;
      break;
    }
    // A wrong magic is known from its four bytes: waiting for the rest would wait for ever.
    if (size - at >= 4 && Get32(data + at) != magic) {
      Destroy("request magic is wrong", true);
      break;
    }
    if (size - at < request_bytes) break;
    Request request = DecodeRequest(data + at, rules.headers);
    at += request_bytes;
    Accept(request, now);
  }
  return at;
}

void Connection::Accept(const Request& request, int64_t now) {
  ValidRequest valid = Validate(request, service_.rules);
  if (valid.verdict == Verdict::kDisconnect) {
    Drain();
    return;
  }
  if (valid.verdict == Verdict::kViolation) {
    Destroy(valid.message, true);
    return;
  }
  in_flight_++;
  last_burst_++;
  last_request_ns_ = now;
  Task task;
  task.to = {request.cookie, request.offset};
  task.since_ns = now;
  task.kind = KindOf(request.type);
  if (valid.verdict == Verdict::kStatusPayload) {
    wanted_ = valid.payload_bytes;
    awaiting_request_ = request;
    awaiting_ = std::move(task);
    return;
  }
  Begin(task, valid);
  if (valid.verdict == Verdict::kRefuse && valid.payload_bytes > 0) {
    skip_ = valid.payload_bytes;
    awaiting_ = std::move(task);
    return;
  }
  // Answered here and now if it can be, and without a place in the queue.
  bool first = ready_.empty() && filled_.empty() && !exclusive_ && queued_ - sent_ < kQueuedBytes;
  if (first) {
    Step step = Advance(task);
    if (step == Step::kDone || step == Step::kAway || state_ == State::kClosed) return;
  }
  if (task.holds_stream) {
    exclusive_task_ = std::move(task);
  } else {
    ready_.push_back(std::move(task));
  }
}

void Connection::Begin(Task& task, const ValidRequest& valid) {
  switch (valid.verdict) {
    case Verdict::kRefuse:
      task.type = Task::Type::kRefuse;
      task.error = valid.error;
      task.message = valid.message;
      return;
    case Verdict::kRead: {
      if (valid.length == 0) return;
      const Rules& rules = service_.rules;
      bool simple = rules.headers == Headers::kSimple;
      task.type = Task::Type::kRead;
      task.position = valid.offset;
      task.segment_end = valid.offset;
      task.end = valid.offset + valid.length;
      task.is_long = simple && valid.length > rules.limits.piece_bytes;
      if (!simple && !valid.flag && service_.served->allocation() != nullptr) {
        task.shortest_hole = std::min(kShortestHoleBytes, valid.length);
      }
      return;
    }
    case Verdict::kStatus:
      task.type = Task::Type::kStatus;
      task.position = valid.offset;
      task.end = valid.offset + valid.length;
      task.request_one = valid.flag;
      return;
    case Verdict::kFlush:
      return;
    case Verdict::kStatusPayload:
    case Verdict::kDisconnect:
    case Verdict::kViolation:
      __builtin_unreachable();
  }
}

// ---- answering

bool Connection::Run() {
  const uint64_t turn_end = sent_ + kTurnBytes;
  for (;;) {
    bool progress = false;
    while (queued_ - sent_ < kQueuedBytes && StepTask()) progress = true;
    if (queued_ - sent_ < kQueuedBytes && filled_.empty() && ready_.empty() && ParseMore()) {
      progress = true;
      if (state_ != State::kClosed && queued_ - sent_ < kQueuedBytes) continue;
    }
    if (state_ == State::kClosed) break;
    if (!out_.empty() && writable_) progress |= Flush();
    CheckFinished();
    if (state_ == State::kClosed || !progress) break;
    if (sent_ >= turn_end) return true;
  }
  if (tally_.dirty || tally_.read_bytes) service_.served->totals.Add(tally_);
  return false;
}

// Advances the first task that may. Returns whether anything was done.
bool Connection::StepTask() {
  if (state_ == State::kClosed) return false;
  if (exclusive_) {
    if (!exclusive_task_) return false;
    Task task = std::move(*exclusive_task_);
    exclusive_task_.reset();
    Step step = Advance(task);
    if (state_ == State::kClosed) return false;
    if (step == Step::kBlocked || step == Step::kAgain) exclusive_task_ = std::move(task);
    return step != Step::kBlocked;
  }
  if (!filled_.empty()) {
    Task task = std::move(filled_.front());
    filled_.pop_front();
    if (PutFilled(task)) {
      if (task.holds_stream) {
        exclusive_task_ = std::move(task);
      } else {
        ready_.push_front(std::move(task));
      }
    }
    return state_ != State::kClosed;
  }
  if (ready_.empty()) return false;
  Step step = Advance(ready_.front());
  if (state_ == State::kClosed) return false;
  if (step == Step::kDone || step == Step::kAway) {
    ready_.pop_front();
  } else if (ready_.front().holds_stream && !exclusive_task_) {
    exclusive_task_ = std::move(ready_.front());
    ready_.pop_front();
  }
  return step != Step::kBlocked;
}

Connection::Step Connection::Advance(Task& task) {
  switch (task.type) {
    case Task::Type::kRefuse:
      Refuse(task, task.error, task.message, task.has_error_offset, task.error_offset);
      return Step::kDone;
    case Task::Type::kAcknowledge:
      Acknowledge(task);
      return Step::kDone;
    case Task::Type::kStatus:
      return AdvanceStatus(task);
    case Task::Type::kRead:
      return AdvanceRead(task);
  }
  __builtin_unreachable();
}

void Connection::Acknowledge(Task& task) {
  Headers headers = service_.rules.headers;
  uint8_t* at = Room(64);
  uint8_t* end = headers == Headers::kSimple
                     ? PutSimpleReply(at, task.to, 0)
                     : PutChunkHeader(at, headers, task.to, kReplyFlagDone, kReplyNone, 0);
  Commit(static_cast<size_t>(end - at));
  PutMark(task, 0, true, false);
}

void Connection::Refuse(Task& task, uint32_t error, const char* message, bool has_offset,
                        uint64_t offset) {
  Headers headers = service_.rules.headers;
  if (headers == Headers::kSimple) {
    uint8_t* at = Room(kSimpleReplyBytes);
    Commit(static_cast<size_t>(PutSimpleReply(at, task.to, error) - at));
  } else {
    size_t length = std::strlen(message);
    size_t payload = 6 + length + (has_offset ? 8 : 0);
    uint8_t* at = Room(ChunkHeaderBytes(headers) + payload);
    uint16_t type = has_offset ? kReplyErrorOffset : kReplyError;
    uint8_t* to = PutChunkHeader(at, headers, task.to, kReplyFlagDone, type, payload);
    to = Put32(to, error);
    to = Put16(to, static_cast<uint16_t>(length));
    std::memcpy(to, message, length);
    to += length;
    if (has_offset) to = Put64(to, offset);
    Commit(static_cast<size_t>(to - at));
  }
  PutMark(task, 0, true, true);
}

Connection::Step Connection::AdvanceStatus(Task& task) {
  const Rules& rules = service_.rules;
  const Headers headers = rules.headers;
  const std::vector<uint32_t>& all = rules.context_ids;
  auto is_asked = [&task](uint32_t id) {
    return task.ids.empty() || std::find(task.ids.begin(), task.ids.end(), id) != task.ids.end();
  };
  const size_t contexts = task.ids.empty() ? all.size() : task.ids.size();
  // An extended extent takes twice the bytes: half as many fit into a reply of the same size.
  size_t most = rules.limits.status_extents / (headers == Headers::kExtended ? 2 : 1);
  size_t share = task.request_one ? 1 : std::max<size_t>(1, most / contexts);
  uint64_t end = task.end;
  for (uint32_t id : all) {
    const ExtentMap* map = service_.served->Context(id);
    if (is_asked(id)) end = std::min(end, map->StartOf(map->IndexAt(task.position) + share));
  }
  size_t bytes = 0;
  for (uint32_t id : all) {
    const ExtentMap* map = service_.served->Context(id);
    if (!is_asked(id)) continue;
    bytes += StatusChunkBytes(map->IndexAt(end - 1) - map->IndexAt(task.position) + 1, headers);
  }
  auto budget = static_cast<uint32_t>(bytes);
  if (task.budget == 0) {
    if (!TakeBudget(budget)) return Step::kBlocked;
    task.budget = budget;
  }
  if (service_.served->failed()) {
    GiveBudget(task.budget);
    Refuse(task, kIo, kExportFailed, false, 0);
    return Step::kDone;
  }
  uint8_t* to = Room(bytes);
  size_t left = contexts;
  for (uint32_t id : all) {
    if (!is_asked(id)) continue;
    left--;
    const ExtentMap& map = *service_.served->Context(id);
    size_t index = map.IndexAt(task.position);
    size_t extents = map.IndexAt(end - 1) - index + 1;
    bool extended = headers == Headers::kExtended;
    to = PutChunkHeader(to, headers, task.to, left == 0 ? kReplyFlagDone : 0,
                        extended ? kReplyBlockStatusExt : kReplyBlockStatus,
                        StatusChunkBytes(extents, headers) - ChunkHeaderBytes(headers));
    to = Put32(to, id);
    if (extended) to = Put32(to, static_cast<uint32_t>(extents));
    for (uint64_t start = task.position; start < end; index++) {
      uint64_t run_end = std::min(map.EndOf(index), end);
      if (extended) {
        to = Put64(to, run_end - start);
        to = Put64(to, map.FlagsOf(index));
      } else {
        to = Put32(to, static_cast<uint32_t>(run_end - start));
        to = Put32(to, map.FlagsOf(index));
      }
      start = run_end;
    }
  }
  Commit(bytes);
  PutMark(task, task.budget, true, false);
  return Step::kDone;
}

// Whether the piece that ends at the segment's end ends the reply.
bool Connection::EndsWith(const Task& task) const {
  return task.position + task.piece_bytes == task.end;
}

// Splits a read at the holes that are worth a chunk.
void Connection::FindSegment(Task& task) {
  task.segment_zero = false;
  task.segment_end = task.end;
  if (task.shortest_hole == 0) return;
  const ExtentMap& map = *service_.served->allocation();
  size_t index = map.IndexAt(task.position);
  uint64_t start = task.position;
  while (start < task.end) {
    uint64_t run_end = std::min(map.EndOf(index), task.end);
    if ((map.FlagsOf(index) & kStateZero) && run_end - start >= task.shortest_hole) {
      task.segment_zero = start == task.position;
      task.segment_end = task.segment_zero ? run_end : start;
      return;
    }
    start = run_end;
    index++;
  }
}

// Returns false if there is no budget for it yet.
bool Connection::SendHole(Task& task) {
  Headers headers = service_.rules.headers;
  size_t bytes = ChunkHeaderBytes(headers) + 12;
  auto budget = static_cast<uint32_t>(bytes);
  if (!TakeBudget(budget)) return false;
  if (service_.served->failed()) {
    GiveBudget(budget);
    Refuse(task, kIo, kExportFailed, true, task.position);
    task.position = task.end;
    return true;
  }
  bool ends = task.segment_end == task.end;
  uint8_t* to = Room(bytes);
  to = PutChunkHeader(to, headers, task.to, ends ? kReplyFlagDone : 0, kReplyOffsetHole, 12);
  to = Put64(to, task.position);
  Put32(to, static_cast<uint32_t>(task.segment_end - task.position));
  Commit(bytes);
  PutMark(task, budget, ends, false);
  task.position = task.segment_end;
  return true;
}

Connection::Step Connection::AdvanceRead(Task& task) {
  const std::vector<CapSpec>& caps = service_.served->caps();
  for (;;) {
    if (task.position == task.end) return Step::kDone;
    if (queued_ - sent_ >= kQueuedBytes) return Step::kAgain;
    if (task.filled) {
      // Only a task that holds the stream comes back here with its piece.
      if (!PutFilled(task)) return Step::kDone;
      continue;
    }
    if (task.position == task.segment_end) FindSegment(task);
    if (task.segment_zero) {
      if (!SendHole(task)) return Step::kBlocked;
      continue;
    }
    uint64_t left = task.segment_end - task.position;
    task.piece_bytes =
        static_cast<uint32_t>(std::min<uint64_t>(service_.rules.limits.piece_bytes, left));
    // Before the budget, of which others have a use meanwhile.
    while (task.caps_passed < caps.size()) {
      const CapSpec& cap = caps[task.caps_passed];
      if (!worker_->TryPass(cap, task.piece_bytes)) {
        worker_->WaitForCap(cap, this, std::move(task));
        return Step::kAway;
      }
      task.caps_passed++;
    }
    if (task.budget == 0) {
      if (!TakeBudget(task.piece_bytes)) return Step::kBlocked;
      task.budget = task.piece_bytes;
    }
    switch (Fill(task)) {
      case Filled::kAway:
        return Step::kAway;
      case Filled::kFailed:
        return Step::kDone;
      case Filled::kSent:
        break;
    }
  }
}

// Reads the next piece and puts it on the stream, unless it takes time.
Connection::Filled Connection::Fill(Task& task) {
  if (service_.served->failed()) {
    FailRead(task, EIO);
    return Filled::kFailed;
  }
  bool by_splice = transport_->CanSplice() && service_.served->KnowsCached();
  if (by_splice && task.piece_bytes > kSmallBytes && FillFromCache(task)) {
    EndPiece(task);
    return Filled::kSent;
  }
  return FillByCopy(task);
}

// Puts a piece of cached pages on the stream as it is. Returns false if that cannot be done.
bool Connection::FillFromCache(Task& task) {
  const Export& served = *service_.served;
  uint64_t pages = (task.position % kPageBytes + task.piece_bytes + kPageBytes - 1) / kPageBytes;
  if (pages * kPageBytes > Worker::kPipeBytes) return false;
  if (!served.IsCached(task.position, task.piece_bytes)) return false;
  Piece piece;
  piece.size = task.piece_bytes;
  piece.pipe = worker_->TakePipe();
  if (!piece.pipe) return false;
  auto offset = static_cast<off_t>(task.position);
  size_t left = task.piece_bytes;
  while (left > 0) {
    ssize_t moved = splice(served.fd(), &offset, piece.pipe->write.get(), nullptr, left,
                           SPLICE_F_NONBLOCK | SPLICE_F_MOVE);
    // What is in the pipe already is lost with it, and read again in another way.
    if (moved <= 0) return false;
    left -= static_cast<size_t>(moved);
  }
  if (!task.holds_stream) {
    Headers headers = service_.rules.headers;
    uint8_t* at = Room(kHeaderRoomBytes);
    uint8_t* end = PutDataHeader(at, headers, task.to, EndsWith(task), task.position,
                                 task.piece_bytes);
    Commit(static_cast<size_t>(end - at));
  }
  Append(std::move(piece));
  return true;
}

Connection::Filled Connection::FillByCopy(Task& task) {
  Export& served = *service_.served;
  const Headers headers = service_.rules.headers;
  const size_t header_bytes = task.holds_stream ? 0 : DataHeaderBytes(headers);
  const uint32_t bytes = task.piece_bytes;
  if (!served.nowait()) return FillCold(task, 0);
  const bool small = bytes <= kSmallBytes && !task.is_long;
  uint8_t* header = nullptr;
  if (small) {
    header = Room(header_bytes + bytes);
  } else {
    task.buffer = worker_->buffers().Take(bytes);
    header = task.buffer.data() + kHeaderRoomBytes - header_bytes;
  }
  struct iovec vector = {header + header_bytes, bytes};
  ssize_t got = preadv2(served.fd(), &vector, 1, static_cast<off_t>(task.position), RWF_NOWAIT);
  if (got < 0 && errno == EOPNOTSUPP) served.ForgoNowait();
  uint32_t have = got > 0 ? static_cast<uint32_t>(got) : 0;
  if (have < bytes) {
    if (small) {
      task.buffer = worker_->buffers().Take(bytes);
      std::memcpy(task.buffer.data() + kHeaderRoomBytes, vector.iov_base, have);
    }
    return FillCold(task, have);
  }
  if (!small) {
    if (served.forgets()) worker_->Forget(service_.served, served.OnRead(task.position, bytes));
    PutFilled(task);
    return Filled::kSent;
  }
  // It may have failed while we read: then the data may be wrong, whatever the read says.
  if (served.failed()) {
    FailRead(task, EIO);
    return Filled::kFailed;
  }
  PutDataHeader(header, headers, task.to, EndsWith(task), task.position, bytes);
  Commit(header_bytes + bytes);
  if (served.forgets()) worker_->Forget(service_.served, served.OnRead(task.position, bytes));
  EndPiece(task);
  return Filled::kSent;
}

Connection::Filled Connection::FillCold(Task& task, uint32_t have) {
  if (!task.buffer) task.buffer = worker_->buffers().Take(task.piece_bytes);
  uint8_t* at = task.buffer.data() + kHeaderRoomBytes + have;
  uint64_t offset = task.position + have;
  uint32_t left = task.piece_bytes - have;
  reads_out_++;
  worker_->Read(this, at, offset, left, std::move(task));
  return Filled::kAway;
}

void Connection::OnRead(Task task) {
  reads_out_--;
  if (state_ == State::kClosed) {
    GiveBudget(task.budget);
    return;
  }
  if (service_.served->forgets()) {
    worker_->Forget(service_.served,
                    service_.served->OnRead(task.position, task.piece_bytes));
  }
  task.filled = true;
  if (task.holds_stream) {
    exclusive_task_ = std::move(task);
  } else {
    filled_.push_back(std::move(task));
  }
}

void Connection::OnPaced(Task task) {
  if (state_ == State::kClosed) return;
  task.caps_passed++;
  if (task.holds_stream) {
    exclusive_task_ = std::move(task);
  } else {
    ready_.push_back(std::move(task));
  }
}

// Puts a piece that was read on the stream. Returns whether the reply goes on.
bool Connection::PutFilled(Task& task) {
  task.filled = false;
  // It may have failed while we read: then the data may be wrong, whatever the read says.
  int error = service_.served->failed() ? EIO : task.read_errno;
  if (error != 0) {
    FailRead(task, error);
    return false;
  }
  const Headers headers = service_.rules.headers;
  const size_t header_bytes = task.holds_stream ? 0 : DataHeaderBytes(headers);
  uint8_t* data = task.buffer.data() + kHeaderRoomBytes - header_bytes;
  if (!task.holds_stream) {
    PutDataHeader(data, headers, task.to, EndsWith(task), task.position, task.piece_bytes);
  }
  Piece piece;
  piece.data = data;
  piece.size = header_bytes + task.piece_bytes;
  piece.buffer = std::move(task.buffer);
  Append(std::move(piece));
  return EndPiece(task);
}

// After a piece has been put on the stream. Returns whether the reply goes on.
bool Connection::EndPiece(Task& task) {
  const bool ends = EndsWith(task);
  tally_.read_bytes += task.piece_bytes;
  if (task.is_long) {
    // It keeps one piece's budget until its end: those who wait for the stream hold theirs.
    task.holds_stream = exclusive_ = !ends;
    PutMark(task, ends ? task.budget : 0, ends, false);
  } else {
    PutMark(task, task.budget, ends, false);
    task.budget = 0;
  }
  task.position += task.piece_bytes;
  task.caps_passed = 0;
  return !ends;
}

void Connection::FailRead(Task& task, int error) {
  if (!service_.served->failed()) {
    worker_->shared().events->ReadFailed(id_, error, task.position, task.piece_bytes);
  }
  GiveBudget(std::exchange(task.budget, 0));
  task.buffer.Reset();
  if (task.holds_stream) {
    Destroy("read failed in the middle of a simple reply", false);
  } else {
    Refuse(task, ErrorFor(error), kReadFailed, true, task.position);
  }
  task.position = task.end;
}

// ---- the stream

// Room for bytes at the end of what is queued, contiguous. Commit() says how many there are.
uint8_t* Connection::Room(size_t bytes) {
  if (!out_.empty() && out_.back().open) {
    Piece& last = out_.back();
    const uint8_t* end = last.data + last.size;
    size_t left = static_cast<size_t>(last.buffer.data() + last.buffer.capacity() - end);
    if (left >= bytes) return const_cast<uint8_t*>(end);
    last.open = false;
  }
  Piece piece;
  piece.buffer = worker_->buffers().Take(std::max(bytes, kBatchBufferBytes));
  piece.data = piece.buffer.data();
  piece.open = true;
  out_.push_back(std::move(piece));
  return out_.back().buffer.data();
}

void Connection::Commit(size_t bytes) {
  out_.back().size += bytes;
  queued_ += bytes;
}

void Connection::Append(Piece piece) {
  queued_ += piece.size;
  out_.push_back(std::move(piece));
}

void Connection::PutMark(const Task& task, uint32_t budget, bool ends, bool failed) {
  if (!ends && budget == 0) return;
  marks_.push_back({.position = queued_,
                    .since_ns = task.since_ns,
                    .budget = budget,
                    .kind = task.kind,
                    .ends = ends,
                    .failed = failed});
}

bool Connection::HasBytes(std::deque<Piece>::const_iterator from) const {
  return std::any_of(from, out_.end(), [](const Piece& piece) { return piece.size > 0; });
}

// Sends what is queued until the socket takes no more. Returns whether anything was sent.
bool Connection::Flush() {
  bool sent = false;
  while (!out_.empty()) {
    // Room that was taken and not used.
    if (out_.front().size == 0 && (out_.size() > 1 || !out_.front().open)) {
      out_.pop_front();
      continue;
    }
    ssize_t result;
    if (out_.front().pipe) {
      // TCP holds the end of what is not the last back, so room that waits for a reply is none.
      bool more = HasBytes(std::next(out_.begin()));
      result = transport_->SendPipe(out_.front().pipe->read.get(), out_.front().size, more);
    } else {
      struct iovec vectors[kVectors];
      size_t count = 0;
      auto piece = out_.begin();
      for (; piece != out_.end() && count < kVectors && !piece->pipe; ++piece) {
        if (piece->size == 0) continue;
        vectors[count++] = {const_cast<uint8_t*>(piece->data), piece->size};
      }
      if (count == 0) break;
      result = transport_->Send(vectors, count, HasBytes(piece));
    }
    if (result == -EINTR) continue;
    if (result == -EAGAIN) {
      writable_ = false;
      break;
    }
    if (result <= 0) {
      // A page in a pipe that the file has lost: its header has gone out.
      bool ours = result == -EIO || result == -ENODATA || result == 0;
      Destroy(ours ? "read failed in the middle of a reply" : nullptr, false);
      return true;
    }
    Consume(static_cast<size_t>(result));
    sent = true;
  }
  return sent;
}

void Connection::Consume(size_t bytes) {
  sent_ += bytes;
  while (bytes > 0) {
    Piece& first = out_.front();
    size_t used = std::min(bytes, first.size);
    first.data += first.pipe ? 0 : used;
    first.size -= used;
    bytes -= used;
    if (first.size > 0) break;
    if (first.pipe) worker_->GivePipe(std::move(first.pipe));
    out_.pop_front();
  }
  if (marks_.empty() || marks_.front().position > sent_) return;
  const int64_t now = NowNs();
  uint64_t budget = 0;
  while (!marks_.empty() && marks_.front().position <= sent_) {
    const Mark& mark = marks_.front();
    budget += mark.budget;
    if (mark.ends) {
      tally_.Count(mark.kind, now - mark.since_ns, mark.failed);
      in_flight_--;
    }
    marks_.pop_front();
  }
  GiveBudget(budget);
}

bool Connection::TakeBudget(uint32_t bytes) {
  SharedBudget& budget = worker_->shared().budget;
  if (budget_used_ == 0) {
    budget.Take(bytes);
  } else {
    if (budget_used_ + bytes > service_.rules.limits.connection_bytes_in_flight) return false;
    if (!budget.TryTake(bytes)) {
      worker_->WaitForBudget(this);
      // Somebody may have given back before we were seen to wait.
      if (!budget.TryTake(bytes)) return false;
    }
  }
  budget_used_ += bytes;
  return true;
}

void Connection::GiveBudget(uint64_t bytes) {
  if (bytes == 0) return;
  budget_used_ -= bytes;
  SharedBudget& budget = worker_->shared().budget;
  budget.Give(bytes);
  if (budget.waiting.load() != 0) worker_->shared().wake(budget.waiting.exchange(0));
}

// ---- the end

void Connection::CheckFinished() {
  if (state_ != State::kDraining || in_flight_ > 0) return;
  state_ = State::kEnding;
  transport_->EndSending();
  if (ended_) {
    Destroy(nullptr, false);
  } else {
    worker_->SetDeadline(this);
  }
}

void Connection::Drain() {
  if (state_ != State::kOpen) return;
  state_ = State::kDraining;
  std::vector<uint8_t>().swap(rest_);
  rest_ready_ = false;
  if (awaiting_) {
    // Its payload will not come any more.
    tally_.Count(awaiting_->kind, NowNs() - awaiting_->since_ns, true);
    awaiting_.reset();
    in_flight_--;
  }
}

void Connection::Destroy(const char* reason, bool peers_fault) {
  if (state_ == State::kClosed) return;
  state_ = State::kClosed;
  uint64_t budget = worker_->LeaveCaps(this);
  for (const Mark& mark : marks_) budget += mark.budget;
  for (const Task& task : filled_) budget += task.budget;
  for (const Task& task : ready_) budget += task.budget;
  if (exclusive_task_) budget += exclusive_task_->budget;
  out_.clear();
  marks_.clear();
  filled_.clear();
  // The first may be in the hands of our caller.
  while (ready_.size() > 1) ready_.pop_back();
  exclusive_task_.reset();
  awaiting_.reset();
  std::vector<uint8_t>().swap(rest_);
  GiveBudget(budget);
  worker_->OnClosed(this, reason, peers_fault);
  transport_.reset();
}

}  // namespace engine
