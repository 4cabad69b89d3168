// SPDX-License-Identifier: Apache-2.0
// stillblock-early PLAN [NODE]: sets the place of the histories and tracks the devices of a plan,
// as far as they are there, before anything is mounted: all, or the one of a node. For an
// initramfs and for udev. What is set and tracked already stays, and a place that was refused
// once in this boot is the daemon's to set; src/history.ts writes the plan.
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/stillblock.h>
#include <linux/stillblock_assert.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <map>
#include <sstream>
#include <string>
#include <vector>

#include "device_identity.h"
#include "unique_fd.h"

namespace {

struct PlannedDevice {
  std::string identity;
  uint32_t block_size = 0;
};

struct Plan {
  std::string place;
  std::vector<struct stillblock_extent> extents;
  std::vector<PlannedDevice> devices;
};

// False for anything but what src/history.ts writes: a plan that is half there is none.
bool ReadPlan(const char* path, Plan& plan) {
  std::ifstream file(path);
  if (!file) return false;
  for (std::string line; std::getline(file, line);) {
    std::istringstream words(line);
    std::string kind;
    words >> kind;
    if (kind == "place") {
      if (!(words >> plan.place)) return false;
      for (std::string word; words >> word;) {
        unsigned long long offset = 0, length = 0;
        if (sscanf(word.c_str(), "%llu:%llu", &offset, &length) != 2) return false;
        plan.extents.push_back({offset, length});
      }
    } else if (kind == "device") {
      PlannedDevice device;
      if (!(words >> device.identity >> device.block_size)) return false;
      plan.devices.push_back(device);
    } else {
      return false;
    }
  }
  return true;
}

// Nodes of all block devices by identity; none for two devices of one identity.
std::map<std::string, std::string> FindNodes() {
  std::map<std::string, std::string> nodes;
  DIR* folder = opendir("/sys/dev/block");
  if (!folder) return nodes;
  while (const struct dirent* entry = readdir(folder)) {
    unsigned int major = 0, minor = 0;
    if (sscanf(entry->d_name, "%u:%u", &major, &minor) != 2) continue;
    std::string identity = device_identity::Of(major, minor);
    std::string node = device_identity::Node(major, minor);
    if (identity.empty() || node.empty()) continue;
    auto [known, fresh] = nodes.try_emplace(identity, node);
    if (!fresh) known->second.clear();
  }
  closedir(folder);
  return nodes;
}

void SetPlace(int control, const Plan& plan, const std::map<std::string, std::string>& nodes) {
  auto found = nodes.find(plan.place);
  if (found == nodes.end() || found->second.empty()) return;
  UniqueFd bdev(open(found->second.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (!bdev.valid()) return;
  struct stillblock_place place = {};
  // One of us runs for each device that appears, and the daemon may have decided meanwhile.
  place.flags = STILLBLOCK_PLACE_UNLESS;
  place.bdev_fd = bdev.get();
  place.file_fd = -1;
  place.extents = reinterpret_cast<uintptr_t>(plan.extents.data());
  place.nr_extents = static_cast<uint32_t>(plan.extents.size());
  if (!device_identity::BootId(place.boot_id)) return;
  if (ioctl(control, STILLBLOCK_IOC_PLACE, &place) != 0 &&
      place.reason != STILLBLOCK_REASON_PLACE_BUSY) {
    fprintf(stderr, "stillblock-early: %s: no histories (reason %u, %u): %s\n",
            found->second.c_str(), place.reason, place.history, strerror(errno));
  }
}

bool Attach(int control, const PlannedDevice& device, const std::string& node) {
  UniqueFd bdev(open(node.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (!bdev.valid()) return false;
  struct stillblock_attach attach = {};
  attach.bdev_fd = bdev.get();
  attach.block_size = device.block_size;
  std::copy(device.identity.begin(), device.identity.end(), attach.identity);
  if (ioctl(control, STILLBLOCK_IOC_ATTACH, &attach) == 0) return true;
  if (attach.reason == STILLBLOCK_REASON_ALREADY_ATTACHED) return true;
  fprintf(stderr, "stillblock-early: %s is not tracked (reason %u): %s\n", node.c_str(),
          attach.reason, strerror(errno));
  return false;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2 || argc > 3) {
    fprintf(stderr, "usage: stillblock-early PLAN [NODE]\n");
    return 2;
  }
  Plan plan;
  if (!ReadPlan(argv[1], plan)) {
    fprintf(stderr, "stillblock-early: %s is no plan; restart stillblock.service\n", argv[1]);
    return 1;
  }
  UniqueFd control(open(STILLBLOCK_DEVICE, O_RDWR | O_CLOEXEC));
  if (!control.valid()) {
    fprintf(stderr, "stillblock-early: %s: %s\n", STILLBLOCK_DEVICE, strerror(errno));
    return 1;
  }
  auto nodes = FindNodes();
  SetPlace(control.get(), plan, nodes);
  bool all = true;
  for (const PlannedDevice& device : plan.devices) {
    auto found = nodes.find(device.identity);
    if (device.identity.size() >= STILLBLOCK_IDENTITY_SIZE || found == nodes.end() ||
        found->second.empty() || (argc == 3 && found->second != argv[2])) {
      continue;
    }
    all = Attach(control.get(), device, found->second) && all;
  }
  return all ? 0 : 1;
}
