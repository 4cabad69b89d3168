// SPDX-License-Identifier: Apache-2.0
// What is counted for each export, as nbd/figures.ts has it: totals that only grow.
#ifndef STILLBLOCK_NATIVE_ENGINE_FIGURES_H_
#define STILLBLOCK_NATIVE_ENGINE_FIGURES_H_

#include <array>
#include <atomic>
#include <cstdint>

namespace engine {

enum class RequestKind : uint8_t { kRead, kBlockStatus, kOther };
constexpr size_t kRequestKinds = 3;

// Upper bounds of the classes of durations, nanoseconds; a last class has none.
constexpr std::array<int64_t, 13> kDurationBoundsNs = {
    30'000,        100'000,       300'000,         1'000'000,       3'000'000,
    10'000'000,    30'000'000,    100'000'000,     300'000'000,     1'000'000'000,
    3'000'000'000, 10'000'000'000, 30'000'000'000};
constexpr size_t kDurationClasses = kDurationBoundsNs.size() + 1;

template <typename Number>
struct Counts {
  Number read_bytes{};
  struct Kind {
    Number errors{};
    Number nanoseconds{};
    std::array<Number, kDurationClasses> durations{};
  };
  std::array<Kind, kRequestKinds> kinds{};

  // Calls a function with each number of this and of another, in one fixed order.
  template <typename Other, typename Each>
  void Zip(Counts<Other>& other, Each each) {
    each(read_bytes, other.read_bytes);
    for (size_t kind = 0; kind < kRequestKinds; kind++) {
      each(kinds[kind].errors, other.kinds[kind].errors);
      each(kinds[kind].nanoseconds, other.kinds[kind].nanoseconds);
      for (size_t i = 0; i < kDurationClasses; i++) {
        each(kinds[kind].durations[i], other.kinds[kind].durations[i]);
      }
    }
  }
};

// What one worker counts between two visits to the totals.
class Tally : public Counts<uint64_t> {
 public:
  void Count(RequestKind kind, int64_t duration_ns, bool failed) {
    Kind& counted = kinds[static_cast<size_t>(kind)];
    size_t index = 0;
    while (index < kDurationBoundsNs.size() && duration_ns > kDurationBoundsNs[index]) index++;
    counted.durations[index]++;
    counted.nanoseconds += static_cast<uint64_t>(duration_ns);
    counted.errors += failed;
    dirty = true;
  }
  bool dirty = false;
};

// The totals over all workers. Each number is right by itself; together they need not be of one
// instant.
class Totals : public Counts<std::atomic<uint64_t>> {
 public:
  void Add(Tally& tally) {
    Zip(tally, [](std::atomic<uint64_t>& total, uint64_t& part) {
      if (part) total.fetch_add(part, std::memory_order_relaxed);
      part = 0;
    });
    tally.dirty = false;
  }
};

}  // namespace engine

#endif  // STILLBLOCK_NATIVE_ENGINE_FIGURES_H_
