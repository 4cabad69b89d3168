// SPDX-License-Identifier: Apache-2.0
// Waits for a snapshot's events on a thread of its own.
#ifndef STILLBLOCK_NATIVE_EVENT_THREAD_H_
#define STILLBLOCK_NATIVE_EVENT_THREAD_H_

#include <fcntl.h>
#include <linux/stillblock.h>
#include <napi.h>
#include <poll.h>
#include <pthread.h>
#include <sys/eventfd.h>

#include <cstddef>
#include <mutex>

#include "outcome.h"
#include "unique_fd.h"

// pthreads rather than std::thread, whose constructor reports failure by an exception.
class EventThread {
 public:
  EventThread() = default;
  EventThread(const EventThread&) = delete;
  EventThread& operator=(const EventThread&) = delete;
  ~EventThread() { Stop(); }

  // Takes over the function; @snapshot must stay open until Stop(). Returns 0 or an errno.
  int Start(int snapshot, Napi::ThreadSafeFunction function) {
    snapshot_ = snapshot;
    function_ = function;
    stop_ = UniqueFd(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
    int error = stop_.valid() ? 0 : errno;
    if (!error && fcntl(snapshot, F_SETFL, O_NONBLOCK) != 0) error = errno;
    if (!error) {
      error = pthread_create(&thread_, nullptr, [](void* self) -> void* {
        static_cast<EventThread*>(self)->Loop();
        return nullptr;
      }, this);
    }
    running_ = !error;
    if (error) function_.Release();
    return error;
  }

  // Returns when the thread has ended. Safe to call again, and from several threads.
  void Stop() {
    std::lock_guard<std::mutex> guard(stopping_);
    if (!running_) return;
    uint64_t one = 1;
    // An eventfd with room always takes it.
    (void)!write(stop_.get(), &one, sizeof(one));
    pthread_join(thread_, nullptr);
    running_ = false;
  }

 private:
  static constexpr size_t kEvents = 16;

  void Loop() {
    struct pollfd fds[] = {{snapshot_, POLLIN, 0}, {stop_.get(), POLLIN, 0}};
    bool going = true;
    while (going) {
      int ready = poll(fds, 2, -1);
      if (ready < 0) {
        going = errno == EINTR;
      } else if (fds[1].revents) {
        going = false;
      } else {
        // Anything but POLLIN is an end that the descriptor does not come back from.
        going = (fds[0].revents & POLLIN) && Deliver();
      }
    }
    function_.Release();
  }

  // Returns false when there will be no more events.
  bool Deliver() {
    struct stillblock_event events[kEvents];
    ssize_t length = read(snapshot_, events, sizeof(events));
    if (length < 0) return errno == EAGAIN || errno == EINTR;
    for (size_t i = 0; i < static_cast<size_t>(length) / sizeof(events[0]); i++) {
      auto* event = new struct stillblock_event(events[i]);
      if (function_.NonBlockingCall(event, Call) != napi_ok) {
        delete event;
        return false;
      }
    }
    return true;
  }

  static const char* Kind(uint32_t type) {
    // Without a default, so that -Wswitch finds a type that is new in the header.
    switch (static_cast<enum stillblock_event_type>(type)) {
      case STILLBLOCK_EVENT_LOW_WATERMARK: return "low-watermark";
      case STILLBLOCK_EVENT_FAILED: return "failed";
      case STILLBLOCK_EVENT_LOST: return "lost";
    }
    return "unknown";
  }

  // On the main thread, or with a null environment when that goes down.
  static void Call(Napi::Env env, Napi::Function callback, struct stillblock_event* event) {
    if (env != nullptr) {
      Napi::Object object = Napi::Object::New(env);
      object.Set("kind", Kind(event->type));
      if (event->type == STILLBLOCK_EVENT_FAILED) {
        const char* name = ReasonName(static_cast<uint32_t>(event->value));
        object.Set("reason", name ? name : "UNKNOWN");
      } else {
        object.Set("value", static_cast<double>(event->value));
      }
      object.Set("timeNs", Napi::BigInt::New(env, static_cast<uint64_t>(event->time_ns)));
      callback.Call({object});
    }
    delete event;
  }

  int snapshot_ = -1;
  Napi::ThreadSafeFunction function_;
  UniqueFd stop_;
  // Protects running_ once the thread runs.
  std::mutex stopping_;
  pthread_t thread_ = {};
  bool running_ = false;
};

#endif  // STILLBLOCK_NATIVE_EVENT_THREAD_H_
