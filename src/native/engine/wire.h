// SPDX-License-Identifier: Apache-2.0
// The bytes of the transmission phase (section "Transmission" of the NBD protocol), as nbd/wire.ts
// has them: what both engines answer is the same to the byte. All numbers are big-endian.
#ifndef STILLBLOCK_NATIVE_ENGINE_WIRE_H_
#define STILLBLOCK_NATIVE_ENGINE_WIRE_H_

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace engine {

constexpr uint32_t kRequestMagic = 0x25609513;
constexpr uint32_t kExtendedRequestMagic = 0x21e41c71;
constexpr uint32_t kSimpleReplyMagic = 0x67446698;
constexpr uint32_t kStructuredReplyMagic = 0x668e33ef;
constexpr uint32_t kExtendedReplyMagic = 0x6e8a278c;

constexpr uint16_t kCmdRead = 0;
constexpr uint16_t kCmdWrite = 1;
constexpr uint16_t kCmdDisc = 2;
constexpr uint16_t kCmdFlush = 3;
constexpr uint16_t kCmdTrim = 4;
constexpr uint16_t kCmdCache = 5;
constexpr uint16_t kCmdWriteZeroes = 6;
constexpr uint16_t kCmdBlockStatus = 7;

constexpr uint16_t kFlagFua = 0x0001;
constexpr uint16_t kFlagDf = 0x0004;
constexpr uint16_t kFlagReqOne = 0x0008;
constexpr uint16_t kFlagPayloadLen = 0x0020;

constexpr uint16_t kReplyFlagDone = 0x0001;
constexpr uint16_t kReplyNone = 0;
constexpr uint16_t kReplyOffsetData = 1;
constexpr uint16_t kReplyOffsetHole = 2;
constexpr uint16_t kReplyBlockStatus = 5;
constexpr uint16_t kReplyBlockStatusExt = 6;
constexpr uint16_t kReplyError = 0x8001;
constexpr uint16_t kReplyErrorOffset = 0x8002;

constexpr uint32_t kStateZero = 0x0002;

constexpr uint32_t kPerm = 1;
constexpr uint32_t kIo = 5;
constexpr uint32_t kNoMem = 12;
constexpr uint32_t kInval = 22;
constexpr uint32_t kOverflow = 75;

constexpr size_t kRequestBytes = 28;
constexpr size_t kExtendedRequestBytes = 32;
constexpr size_t kSimpleReplyBytes = 16;
// What precedes the ids in the payload of a BLOCK_STATUS: the effect length.
constexpr size_t kStatusPayloadHeaderBytes = 8;

// Which messages a connection exchanges.
enum class Headers : uint8_t { kSimple, kStructured, kExtended };

inline uint16_t Get16(const uint8_t* at) {
  uint16_t value;
  std::memcpy(&value, at, sizeof(value));
  return __builtin_bswap16(value);
}
inline uint32_t Get32(const uint8_t* at) {
  uint32_t value;
  std::memcpy(&value, at, sizeof(value));
  return __builtin_bswap32(value);
}
inline uint64_t Get64(const uint8_t* at) {
  uint64_t value;
  std::memcpy(&value, at, sizeof(value));
  return __builtin_bswap64(value);
}
inline uint8_t* Put16(uint8_t* at, uint16_t value) {
  value = __builtin_bswap16(value);
  std::memcpy(at, &value, sizeof(value));
  return at + sizeof(value);
}
inline uint8_t* Put32(uint8_t* at, uint32_t value) {
  value = __builtin_bswap32(value);
  std::memcpy(at, &value, sizeof(value));
  return at + sizeof(value);
}
inline uint8_t* Put64(uint8_t* at, uint64_t value) {
  value = __builtin_bswap64(value);
  std::memcpy(at, &value, sizeof(value));
  return at + sizeof(value);
}

// A request as it was sent, not yet validated. In an extended request with PAYLOAD_LEN the length
// is that of the payload.
struct Request {
  uint16_t flags;
  uint16_t type;
  uint64_t cookie;
  uint64_t offset;
  uint64_t length;
};

inline size_t RequestBytes(Headers headers) {
  return headers == Headers::kExtended ? kExtendedRequestBytes : kRequestBytes;
}

inline uint32_t RequestMagic(Headers headers) {
  return headers == Headers::kExtended ? kExtendedRequestMagic : kRequestMagic;
}

//  0  u32 magic   4  u16 flags   6  u16 type   8  u64 cookie   16  u64 offset
// 24  u32 length, extended: u64
inline Request DecodeRequest(const uint8_t* at, Headers headers) {
  return {.flags = Get16(at + 4),
          .type = Get16(at + 6),
          .cookie = Get64(at + 8),
          .offset = Get64(at + 16),
          .length = headers == Headers::kExtended ? Get64(at + 24) : Get32(at + 24)};
}

// What a reply repeats of its request.
struct ReplyTarget {
  uint64_t cookie;
  uint64_t offset;
};

// Bytes of the header of each chunk.
inline size_t ChunkHeaderBytes(Headers headers) {
  return headers == Headers::kExtended ? 32 : 20;
}

// Bytes in front of the data of a read.
inline size_t DataHeaderBytes(Headers headers) {
  return headers == Headers::kSimple ? kSimpleReplyBytes : ChunkHeaderBytes(headers) + 8;
}

inline uint8_t* PutSimpleReply(uint8_t* at, const ReplyTarget& to, uint32_t error) {
  at = Put32(at, kSimpleReplyMagic);
  at = Put32(at, error);
  return Put64(at, to.cookie);
}

//  0  u32 magic   4  u16 flags   6  u16 type   8  u64 cookie
// 16  u32 length of the payload; extended: u64 offset of the request, u64 length
inline uint8_t* PutChunkHeader(uint8_t* at, Headers headers, const ReplyTarget& to, uint16_t flags,
                               uint16_t type, uint64_t payload_bytes) {
  bool extended = headers == Headers::kExtended;
  at = Put32(at, extended ? kExtendedReplyMagic : kStructuredReplyMagic);
  at = Put16(at, flags);
  at = Put16(at, type);
  at = Put64(at, to.cookie);
  if (!extended) return Put32(at, static_cast<uint32_t>(payload_bytes));
  at = Put64(at, to.offset);
  return Put64(at, payload_bytes);
}

// The header in front of the data of a read, for any style.
inline uint8_t* PutDataHeader(uint8_t* at, Headers headers, const ReplyTarget& to, bool done,
                              uint64_t offset, uint64_t data_bytes) {
  if (headers == Headers::kSimple) return PutSimpleReply(at, to, 0);
  at = PutChunkHeader(at, headers, to, done ? kReplyFlagDone : 0, kReplyOffsetData, 8 + data_bytes);
  return Put64(at, offset);
}

inline size_t ExtentBytes(Headers headers) { return headers == Headers::kExtended ? 16 : 8; }

// Bytes of a BLOCK_STATUS or BLOCK_STATUS_EXT chunk with so many extents.
inline size_t StatusChunkBytes(size_t extents, Headers headers) {
  return ChunkHeaderBytes(headers) + (headers == Headers::kExtended ? 8 : 4) +
         extents * ExtentBytes(headers);
}

}  // namespace engine

#endif  // STILLBLOCK_NATIVE_ENGINE_WIRE_H_
