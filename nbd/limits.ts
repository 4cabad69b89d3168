// SPDX-License-Identifier: Apache-2.0
/** Everything that a peer could make us hold, wait for or repeat, and how much of it we allow. */

const KIB = 1024;
const MIB = 1024 * KIB;

/** The bounds of one server. All of them hold per server unless the name says otherwise. */
export interface Limits {
  /** Longest data of one option, bytes. Longer ones are not read: the connection ends. */
  readonly optionBytes: number;
  /** Options in one handshake; the connection ends at the next one. */
  readonly options: number;
  /** Time from accepting a connection to the end of its handshake, milliseconds. */
  readonly handshakeMs: number;
  /** Connections in handshake; the oldest of them makes room for one more. */
  readonly handshakes: number;
  /** Connections in transmission; GO is answered ERR_POLICY beyond it. */
  readonly connections: number;
  /** Queries in one LIST_META_CONTEXT or SET_META_CONTEXT; ERR_TOO_BIG beyond it. */
  readonly queries: number;
  /** Contexts selected on one connection; ERR_TOO_BIG beyond it. */
  readonly contexts: number;
  /** Requests of one connection that are read but not answered; then its socket is not read. */
  readonly requestsInFlight: number;
  /** Data of one connection that is being read or sent, bytes. */
  readonly connectionBytesInFlight: number;
  /** Data of all connections that is being read or sent, bytes, beyond one piece for each. */
  readonly bytesInFlight: number;
  /** Largest piece in which a read is done and sent, bytes. */
  readonly pieceBytes: number;
  /** Extents in one BLOCK_STATUS reply, over all its contexts. */
  readonly statusExtents: number;
  /** Longest read that is served, bytes; announced as the maximum block size. */
  readonly readBytes: number;
  /** Freed buffers kept for the next reads, bytes. */
  readonly idleBufferBytes: number;
  /** Time that replies in flight have to leave when an export or the server ends, milliseconds. */
  readonly drainMs: number;
}

export const DEFAULT_LIMITS: Limits = {
  // Sixteen queries of the greatest length, or hundreds of usual ones, in one option.
  optionBytes: 64 * KIB,
  // One connection that lists 2,000 exports asks INFO and LIST_META_CONTEXT for each.
  options: 4_096,
  // A handshake takes a handful of round trips; a satellite link does ten in this time.
  handshakeMs: 10_000,
  // More than the 250 held connections that must not delay a good client, and it is no more
  // than a queue: a newcomer replaces the oldest.
  handshakes: 256,
  // 500 idle clients are a fleet's worth of backup jobs against one server.
  connections: 512,
  // A client asks for base:allocation and a checkpoint or two; qemu and libnbd never above 3.
  queries: 256,
  // All the base points that the longest chain among our peers keeps, and base:allocation.
  contexts: 256,
  // nbdcopy's and the kernel's queues hold 64 and 128.
  requestsInFlight: 128,
  // nbdcopy's default of 64 requests of 256 KiB.
  connectionBytesInFlight: 16 * MIB,
  // Keeps the fastest link busy; peers that do not fetch their replies cannot hold more, and
  // leave each other connection the piece that it is always granted.
  bytesInFlight: 128 * MIB,
  // Large enough that headers and wake-ups cost nothing, small enough to hold 512 of them.
  pieceBytes: MIB,
  // The specification allows 2^20; 2^17 extents are as many bytes as a piece, and hold a
  // question of 4 GiB cut into 64 KiB blocks for two contexts. The client asks on.
  statusExtents: 1 << 17,
  // The length that the specification lets any client use unasked.
  readBytes: 32 * MIB,
  // Four connections in full swing find all their buffers again.
  idleBufferBytes: 64 * MIB,
  // Enough to send what is in flight to a client that reads, short for one that does not.
  drainMs: 5_000,
};

/** A socket's unread and unparsed input, in Node's own pieces. */
const INPUT_BYTES = 2 * 64 * KIB;
/** A request that waits: its promise, its closures, its place in queues. */
const REQUEST_BYTES = 2 * KIB;
/** Buffers come in powers of two. */
const BUFFER_OVERHEAD = 2;
/** Within TLS what is sent is put together, then encrypted: two copies more. */
const TLS_COPIES = 2;
/** OpenSSL's session, its record buffers, and Node's objects around it. */
const TLS_SESSION_BYTES = 128 * KIB;

/**
 * Most memory that clients together can make the server hold, whatever they ask and however
 * slowly they fetch it, bytes. What the kernel keeps in socket buffers is not in it.
 *
 * @param tls whether any of them may be within TLS
 */
export function mostClientBytes(limits: Limits, tls = false): number {
  const { connections, handshakes, requestsInFlight } = limits;
  const copies = BUFFER_OVERHEAD + (tls ? TLS_COPIES : 0);
  const session = INPUT_BYTES + (tls ? TLS_SESSION_BYTES : 0);
  const transmission = copies * limits.pieceBytes + requestsInFlight * REQUEST_BYTES;
  return (
    connections * (session + transmission) +
    handshakes * (session + 2 * limits.optionBytes) +
    copies * limits.bytesInFlight +
    limits.idleBufferBytes
  );
}

/**
 * Completes and checks limits.
 *
 * @throws RangeError if one is not a positive whole number, or two contradict each other
 */
export function resolveLimits(given: Partial<Limits> = {}): Limits {
  const limits: Limits = { ...DEFAULT_LIMITS, ...given };
  for (const [name, value] of Object.entries(limits)) {
    if (!Number.isSafeInteger(value) || value <= 0) {
      throw new RangeError(`limit ${name} is not a positive whole number: ${value}`);
    }
  }
  if (limits.connectionBytesInFlight < limits.pieceBytes) {
    throw new RangeError('limit connectionBytesInFlight is smaller than pieceBytes');
  }
  if (limits.statusExtents < limits.contexts) {
    throw new RangeError('limit statusExtents is smaller than contexts');
  }
  return limits;
}
