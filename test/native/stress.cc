// SPDX-License-Identifier: Apache-2.0
// Clients in several threads, right and hostile, that leave or are closed at any moment, against
// the engine's core. For the sanitizers: stress MESSAGES SEED.
#include <linux/magic.h>
#include <pthread.h>
#include <signal.h>
#include <sys/time.h>
#include <sys/vfs.h>

#include <algorithm>
#include <deque>
#include <iterator>

#include "harness.h"

namespace {

using engine::Headers;
using harness::Random;

constexpr int kClients = 6;

std::atomic<uint64_t> messages = 0;
std::atomic<uint64_t> replies = 0;
uint64_t wanted = 0;

struct Client {
  harness::World* world;
  uint64_t seed;
};

engine::Request RandomRequest(Random& random, uint64_t cookie, bool payloads) {
  static constexpr uint16_t kTypes[] = {0, 0, 0, 0, 0, 0, 7, 7, 3, 4, 5, 6};
  static constexpr uint16_t kFlags[] = {0, 0, 0, 0, 4, 8, 1, 0x20};
  static constexpr uint64_t kLengths[] = {512, 4096, 4096, 30'000, 70'000, 300'000, 2'000'000};
  engine::Request request = {};
  request.type = kTypes[random.Below(12)];
  request.flags = kFlags[random.Below(payloads ? 8 : 7)];
  request.cookie = cookie;
  request.length = random.Below(kLengths[random.Below(7)]);
  request.offset = random.Below(harness::kSize - std::min(request.length, harness::kSize - 1));
  if (random.Once(20)) request.offset = random.Next() >> random.Below(64);
  if (random.Once(20)) request.length = random.Next() >> random.Below(64);
  if (random.Once(40)) request.type = static_cast<uint16_t>(8 + random.Below(1000));
  return request;
}

void Play(harness::World& world, Random& random) {
  auto headers = static_cast<Headers>(random.Below(3));
  const int served = static_cast<int>(random.Below(harness::World::kExports));
  const size_t count = 1 + random.Below(random.Once(4) ? 400 : 40);
  std::vector<engine::Request> asked;
  std::vector<uint8_t> bytes;
  // What is a payload to the server would be requests to us.
  const bool payloads = random.Once(4);
  bool in_step = !payloads;
  for (size_t i = 0; i < count; i++) {
    engine::Request request = RandomRequest(random, i, payloads);
    if (headers != Headers::kExtended) request.length &= 0xffffffff;
    harness::Append(bytes, request, headers);
    asked.push_back(request);
  }
  if (random.Once(10)) {
    in_step = false;
    bytes[random.Below(bytes.size())] ^= static_cast<uint8_t>(1 + random.Below(255));
  }
  std::vector<uint8_t> first;
  if (random.Once(3)) {
    size_t size = random.Below(bytes.size());
    first.assign(bytes.begin(), bytes.begin() + static_cast<ptrdiff_t>(size));
    bytes.erase(bytes.begin(), bytes.begin() + static_cast<ptrdiff_t>(size));
  }
  uint64_t id = 0;
  UniqueFd socket = world.Connect(served, headers, std::move(first), random.Once(3), &id);
  if (random.Once(15)) world.Drain(id);
  if (random.Once(30)) world.Destroy(id);
  harness::Checker checker(headers, std::move(asked));
  const bool leave = random.Once(6);
  harness::Converse(world, std::move(socket), bytes, random, in_step ? &checker : nullptr, leave);
  messages.fetch_add(count);
  replies.fetch_add(checker.taken());
}

void* RunClient(void* given) {
  auto* client = static_cast<Client*>(given);
  Random random(client->seed);
  while (messages.load() < wanted) Play(*client->world, random);
  return nullptr;
}

// Whether a file's own pages are what the page cache has of it, and can be dropped: not so in
// memory or in a container's overlay, where cachestat(2) sees none.
bool HasPagesOfItsOwn(int fd) {
  static constexpr unsigned long kKinds[] = {EXT4_SUPER_MAGIC, XFS_SUPER_MAGIC,
                                             BTRFS_SUPER_MAGIC};
  struct statfs status;
  harness::Require(fstatfs(fd, &status) == 0, "fstatfs");
  const auto kind = static_cast<unsigned long>(status.f_type);
  return std::find(std::begin(kKinds), std::end(kKinds), kind) != std::end(kKinds);
}

// What each way to see the page cache says of a file that was just written, or dropped from it.
void TestProbes() {
  using engine::CacheProbe;
  for (CacheProbe probe : {CacheProbe::kNone, CacheProbe::kMincore, CacheProbe::kCachestat}) {
    engine::ExportSpec spec;
    spec.fd = harness::MakeFile(false);
    spec.size_bytes = harness::kSize;
    spec.best_probe = probe;
    engine::Export served(std::move(spec));
    harness::Require(served.KnowsCached() == (probe != CacheProbe::kNone), "probe");
    if (!served.KnowsCached() || !HasPagesOfItsOwn(served.fd())) continue;
    harness::Require(served.IsCached(4000, 300'000), "what was written is cached");
    harness::Require(fdatasync(served.fd()) == 0, "fdatasync");
    harness::Require(posix_fadvise(served.fd(), 0, 0, POSIX_FADV_DONTNEED) == 0, "fadvise");
    harness::Require(!served.IsCached(4000, 300'000), "what was dropped is not cached");
  }
}

// Clients that ask for much of a capped export and are dropped at once, before their turn. The
// cap has nothing to pay for then.
void TestTurnsOfThoseWhoLeave() {
  static constexpr int kLeavers = 400;
  static constexpr int64_t kMostNs = 1'000'000'000;
  harness::World world(true, engine::CacheProbe::kCachestat);
  harness::Random random(1);
  std::vector<uint8_t> bytes;
  harness::Append(bytes, {.flags = 0, .type = 0, .cookie = 1, .offset = 0, .length = 3 << 20},
                  engine::Headers::kSimple);
  // No magic: a violation.
  bytes.resize(bytes.size() + 4);
  for (int i = 0; i < kLeavers; i++) {
    UniqueFd socket =
        world.Connect(harness::World::kCapped, engine::Headers::kSimple, bytes, false);
    harness::Converse(world, std::move(socket), {}, random, nullptr, false);
  }
  harness::Require(world.PaidUntilNs() < engine::NowNs() + kMostNs, "those who left are paid for");
}

// Clients that connect, and one that waits for a cap, while signals come, as libFuzzer's alarm does.
void TestSignals() {
  struct sigaction action = {};
  action.sa_handler = [](int) {};
  harness::Require(sigaction(SIGALRM, &action, nullptr) == 0, "sigaction");
  harness::World world(true, engine::CacheProbe::kCachestat);
  harness::Random random(1);
  std::vector<uint8_t> bytes;
  for (uint64_t cookie = 0; cookie < 20; cookie++) {
    const engine::Request request = {
        .flags = 0, .type = 0, .cookie = cookie, .offset = 0, .length = 3 << 20};
    harness::Append(bytes, request, engine::Headers::kSimple);
  }
  const struct itimerval each = {{0, 1000}, {0, 1000}};
  const struct itimerval never = {};
  const struct itimerval often = {{0, 50}, {0, 50}};
  UniqueFd socket = world.Connect(harness::World::kCapped, engine::Headers::kSimple, {}, false);
  harness::Require(setitimer(ITIMER_REAL, &often, nullptr) == 0, "setitimer");
  for (int turn = 0; turn < 500; turn++) {
    world.Connect(0, engine::Headers::kSimple, {}, true);
  }
  harness::Require(setitimer(ITIMER_REAL, &each, nullptr) == 0, "setitimer");
  harness::Converse(world, std::move(socket), bytes, random, nullptr, false);
  harness::Require(setitimer(ITIMER_REAL, &never, nullptr) == 0, "setitimer");
}

int64_t ProcessorNs() {
  struct timespec used;
  harness::Require(clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &used) == 0, "clock_gettime");
  return int64_t{used.tv_sec} * 1'000'000'000 + used.tv_nsec;
}

// Workers that are woken when all is done already, for the waker lost the processor in between.
// They must sleep again.
void TestLateWake() {
  static constexpr int kMostFds = 1024;
  static constexpr int64_t kMostNs = 25'000'000;
  harness::World world(false, engine::CacheProbe::kNone);
  int woken = 0;
  for (int fd = 0; fd < kMostFds; fd++) {
    char target[64] = {};
    const std::string link = "/proc/self/fd/" + std::to_string(fd);
    if (readlink(link.c_str(), target, sizeof(target) - 1) <= 0) continue;
    if (strcmp(target, "anon_inode:[eventfd]") != 0) continue;
    const uint64_t one = 1;
    harness::Require(write(fd, &one, sizeof(one)) == sizeof(one), "write");
    woken++;
  }
  harness::Require(woken == 2, "an eventfd for each worker");
  const int64_t before = ProcessorNs();
  usleep(100'000);
  harness::Require(ProcessorNs() - before < kMostNs, "an idle worker does not sleep");
}

struct Served {
  uint64_t requests = 0;
  uint64_t receives = 0;
  int64_t ns = 0;
};

// A client with `depth` requests in flight, which takes 10 us for each reply before it asks again,
// and a server that takes 5 us for each receive and 3 us for each request, for half a second.
Served Simulate(uint32_t depth, bool gathers) {
  static constexpr int64_t kClientNs = 10'000;
  static constexpr int64_t kReceiveNs = 5'000;
  static constexpr int64_t kRequestNs = 3'000;
  static constexpr int64_t kRunNs = 500'000'000;
  engine::Gather gather;
  Served served;
  std::deque<int64_t> asked(depth, 0);
  int64_t client_ns = 0;
  int64_t& now = served.ns;
  while (now < kRunNs) {
    if (gathers) {
      const int64_t nap_ns = gather.NapNs(now);
      now += nap_ns;
      if (nap_ns != 0 && asked.front() > now) gather.OnBurst(0, now);
    }
    now = std::max(now, asked.front());
    uint32_t burst = 0;
    for (; burst < asked.size() && asked[burst] <= now; burst++) {
    }
    gather.OnBurst(burst, now);
    now += kReceiveNs + burst * kRequestNs;
    asked.erase(asked.begin(), asked.begin() + burst);
    for (uint32_t i = 0; i < burst; i++) {
      client_ns = std::max(client_ns, now) + kClientNs;
      asked.push_back(client_ns);
    }
    served.requests += burst;
    served.receives++;
  }
  return served;
}

// Naps spare receives, and never a client's time.
void TestGather() {
  // A trial whose outcome nobody has told stays due.
  engine::Gather untold;
  int64_t now = 0;
  for (int64_t nap_ns = 0; nap_ns != engine::Gather::kNapNs; now += 1000) {
    nap_ns = untold.NapNs(now);
    untold.OnBurst(nap_ns == 0 ? 1 : 64, now);
  }
  while (untold.NapNs(now) != engine::Gather::kTrialNs) untold.OnBurst(64, now);
  harness::Require(untold.NapNs(now) == engine::Gather::kTrialNs, "the trial is made again");
  for (uint32_t depth : {1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128}) {
    const Served plain = Simulate(depth, false);
    const Served napping = Simulate(depth, true);
    const double rate = static_cast<double>(napping.requests) / static_cast<double>(napping.ns);
    const double before = static_cast<double>(plain.requests) / static_cast<double>(plain.ns);
    harness::Require(rate >= 0.97 * before, "naps slow a client down");
    harness::Require(depth < 64 || napping.receives * 5 < napping.requests, "requests gather");
  }
}

void Run(bool ring, engine::CacheProbe probe, uint64_t seed) {
  harness::World world(ring, probe);
  Client clients[kClients];
  pthread_t threads[kClients];
  for (int i = 0; i < kClients; i++) {
    clients[i] = {&world, seed * kClients + static_cast<uint64_t>(i)};
    harness::Require(pthread_create(&threads[i], nullptr, RunClient, &clients[i]) == 0, "thread");
  }
  for (pthread_t thread : threads) pthread_join(thread, nullptr);
  // The engine ends with connections that have just begun.
  std::vector<UniqueFd> left;
  for (int i = 0; i < 4; i++) {
    std::vector<uint8_t> bytes;
    for (uint64_t cookie = 0; cookie < 100; cookie++) {
      harness::Append(bytes, {.flags = 0, .type = 0, .cookie = cookie, .offset = 0, .length = 2 << 20},
                      Headers::kStructured);
    }
    left.push_back(world.Connect(i % 3, Headers::kStructured, std::move(bytes), i == 0));
  }
}

}  // namespace

int main(int argc, char** argv) {
  signal(SIGPIPE, SIG_IGN);
  const uint64_t total = argc > 1 ? strtoull(argv[1], nullptr, 10) : 20'000;
  const uint64_t seed = argc > 2 ? strtoull(argv[2], nullptr, 10) : 1;
  TestProbes();
  TestTurnsOfThoseWhoLeave();
  TestSignals();
  TestLateWake();
  TestGather();
  for (int turn = 0; turn < 4; turn++) {
    static constexpr engine::CacheProbe kProbes[] = {
        engine::CacheProbe::kCachestat, engine::CacheProbe::kMincore, engine::CacheProbe::kNone};
    wanted += total / 4;
    Run(turn % 2 == 0, kProbes[turn % 3], seed + static_cast<uint64_t>(turn));
  }
  printf("%llu messages, %llu replies\n", static_cast<unsigned long long>(messages.load()),
         static_cast<unsigned long long>(replies.load()));
  harness::Require(replies.load() > total / 4, "hardly anything was answered");
  return 0;
}
