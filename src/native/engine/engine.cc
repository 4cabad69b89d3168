// SPDX-License-Identifier: Apache-2.0
#include "engine.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <utility>

namespace engine {

namespace {

// Processors that this process may use.
uint32_t Cores() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) {
    return static_cast<uint32_t>(std::max(CPU_COUNT(&set), 1));
  }
  return static_cast<uint32_t>(std::max(sysconf(_SC_NPROCESSORS_ONLN), 1L));
}

}  // namespace

Engine::Engine(const Options& options, Events* events) : shared_(options.limits, events) {
  shared_.cores = Cores();
  shared_.workers = options.workers ? options.workers : std::min(shared_.cores, kMostWorkers);
  shared_.allow_ring = options.allow_ring;
  shared_.wake = [this](uint64_t bits) {
    for (size_t i = 0; i < workers_.size(); i++) {
      if (bits & (uint64_t{1} << i)) workers_[i]->Wake();
    }
  };
  for (uint32_t i = 0; i < shared_.workers; i++) {
    workers_.push_back(std::make_unique<Worker>(&shared_, i));
  }
}

int Engine::Start() {
  for (auto& worker : workers_) {
    if (int error = worker->Start()) return error;
  }
  return 0;
}

void Engine::Stop() {
  for (auto& worker : workers_) worker->Stop();
  shared_.pool.Stop();
}

uint64_t Engine::Adopt(std::unique_ptr<Transport> transport, std::shared_ptr<Export> served,
                       Headers headers, std::vector<uint32_t> context_ids,
                       std::vector<uint8_t> received) {
  size_t chosen = 0;
  for (size_t i = 1; i < workers_.size(); i++) {
    if (workers_[i]->load() < workers_[chosen]->load()) chosen = i;
  }
  // The id tells the worker.
  uint64_t id = next_++ * workers_.size() + chosen;
  Service service;
  service.rules = {.size_bytes = served->size_bytes(),
                   .headers = headers,
                   .context_ids = std::move(context_ids),
                   .limits = shared_.limits};
  service.served = std::move(served);
  workers_[chosen]->Adopt(id, std::move(transport), std::move(service), std::move(received));
  return id;
}

}  // namespace engine
