// SPDX-License-Identifier: Apache-2.0
// pthreads rather than std::thread, whose constructor reports failure by an exception.
#ifndef STILLBLOCK_NATIVE_ENGINE_THREAD_H_
#define STILLBLOCK_NATIVE_ENGINE_THREAD_H_

#include <pthread.h>
#include <signal.h>

namespace engine {

// Runs a member function of an object that outlives it. Joined by its destructor.
class Thread {
 public:
  Thread() = default;
  Thread(const Thread&) = delete;
  Thread& operator=(const Thread&) = delete;
  ~Thread() { Join(); }

  // Returns 0 or an errno. The thread gets no signals: they are the process's, not ours.
  template <typename Object, void (Object::*Main)()>
  int Start(Object* object) {
    sigset_t all;
    sigset_t before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, kStackBytes);
    int error = pthread_create(
        &thread_, &attributes,
        [](void* self) -> void* {
          (static_cast<Object*>(self)->*Main)();
          return nullptr;
        },
        object);
    pthread_attr_destroy(&attributes);
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    running_ = error == 0;
    return error;
  }

  void Join() {
    if (running_) pthread_join(thread_, nullptr);
    running_ = false;
  }

 private:
  static constexpr size_t kStackBytes = 256 * 1024;

  pthread_t thread_ = {};
  bool running_ = false;
};

}  // namespace engine

#endif  // STILLBLOCK_NATIVE_ENGINE_THREAD_H_
