// SPDX-License-Identifier: Apache-2.0
#ifndef STILLBLOCK_NATIVE_UUID_H_
#define STILLBLOCK_NATIVE_UUID_H_

#include <linux/stillblock.h>

#include <string>

// The usual text of a UUID whose bytes are in its order, as the kernel's uuid_t are.
inline std::string UuidText(const __u8 (&bytes)[STILLBLOCK_UUID_SIZE]) {
  static constexpr char kDigits[] = "0123456789abcdef";
  std::string text;
  for (int i = 0; i < STILLBLOCK_UUID_SIZE; i++) {
    if (i == 4 || i == 6 || i == 8 || i == 10) text += '-';
    text += kDigits[bytes[i] >> 4];
    text += kDigits[bytes[i] & 0xf];
  }
  return text;
}

#endif  // STILLBLOCK_NATIVE_UUID_H_
