// SPDX-License-Identifier: Apache-2.0
// Whether to let a client's requests gather for a moment before the next receive.
//
// A client with many requests in flight that is slower than we are is answered request by request:
// a receive, a send and a wake-up each. A nap lets several come, for which one of each is enough.
// But a client most of whose requests are with us waits for our nap. How many it has in flight it
// does not tell, so it is tried out: now and then a nap is eight times as long, and must bring
// three times as much.
#ifndef STILLBLOCK_NATIVE_ENGINE_GATHER_H_
#define STILLBLOCK_NATIVE_ENGINE_GATHER_H_

#include <algorithm>
#include <cstdint>

namespace engine {

class Gather {
 public:
  static constexpr int64_t kNapNs = 60'000;
  static constexpr int64_t kTrialNs = 8 * kNapNs;

  // How long to sleep now, in nanoseconds; 0: not at all. To be asked when everything that has
  // come is answered, and followed by OnBurst(); a trial that is not is made again.
  int64_t NapNs(int64_t now_ns) {
    if (napping_) {
      trial_ = --naps_to_trial_ <= 0;
      return trial_ ? kTrialNs : kNapNs;
    }
    if (requests_ < next_trial_) return 0;
    // Only a client that asks all the time, and little at a time, is worth it.
    trial_ = now_ns - since_ns_ < requests_ * kBusyNs && requests_ < kLeast * receives_;
    requests_ = 0;
    return trial_ ? kTrialNs : 0;
  }

  // A receive has brought requests, or a nap none.
  void OnBurst(uint32_t requests, int64_t now_ns) {
    if (trial_) {
      trial_ = false;
      OnTrial(requests);
    } else if (napping_) {
      mean_ += (requests * kUnit - mean_) / 8;
      if (requests == 0 || mean_ < kLeast * kUnit) End();
    } else {
      if (requests_ == 0) {
        since_ns_ = now_ns;
        receives_ = 0;
      }
      requests_ += requests;
      receives_++;
    }
  }

 private:
  // Naps that bring fewer requests each cost more than they save.
  static constexpr int64_t kLeast = 4;
  static constexpr int64_t kTrialGain = 3;
  static constexpr int64_t kNapsToFirst = 32;
  static constexpr int64_t kNapsToNext = 1024;
  // A trial fails, too, when the client has not had a processor: only this many in turn count.
  static constexpr int kTrials = 3;
  // Requests before the first trial; each in vain makes the next one four times as rare.
  static constexpr int64_t kFirstTrial = 64;
  static constexpr int64_t kLastTrial = 1 << 14;
  static constexpr int64_t kBusyNs = 50'000;
  // mean_ counts in such parts of a request.
  static constexpr int64_t kUnit = 16;

  void OnTrial(uint32_t requests) {
    if (!napping_) {
      napping_ = requests >= kTrialGain * kLeast;
      mean_ = std::max(requests / kTrialGain, kLeast) * kUnit;
      naps_to_trial_ = kNapsToFirst;
      failed_ = 0;
      if (!napping_) End();
    } else if (requests * kUnit >= kTrialGain * mean_) {
      naps_to_trial_ = kNapsToNext;
      failed_ = 0;
      next_trial_ = kFirstTrial;
    } else if (++failed_ == kTrials) {
      End();
    } else {
      naps_to_trial_ = kNapsToFirst;
    }
  }

  void End() {
    napping_ = false;
    requests_ = 0;
    next_trial_ = std::min(next_trial_ * 4, kLastTrial);
  }

  bool napping_ = false;
  // The nap that comes back now is a trial.
  bool trial_ = false;
  int failed_ = 0;
  int64_t naps_to_trial_ = 0;
  // What a nap brings.
  int64_t mean_ = 0;
  // Without naps: requests and receives, and since when.
  int64_t requests_ = 0;
  int64_t receives_ = 0;
  int64_t since_ns_ = 0;
  int64_t next_trial_ = kFirstTrial;
};

}  // namespace engine

#endif  // STILLBLOCK_NATIVE_ENGINE_GATHER_H_
