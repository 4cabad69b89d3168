// SPDX-License-Identifier: Apache-2.0
// The transmission phase of one connection, as nbd/transmission.ts has it: requests are parsed as
// they come and answered in whatever order they are done. All of it runs on its worker's thread.
//
//  open ──DISC, end of the stream, Drain()──▶ draining ──all answered──▶ ending ──▶ closed
//    └────violation, failure, Destroy()──────────┴─────────────────────────┴────────┘
#ifndef STILLBLOCK_NATIVE_ENGINE_CONNECTION_H_
#define STILLBLOCK_NATIVE_ENGINE_CONNECTION_H_

#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <vector>

#include "buffers.h"
#include "export.h"
#include "figures.h"
#include "gather.h"
#include "transport.h"
#include "validate.h"
#include "wire.h"

namespace engine {

class Worker;

// A pipe that is large enough for a piece of cached pages.
struct Pipe {
  UniqueFd read;
  UniqueFd write;
};

// A request on its way to its reply.
struct Task {
  enum class Type : uint8_t { kRead, kStatus, kAcknowledge, kRefuse };

  ReplyTarget to = {};
  int64_t since_ns = 0;
  Type type = Type::kAcknowledge;
  RequestKind kind = RequestKind::kOther;
  // kRefuse: what is said; an offset only if there is one.
  bool has_error_offset = false;
  uint32_t error = 0;
  const char* message = "";
  uint64_t error_offset = 0;
  // kRead: the next byte, the end of the segment that it is in, the end of all; kStatus: the range.
  uint64_t position = 0;
  uint64_t segment_end = 0;
  uint64_t end = 0;
  // kRead: the length of a hole that is worth a chunk; 0 if there are none.
  uint64_t shortest_hole = 0;
  bool segment_zero = false;
  // A simple reply in several pieces: bars all others from the stream until it is complete.
  bool is_long = false;
  bool holds_stream = false;
  // kStatus: one extent per context.
  bool request_one = false;
  // The piece that is being read: its length, the budget that it holds, the caps that it passed.
  bool filled = false;
  uint8_t caps_passed = 0;
  uint32_t piece_bytes = 0;
  uint32_t budget = 0;
  // Of reading it; 0 if it is there.
  int read_errno = 0;
  Buffer buffer;
  // kStatus: the contexts that were asked for; all if empty.
  std::vector<uint32_t> ids;
};

// What a connection serves, and how.
struct Service {
  std::shared_ptr<Export> served;
  Rules rules;
};

class Connection {
 public:
  // @received: bytes that the peer has sent already.
  Connection(uint64_t id, Worker* worker, std::unique_ptr<Transport> transport, Service service,
             std::vector<uint8_t> received);
  Connection(const Connection&) = delete;
  Connection& operator=(const Connection&) = delete;
  ~Connection();

  uint64_t id() const { return id_; }
  int fd() const { return transport_->fd(); }
  bool closed() const { return state_ == State::kClosed; }
  const std::shared_ptr<Export>& served() const { return service_.served; }
  Tally& tally() { return tally_; }
  // When its last request came, CLOCK_MONOTONIC.
  int64_t last_request_ns() const { return last_request_ns_; }
  // Whether the client asks one request at a time, and has its reply: the next one will come right
  // behind that.
  bool waits_for_one() const { return singles_ >= kSingles && has_answered_all(); }
  // Whether all that has come is answered, and more may come.
  bool waits() const { return has_answered_all() && state_ == State::kOpen; }
  // Whether epoll has told of something that was not received yet.
  bool readable() const { return readable_; }
  Gather& gather() { return gather_; }

  // Receives, whatever epoll has said. Returns whether there was anything.
  bool ReceiveNow() {
    readable_ = true;
    return ParseMore();
  }
  // What epoll says of the socket.
  void OnReady(uint32_t events);
  // Does what can be done in one turn. Returns whether there is more to do at once.
  bool Run();
  // A piece has been read, or not: Task::read_errno.
  void OnRead(Task task);
  // A task has passed a cap.
  void OnPaced(Task task);
  // A read of its own has come back after it closed.
  bool Idle() const { return reads_out_ == 0; }

  // Takes no more requests, answers those in flight, closes; by force at the deadline.
  void Drain();
  // Closes at once.
  void Destroy(const char* reason, bool peers_fault);

  // The worker's own notes: it is to have a turn; why it was closed.
  bool queued = false;
  const char* reason = nullptr;
  bool peers_fault = false;

 private:
  // Enough to be sure: with a queue some receive brings two.
  static constexpr uint32_t kSingles = 16;
  enum class State : uint8_t { kOpen, kDraining, kEnding, kClosed };
  enum class Step : uint8_t { kDone, kAgain, kBlocked, kAway };
  enum class Filled : uint8_t { kSent, kFailed, kAway };

  bool has_answered_all() const { return in_flight_ == 0 && out_.empty(); }

  // Something to be sent.
  struct Piece {
    const uint8_t* data = nullptr;
    size_t size = 0;
    Buffer buffer;
    // Whether more may be appended within the buffer.
    bool open = false;
    std::unique_ptr<Pipe> pipe;
  };

  // What ends when the stream has been sent up to a position.
  struct Mark {
    uint64_t position;
    int64_t since_ns;
    uint32_t budget;
    RequestKind kind;
    bool ends;
    bool failed;
  };

  // Receiving.
  bool ParseMore();
  size_t Parse(const uint8_t* data, size_t size);
  void Accept(const Request& request, int64_t now);
  void Begin(Task& task, const ValidRequest& valid);
  void Keep(const uint8_t* data, size_t size);

  // Answering.
  bool StepTask();
  Step Advance(Task& task);
  Step AdvanceRead(Task& task);
  Step AdvanceStatus(Task& task);
  void FindSegment(Task& task);
  bool SendHole(Task& task);
  Filled Fill(Task& task);
  bool FillFromCache(Task& task);
  Filled FillByCopy(Task& task);
  Filled FillCold(Task& task, uint32_t have);
  bool PutFilled(Task& task);
  bool EndPiece(Task& task);
  void Acknowledge(Task& task);
  void Refuse(Task& task, uint32_t error, const char* message, bool has_offset, uint64_t offset);
  void FailRead(Task& task, int error);
  bool EndsWith(const Task& task) const;

  // The stream.
  uint8_t* Room(size_t bytes);
  void Commit(size_t bytes);
  void Append(Piece piece);
  void PutMark(const Task& task, uint32_t budget, bool ends, bool failed);
  // Whether anything is to be sent from there on.
  bool HasBytes(std::deque<Piece>::const_iterator from) const;
  bool Flush();
  void Consume(size_t bytes);
  void CheckFinished();

  bool TakeBudget(uint32_t bytes);
  void GiveBudget(uint64_t bytes);

  const uint64_t id_;
  Worker* const worker_;
  std::unique_ptr<Transport> transport_;
  const Service service_;
  State state_ = State::kOpen;
  bool readable_ = true;
  bool writable_ = true;
  // The end of what the peer sends is there, behind what was not received yet.
  bool end_is_near_ = false;
  // The peer sends no more.
  bool ended_ = false;
  Tally tally_;
  int64_t last_request_ns_ = 0;
  uint32_t last_burst_ = 0;
  // How many receives with one request came one after another.
  uint32_t singles_ = 0;
  Gather gather_;

  // Received and not parsed; whether a whole request may be in there.
  std::vector<uint8_t> rest_;
  bool rest_ready_ = false;
  // Payload that is still to come: to be thrown away, or to be waited for as a whole.
  uint64_t skip_ = 0;
  size_t wanted_ = 0;
  std::optional<Task> awaiting_;
  Request awaiting_request_ = {};

  uint32_t in_flight_ = 0;
  // Reads that somebody else has the tasks of.
  uint32_t reads_out_ = 0;
  // Tasks whose piece is there, and those that may begin one.
  std::deque<Task> filled_;
  std::deque<Task> ready_;
  // A long simple reply has the stream; its task, unless that is away.
  bool exclusive_ = false;
  std::optional<Task> exclusive_task_;

  std::deque<Piece> out_;
  std::deque<Mark> marks_;
  // Positions on the stream since the beginning.
  uint64_t queued_ = 0;
  uint64_t sent_ = 0;
  uint64_t budget_used_ = 0;
};

}  // namespace engine

#endif  // STILLBLOCK_NATIVE_ENGINE_CONNECTION_H_
