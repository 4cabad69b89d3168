// SPDX-License-Identifier: Apache-2.0
/**
 * Refuses every request that is wrong in any way (section "Request types", "Flag
 * fields", "Error values"). What comes out can be carried out without asking again.
 */
import {
  NBD_CMD_BLOCK_STATUS,
  NBD_CMD_CACHE,
  NBD_CMD_DISC,
  NBD_CMD_FLAG_DF,
  NBD_CMD_FLAG_FUA,
  NBD_CMD_FLAG_PAYLOAD_LEN,
  NBD_CMD_FLAG_REQ_ONE,
  NBD_CMD_FLUSH,
  NBD_CMD_READ,
  NBD_CMD_TRIM,
  NBD_CMD_WRITE,
  NBD_CMD_WRITE_ZEROES,
} from './constants.ts';
import { NBD_EINVAL, NBD_EOVERFLOW, NBD_EPERM, type NbdError } from './errors.ts';
import type { Limits } from './limits.ts';
import { decodeStatusPayload, type HeaderStyle, type Request, statusPayloadBytes } from './wire.ts';

/** What a request may rely on: the outcome of the handshake. */
export interface RequestRules {
  readonly sizeBytes: number;
  readonly headers: HeaderStyle;
  /** Ids of the contexts selected for this export. */
  readonly contextIds: readonly number[];
  readonly limits: Limits;
}

/** A request that is right, or the error that it gets. */
export type ValidRequest =
  | {
      readonly kind: 'read';
      readonly offset: number;
      readonly length: number;
      readonly dontFragment: boolean;
    }
  | {
      readonly kind: 'status';
      readonly offset: number;
      readonly length: number;
      readonly requestOne: boolean;
      /** Ids of the contexts that the answer is about, all of them selected, at least one. */
      readonly contextIds: readonly number[];
    }
  /** A block status that says behind its header what it asks: {@link validateStatusPayload}. */
  | { readonly kind: 'statusPayload'; readonly payloadBytes: number }
  | { readonly kind: 'flush' }
  | { readonly kind: 'disconnect' }
  /** Nothing can be answered, and what follows is not to be believed. */
  | { readonly kind: 'violation'; readonly reason: string }
  | {
      readonly kind: 'refuse';
      readonly error: NbdError;
      readonly message: string;
      /** Bytes behind the request that belong to it and are to be thrown away. */
      readonly payloadBytes: number;
    };

function refuse(error: NbdError, message: string, payloadBytes = 0): ValidRequest {
  return { kind: 'refuse', error, message, payloadBytes };
}

/**
 * Whether `[offset, offset + length)` leaves the export. What is left behind the
 * offset is negative if that is beyond the end; nothing here can wrap around.
 */
function isBeyondEnd(offset: number, length: number, sizeBytes: number): boolean {
  return length > sizeBytes - offset;
}

function validateRead(request: Request, rules: RequestRules): ValidRequest {
  const allowed = NBD_CMD_FLAG_FUA | (rules.headers === 'simple' ? 0 : NBD_CMD_FLAG_DF);
  if ((request.flags & ~allowed) !== 0) {
    return refuse(NBD_EINVAL, 'flag is unknown or was not negotiated');
  }
  if (isBeyondEnd(request.offset, request.length, rules.sizeBytes)) {
    return refuse(NBD_EINVAL, 'read beyond the end of the export');
  }
  if (request.length > rules.limits.readBytes) {
    return refuse(NBD_EINVAL, 'read is longer than the maximum block size');
  }
  const dontFragment = (request.flags & NBD_CMD_FLAG_DF) !== 0;
  if (dontFragment && request.length > rules.limits.pieceBytes) {
    return refuse(NBD_EOVERFLOW, 'read is too long to be sent unfragmented');
  }
  return { kind: 'read', offset: request.offset, length: request.length, dontFragment };
}

function validateRange(
  request: Request,
  length: number,
  contextIds: readonly number[],
  rules: RequestRules,
): ValidRequest {
  if (length === 0) {
    return refuse(NBD_EINVAL, 'block status of no bytes');
  }
  if (isBeyondEnd(request.offset, length, rules.sizeBytes)) {
    return refuse(NBD_EINVAL, 'block status beyond the end of the export');
  }
  const requestOne = (request.flags & NBD_CMD_FLAG_REQ_ONE) !== 0;
  return { kind: 'status', offset: request.offset, length, requestOne, contextIds };
}

function validateStatus(request: Request, rules: RequestRules): ValidRequest {
  const { flags, length } = request;
  const payloadBytes = payloadOf(request, rules);
  const known =
    NBD_CMD_FLAG_FUA | NBD_CMD_FLAG_REQ_ONE | (payloadBytes > 0 ? NBD_CMD_FLAG_PAYLOAD_LEN : 0);
  if ((flags & ~known) !== 0) {
    return refuse(NBD_EINVAL, 'flag is unknown or was not negotiated', payloadBytes);
  }
  if (rules.headers === 'simple' || rules.contextIds.length === 0) {
    return refuse(NBD_EINVAL, 'no metadata context was selected for this export', payloadBytes);
  }
  if (payloadBytes === 0) {
    return validateRange(request, length, rules.contextIds, rules);
  }
  const ids = (payloadBytes - statusPayloadBytes(0)) / 4;
  return Number.isInteger(ids) && ids >= 1 && ids <= rules.contextIds.length
    ? { kind: 'statusPayload', payloadBytes }
    : refuse(NBD_EINVAL, 'payload does not list contexts', payloadBytes);
}

/**
 * Validates a block status by the payload that followed it, of as many bytes as
 * {@link validateRequest} said.
 */
export function validateStatusPayload(
  request: Request,
  payload: Buffer,
  rules: RequestRules,
): ValidRequest {
  const { length, contextIds } = decodeStatusPayload(payload);
  const unique = new Set(contextIds);
  if (unique.size < contextIds.length || contextIds.some((id) => !rules.contextIds.includes(id))) {
    return refuse(NBD_EINVAL, 'context was not selected, or is named twice');
  }
  return validateRange(request, length, contextIds, rules);
}

function validateFlush(request: Request): ValidRequest {
  if ((request.flags & ~NBD_CMD_FLAG_FUA) !== 0) {
    return refuse(NBD_EINVAL, 'flag is unknown or was not negotiated');
  }
  if (request.offset !== 0 || request.length !== 0) {
    return refuse(NBD_EINVAL, 'flush with an offset or a length');
  }
  return { kind: 'flush' };
}

/**
 * Bytes that follow an extended request because it says so, or because it writes: clients
 * that forget to say so, which they must, send their data all the same.
 */
function payloadOf({ flags, type, length }: Request, rules: RequestRules): number {
  const announced = (flags & NBD_CMD_FLAG_PAYLOAD_LEN) !== 0 || type === NBD_CMD_WRITE;
  return rules.headers === 'extended' && announced ? length : 0;
}

/** Validates a request that has no payload, or none that we refuse it for. */
function validateCommand(request: Request, rules: RequestRules): ValidRequest {
  switch (request.type) {
    case NBD_CMD_READ:
      return validateRead(request, rules);
    case NBD_CMD_BLOCK_STATUS:
      return validateStatus(request, rules);
    case NBD_CMD_FLUSH:
      return validateFlush(request);
    case NBD_CMD_DISC:
      // There is no reply to it, so there is nothing to refuse it with.
      return { kind: 'disconnect' };
    case NBD_CMD_WRITE:
      // In a compact request the length is that of the payload without being announced.
      return refuse(
        NBD_EPERM,
        'export is read-only',
        rules.headers === 'extended' ? payloadOf(request, rules) : request.length,
      );
    case NBD_CMD_TRIM:
    case NBD_CMD_WRITE_ZEROES:
      return refuse(NBD_EPERM, 'export is read-only');
    case NBD_CMD_CACHE:
      return refuse(NBD_EINVAL, 'caching is not offered');
    default:
      return refuse(NBD_EINVAL, 'command is unknown');
  }
}

/** Validates a request against what was negotiated. Total and without effects. */
export function validateRequest(request: Request, rules: RequestRules): ValidRequest {
  const payloadBytes = payloadOf(request, rules);
  if (payloadBytes > rules.limits.readBytes) {
    // "A server SHOULD initiate hard disconnect" (section "Request message").
    return { kind: 'violation', reason: 'payload is longer than the maximum' };
  }
  const takesPayload =
    request.type === NBD_CMD_WRITE ||
    request.type === NBD_CMD_BLOCK_STATUS ||
    request.type === NBD_CMD_DISC;
  return payloadBytes > 0 && !takesPayload
    ? refuse(NBD_EINVAL, 'command takes no payload', payloadBytes)
    : validateCommand(request, rules);
}
