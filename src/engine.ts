// SPDX-License-Identifier: Apache-2.0
/** The native engine behind the interface of `nbd/engine.ts`: exports that are a descriptor. */
import { BASE_ALLOCATION } from '../nbd/constants.ts';
import type { ServedSocket, SocketEngine, SocketEngineFactory, Takeover } from '../nbd/engine.ts';
import type { Export } from '../nbd/export.ts';
import {
  DURATION_BOUNDS_SECONDS,
  type ExportFigures,
  REQUEST_KINDS,
  type RequestFigures,
} from '../nbd/figures.ts';
import type { Limits } from '../nbd/limits.ts';
import type { Logger } from '../nbd/logger.ts';
import { type NativeEngine, type NativeEngineEvent, openEngine } from './native.ts';

const HEADERS = { simple: 0, structured: 1, extended: 2 } as const;
const NS_PER_S = 1e9;

/** Of the addon's numbers: the bytes, then for each kind errors, nanoseconds and all classes. */
function toFigures(numbers: Float64Array): ExportFigures {
  const classes = DURATION_BOUNDS_SECONDS.length + 1;
  const kind = (index: number): RequestFigures => {
    const at = 1 + index * (2 + classes);
    return {
      errors: numbers[at] ?? 0,
      seconds: (numbers[at + 1] ?? 0) / NS_PER_S,
      durations: [...numbers.subarray(at + 2, at + 2 + classes)],
    };
  };
  const [read, blockStatus, other] = REQUEST_KINDS.map((_, index) => kind(index));
  if (read === undefined || blockStatus === undefined || other === undefined) {
    throw new Error('kinds of requests are missing');
  }
  return { readBytes: numbers[0] ?? 0, requests: { read, block_status: blockStatus, other } };
}

class Engine implements SocketEngine {
  readonly #native: NativeEngine;
  /** Ids of exports that have been handed over. */
  readonly #exports = new Map<Export, number>();
  readonly #failed = new WeakSet<Export>();
  readonly #connections = new Map<number, Takeover>();
  readonly #leaving = new Map<number, () => void>();

  constructor(limits: Limits, ring: boolean) {
    this.#native = openEngine({ ...limits, ring }, (event) => this.#onEvent(event));
  }

  #onEvent(event: NativeEngineEvent): void {
    switch (event.kind) {
      case 'closed': {
        const takeover = this.#connections.get(event.id);
        this.#connections.delete(event.id);
        this.#keepAlive();
        takeover?.onClosed(event.reason, event.peersFault);
        return;
      }
      case 'readFailed':
        this.#connections.get(event.id)?.onReadFailed(event.code, event.offset, event.length);
        return;
      case 'exportGone':
        this.#native.removeExport(event.id);
        this.#leaving.get(event.id)?.();
        this.#leaving.delete(event.id);
        this.#keepAlive();
        return;
      default:
        event satisfies never;
    }
  }

  /** The process goes on as long as somebody is served or waited for. */
  #keepAlive(): void {
    this.#native.keepAlive(this.#connections.size + this.#leaving.size > 0);
  }

  /** Hands an export's descriptor and extents over, once. */
  #idOf(served: Export): number | undefined {
    const known = this.#exports.get(served);
    const { descriptor, sizeBytes } = served.source;
    if (known !== undefined || descriptor === undefined) {
      return known;
    }
    const allocation = [...served.contexts.keys()].indexOf(BASE_ALLOCATION);
    const id = this.#native.addExport({
      fd: descriptor.fd,
      sizeBytes,
      forget: descriptor.forgets,
      contexts: [...served.contexts.values()].map((map) => map.arrays),
      ...(allocation >= 0 && { allocation }),
      caps: [...(served.bandwidth ?? [])],
    });
    this.#exports.set(served, id);
    if (this.#failed.has(served)) {
      this.#native.failExport(id);
    }
    return id;
  }

  serve(takeover: Takeover): ServedSocket | undefined {
    const { agreement, descriptor, received, tls } = takeover;
    const served = this.#idOf(agreement.export);
    if (served === undefined) {
      return undefined;
    }
    const contextIds = agreement.contexts.map(({ id }) => id);
    const headers = HEADERS[agreement.headers];
    const id = this.#native.adopt(descriptor, served, headers, contextIds, received, tls);
    this.#connections.set(id, takeover);
    this.#keepAlive();
    return { drain: () => this.#native.drain(id) };
  }

  fail(served: Export): void {
    this.#failed.add(served);
    const id = this.#exports.get(served);
    if (id !== undefined) {
      this.#native.failExport(id);
    }
  }

  figures(served: Export): ExportFigures | undefined {
    const id = this.#exports.get(served);
    return id === undefined ? undefined : toFigures(this.#native.figures(id));
  }

  release(served: Export): Promise<void> {
    const id = this.#exports.get(served);
    if (id === undefined) {
      return Promise.resolve();
    }
    this.#exports.delete(served);
    return new Promise((resolve) => {
      this.#leaving.set(id, resolve);
      this.#keepAlive();
      this.#native.removeExport(id);
    });
  }

  get bytesInFlight(): number {
    return this.#native.bytesInFlight();
  }

  close(): Promise<void> {
    return this.#native.close();
  }
}

/** What `--engine` says. */
export const ENGINES = ['native', 'typescript'] as const;
export type EngineChoice = (typeof ENGINES)[number];

/** The native engine, for {@link NbdServer}. With `ring` false it does without io_uring. */
export function nativeEngine(options: { readonly ring?: boolean } = {}): SocketEngineFactory {
  return (limits) => new Engine(limits, options.ring ?? true);
}

/**
 * The native engine, unless another is chosen. Without the addon there is none, and a
 * server that logs each request has the TypeScript one: no JavaScript runs per request
 * in the native engine, and so nothing that could log it.
 *
 * @param choice the user's; undefined for whichever there is and does
 * @throws Error if the native engine is chosen and can't be had
 */
export function chooseEngine(
  choice: EngineChoice | undefined,
  logger: Logger,
): SocketEngineFactory | undefined {
  if (choice === 'typescript') {
    return undefined;
  }
  if (choice === undefined && (logger.isLevelEnabled?.('debug') ?? false)) {
    logger.debug({}, 'requests are logged: the TypeScript engine serves');
    return undefined;
  }
  return (limits) => {
    try {
      return new Engine(limits, true);
    } catch (err) {
      if (choice === 'native') {
        throw err;
      }
      logger.warn({ err }, 'the native engine cannot be had');
      return NO_ENGINE;
    }
  };
}

/** Takes nothing over. */
const NO_ENGINE: SocketEngine = {
  serve: () => undefined,
  fail: () => {},
  figures: () => undefined,
  release: () => Promise.resolve(),
  bytesInFlight: 0,
  close: () => Promise.resolve(),
};
