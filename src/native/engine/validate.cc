// SPDX-License-Identifier: Apache-2.0
#include "validate.h"

#include <algorithm>

namespace engine {

namespace {

ValidRequest Refuse(uint32_t error, const char* message, uint64_t payload_bytes = 0) {
  return {.verdict = Verdict::kRefuse,
          .error = error,
          .message = message,
          .payload_bytes = payload_bytes};
}

bool IsBeyondEnd(uint64_t offset, uint64_t length, uint64_t size) {
  return offset > size || length > size - offset;
}

// Bytes that follow an extended request because it says so, or because it writes.
uint64_t PayloadOf(const Request& request, const Rules& rules) {
  bool announced = (request.flags & kFlagPayloadLen) || request.type == kCmdWrite;
  return rules.headers == Headers::kExtended && announced ? request.length : 0;
}

ValidRequest ValidateRead(const Request& request, const Rules& rules) {
  uint16_t allowed = kFlagFua | (rules.headers == Headers::kSimple ? 0 : kFlagDf);
  if (request.flags & ~allowed) return Refuse(kInval, "flag is unknown or was not negotiated");
  if (IsBeyondEnd(request.offset, request.length, rules.size_bytes)) {
    return Refuse(kInval, "read beyond the end of the export");
  }
  if (request.length > rules.limits.read_bytes) {
    return Refuse(kInval, "read is longer than the maximum block size");
  }
  bool dont_fragment = request.flags & kFlagDf;
  if (dont_fragment && request.length > rules.limits.piece_bytes) {
    return Refuse(kOverflow, "read is too long to be sent unfragmented");
  }
  return {.verdict = Verdict::kRead,
          .offset = request.offset,
          .length = request.length,
          .flag = dont_fragment};
}

ValidRequest ValidateRange(const Request& request, uint64_t length, const Rules& rules) {
  if (length == 0) return Refuse(kInval, "block status of no bytes");
  if (IsBeyondEnd(request.offset, length, rules.size_bytes)) {
    return Refuse(kInval, "block status beyond the end of the export");
  }
  return {.verdict = Verdict::kStatus,
          .offset = request.offset,
          .length = length,
          .flag = (request.flags & kFlagReqOne) != 0};
}

ValidRequest ValidateStatus(const Request& request, const Rules& rules) {
  uint64_t payload = PayloadOf(request, rules);
  uint16_t known = kFlagFua | kFlagReqOne | (payload > 0 ? kFlagPayloadLen : 0);
  if (request.flags & ~known) {
    return Refuse(kInval, "flag is unknown or was not negotiated", payload);
  }
  if (rules.headers == Headers::kSimple || rules.context_ids.empty()) {
    return Refuse(kInval, "no metadata context was selected for this export", payload);
  }
  if (payload == 0) return ValidateRange(request, request.length, rules);
  bool whole = payload > kStatusPayloadHeaderBytes && payload % 4 == 0;
  if (whole && (payload - kStatusPayloadHeaderBytes) / 4 <= rules.context_ids.size()) {
    return {.verdict = Verdict::kStatusPayload, .payload_bytes = payload};
  }
  return Refuse(kInval, "payload does not list contexts", payload);
}

ValidRequest ValidateFlush(const Request& request) {
  if (request.flags & ~kFlagFua) return Refuse(kInval, "flag is unknown or was not negotiated");
  if (request.offset != 0 || request.length != 0) {
    return Refuse(kInval, "flush with an offset or a length");
  }
  return {.verdict = Verdict::kFlush};
}

}  // namespace

ValidRequest Validate(const Request& request, const Rules& rules) {
  uint64_t payload = PayloadOf(request, rules);
  if (payload > rules.limits.read_bytes) {
    // "A server SHOULD initiate hard disconnect" (section "Request message").
    return {.verdict = Verdict::kViolation, .message = "payload is longer than the maximum"};
  }
  bool takes_payload = request.type == kCmdWrite || request.type == kCmdBlockStatus ||
                       request.type == kCmdDisc;
  if (payload > 0 && !takes_payload) return Refuse(kInval, "command takes no payload", payload);
  switch (request.type) {
    case kCmdRead:
      return ValidateRead(request, rules);
    case kCmdBlockStatus:
      return ValidateStatus(request, rules);
    case kCmdFlush:
      return ValidateFlush(request);
    case kCmdDisc:
      // There is no reply to it, so there is nothing to refuse it with.
      return {.verdict = Verdict::kDisconnect};
    case kCmdWrite:
      // In a compact request the length is that of the payload without being announced.
      return Refuse(kPerm, "export is read-only",
                    rules.headers == Headers::kExtended ? payload : request.length);
    case kCmdTrim:
    case kCmdWriteZeroes:
      return Refuse(kPerm, "export is read-only");
    case kCmdCache:
      return Refuse(kInval, "caching is not offered");
    default:
      return Refuse(kInval, "command is unknown");
  }
}

ValidRequest ValidateStatusPayload(const Request& request, const uint8_t* payload, size_t bytes,
                                   const Rules& rules, std::vector<uint32_t>& ids) {
  ids.clear();
  for (size_t at = kStatusPayloadHeaderBytes; at < bytes; at += 4) {
    uint32_t id = Get32(payload + at);
    bool selected = std::find(rules.context_ids.begin(), rules.context_ids.end(), id) !=
                    rules.context_ids.end();
    if (!selected || std::find(ids.begin(), ids.end(), id) != ids.end()) {
      return Refuse(kInval, "context was not selected, or is named twice");
    }
    ids.push_back(id);
  }
  return ValidateRange(request, Get64(payload), rules);
}

}  // namespace engine
