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
  NBD_CMD_FLAG_REQ_ONE,
  NBD_CMD_FLUSH,
  NBD_CMD_READ,
  NBD_CMD_TRIM,
  NBD_CMD_WRITE,
  NBD_CMD_WRITE_ZEROES,
} from './constants.ts';
import { NBD_EINVAL, NBD_EOVERFLOW, NBD_EPERM, type NbdError } from './errors.ts';
import type { Limits } from './limits.ts';
import type { Request } from './wire.ts';

/** What a request may rely on: the outcome of the handshake. */
export interface RequestRules {
  readonly sizeBytes: number;
  readonly structuredReplies: boolean;
  /** Number of contexts selected for this export. */
  readonly contexts: number;
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
    }
  | { readonly kind: 'flush' }
  | { readonly kind: 'disconnect' }
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
function isBeyondEnd(request: Request, sizeBytes: number): boolean {
  return request.length > sizeBytes - request.offset;
}

function validateRead(request: Request, rules: RequestRules): ValidRequest {
  const allowed = NBD_CMD_FLAG_FUA | (rules.structuredReplies ? NBD_CMD_FLAG_DF : 0);
  if ((request.flags & ~allowed) !== 0) {
    return refuse(NBD_EINVAL, 'flag is unknown or was not negotiated');
  }
  if (isBeyondEnd(request, rules.sizeBytes)) {
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

function validateStatus(request: Request, rules: RequestRules): ValidRequest {
  if ((request.flags & ~(NBD_CMD_FLAG_FUA | NBD_CMD_FLAG_REQ_ONE)) !== 0) {
    return refuse(NBD_EINVAL, 'flag is unknown or was not negotiated');
  }
  if (!rules.structuredReplies || rules.contexts === 0) {
    return refuse(NBD_EINVAL, 'no metadata context was selected for this export');
  }
  if (request.length === 0) {
    return refuse(NBD_EINVAL, 'block status of no bytes');
  }
  if (isBeyondEnd(request, rules.sizeBytes)) {
    return refuse(NBD_EINVAL, 'block status beyond the end of the export');
  }
  const requestOne = (request.flags & NBD_CMD_FLAG_REQ_ONE) !== 0;
  return { kind: 'status', offset: request.offset, length: request.length, requestOne };
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

/** Validates a request against what was negotiated. Total and without effects. */
export function validateRequest(request: Request, rules: RequestRules): ValidRequest {
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
      return refuse(NBD_EPERM, 'export is read-only', request.length);
    case NBD_CMD_TRIM:
    case NBD_CMD_WRITE_ZEROES:
      return refuse(NBD_EPERM, 'export is read-only');
    case NBD_CMD_CACHE:
      return refuse(NBD_EINVAL, 'caching is not offered');
    default:
      return refuse(NBD_EINVAL, 'command is unknown');
  }
}
