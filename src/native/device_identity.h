// SPDX-License-Identifier: Apache-2.0
// What tells a block device from all others in every boot, and where its node is: from sysfs,
// since there may be no udev yet. The addon and stillblock-early have to agree on it.
#ifndef STILLBLOCK_NATIVE_DEVICE_IDENTITY_H_
#define STILLBLOCK_NATIVE_DEVICE_IDENTITY_H_

#include <limits.h>
#include <linux/stillblock.h>
#include <stdlib.h>
#include <string.h>

#include <fstream>
#include <string>

namespace device_identity {

// All of a small file of sysfs or procfs without the space around it; empty if it is not there,
// or cannot be read, as the wwid of a SCSI disk that has none.
inline std::string ReadAttribute(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::string text;
  // An istreambuf_iterator would throw at a read that fails.
  std::getline(file, text, '\0');
  if (file.bad()) return {};
  size_t first = text.find_first_not_of(" \t\n");
  if (first == std::string::npos) return {};
  return text.substr(first, text.find_last_not_of(" \t\n") - first + 1);
}

inline std::string Folder(unsigned int major, unsigned int minor) {
  return "/sys/dev/block/" + std::to_string(major) + ":" + std::to_string(minor);
}

// Of a whole device: what it was given when it was made, or, where it tells nothing, its slot.
inline std::string OfWhole(const std::string& folder) {
  static constexpr struct {
    const char* file;
    const char* kind;
  } kSources[] = {
      {"/dm/uuid", "dm:"},          {"/md/uuid", "md:"},       {"/wwid", "wwid:"},
      {"/device/wwid", "wwid:"},    {"/serial", "serial:"},    {"/device/serial", "serial:"},
      {"/loop/backing_file", "loop:"},
  };
  for (const auto& source : kSources) {
    std::string text = ReadAttribute(folder + source.file);
    if (!text.empty()) return source.kind + text;
  }
  char real[PATH_MAX];
  return realpath(folder.c_str(), real) ? std::string("slot:") + real : std::string();
}

// Empty for a device that is not there. One that does not fit is cut: the module compares
// fingerprints, too, and refuses two devices of one identity.
inline std::string Of(unsigned int major, unsigned int minor) {
  std::string folder = Folder(major, minor);
  std::string partition = ReadAttribute(folder + "/partition");
  char real[PATH_MAX];
  if (!realpath(folder.c_str(), real)) return {};
  std::string identity = partition.empty()
                             ? OfWhole(folder)
                             : "part" + partition + " of " + OfWhole(std::string(real) + "/..");
  // A word of a line, for stillblock-early.
  for (char& c : identity) {
    if (static_cast<unsigned char>(c) <= ' ') c = '_';
  }
  return identity.substr(0, STILLBLOCK_IDENTITY_SIZE - 1);
}

inline std::string Node(unsigned int major, unsigned int minor) {
  std::ifstream file(Folder(major, minor) + "/uevent");
  for (std::string line; std::getline(file, line);) {
    if (line.compare(0, 8, "DEVNAME=") == 0) return "/dev/" + line.substr(8);
  }
  return {};
}

// False if this boot cannot be told from others.
inline bool BootId(__u8 (&id)[STILLBLOCK_UUID_SIZE]) {
  std::string digits;
  for (char c : ReadAttribute("/proc/sys/kernel/random/boot_id")) {
    if (c != '-') digits += c;
  }
  if (digits.size() != 2 * STILLBLOCK_UUID_SIZE) return false;
  for (size_t i = 0; i < STILLBLOCK_UUID_SIZE; i++) {
    id[i] = static_cast<__u8>(strtoul(digits.substr(2 * i, 2).c_str(), nullptr, 16));
  }
  return true;
}

}  // namespace device_identity

#endif  // STILLBLOCK_NATIVE_DEVICE_IDENTITY_H_
