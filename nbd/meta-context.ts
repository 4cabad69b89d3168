// SPDX-License-Identifier: Apache-2.0
/**
 * Which contexts a query means (section "Metadata querying" and QEMU's
 * docs/interop/nbd.txt), and what a BLOCK_STATUS reply covers.
 */
import { BASE_ALLOCATION, DIRTY_BITMAP_PREFIX } from './constants.ts';
import type { ExtentMap } from './extents.ts';
import { statusChunkBytes } from './wire.ts';

/** A context that a connection has selected. */
export interface SelectedContext {
  readonly id: number;
  readonly name: string;
  readonly map: ExtentMap;
}

/** Wildcards of LIST_META_CONTEXT, with the prefix of the names that they stand for. */
const WILDCARDS: ReadonlyMap<string, string> = new Map([
  ['base:', BASE_ALLOCATION],
  ['qemu:', DIRTY_BITMAP_PREFIX],
  [DIRTY_BITMAP_PREFIX, DIRTY_BITMAP_PREFIX],
]);

/**
 * Names that LIST_META_CONTEXT answers, each once, in the export's order.
 *
 * @param available names of the export's contexts
 * @param queries none means all; unknown names and namespaces match nothing
 */
export function listContexts(
  available: ReadonlyMap<string, ExtentMap>,
  queries: readonly string[],
): string[] {
  if (queries.length === 0) {
    return [...available.keys()];
  }
  const exact = new Set(queries);
  const prefixes = queries
    .map((query) => WILDCARDS.get(query))
    .filter((prefix) => prefix !== undefined);
  const unique = [...new Set(prefixes)];
  return [...available.keys()].filter(
    (name) => exact.has(name) || unique.some((prefix) => name.startsWith(prefix)),
  );
}

/**
 * Contexts that SET_META_CONTEXT selects, each once, whatever was repeated. Only
 * exact names select; an id is the context's place in its export and so is the
 * same on every connection.
 */
export function selectContexts(
  available: ReadonlyMap<string, ExtentMap>,
  queries: readonly string[],
): SelectedContext[] {
  const wanted = new Set(queries);
  return [...available]
    .map(([name, map], id) => ({ id, name, map }))
    .filter(({ name }) => wanted.has(name));
}

/** The part of a question that one BLOCK_STATUS reply answers. */
export interface StatusRange {
  readonly offset: number;
  readonly end: number;
  /** Bytes of the whole reply. */
  readonly replyBytes: number;
}

/**
 * Decides how far a BLOCK_STATUS reply goes, so that every context describes the
 * same bytes and no reply has more extents than allowed. Where it ends early, it
 * ends between two runs of a context: no answer depends on where it was cut.
 *
 * @param offset start of the question, bytes
 * @param lengthBytes its length, nonzero, within the export
 * @param extents most extents in the reply, at least one per context
 * @param requestOne one extent per context (NBD_CMD_FLAG_REQ_ONE)
 * @param extended whether the reply is an extended one, with half as many extents
 */
export function statusRange(
  contexts: readonly SelectedContext[],
  offset: number,
  lengthBytes: number,
  extents: number,
  requestOne: boolean,
  extended: boolean,
): StatusRange {
  // An extended extent takes twice the bytes: half as many fit into a reply of the same size.
  const most = extended ? extents / 2 : extents;
  const share = requestOne ? 1 : Math.max(1, Math.floor(most / contexts.length));
  let end = offset + lengthBytes;
  for (const { map } of contexts) {
    end = Math.min(end, map.startOf(map.indexAt(offset) + share));
  }
  let replyBytes = 0;
  for (const { map } of contexts) {
    replyBytes += statusChunkBytes(map.indexAt(end - 1) - map.indexAt(offset) + 1, extended);
  }
  return { offset, end, replyBytes };
}
