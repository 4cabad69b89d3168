// SPDX-License-Identifier: Apache-2.0
// A target of libFuzzer: the input is what a client says on one connection. Its first byte chooses
// the style of headers, the export, the transport and how the rest is cut.
#include "harness.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static harness::World* world = [] {
    signal(SIGPIPE, SIG_IGN);
    return new harness::World(true, engine::CacheProbe::kCachestat);
  }();
  if (size < 2) return 0;
  const auto headers = static_cast<engine::Headers>(data[0] % 3);
  const int served = (data[0] / 3) % harness::World::kExports;
  const bool tcp = (data[0] & 0x80) != 0;
  harness::Random random(data[1]);
  std::vector<uint8_t> bytes(data + 2, data + size);
  std::vector<uint8_t> first;
  if (data[1] & 1) first.swap(bytes);
  harness::Converse(*world, world->Connect(served, headers, std::move(first), tcp), bytes, random,
                    nullptr, false);
  return 0;
}
