// SPDX-License-Identifier: Apache-2.0
/**
 * Pulls the disks of one instant into a chain:
 *
 *     open the chain, its files as they should be ─► have the snapshot ─► plan
 *       ─► copy, compare, hash each disk (several at once) ─► commit ─► end the snapshot
 *
 * Whatever fails before the commit leaves the chain as it was.
 */
import { setMaxListeners } from 'node:events';
import { stat } from 'node:fs/promises';
import { join } from 'node:path';
import { ChainWriter, type Recovery } from './chain.ts';
import { StillblockError } from './errors.ts';
import { type ChainEntry, type ChainPoint, type Manifest, tipOf } from './manifest.ts';
import { exportSize } from './nbd-source.ts';
import {
  type CertificateFolder,
  formatNbdUri,
  qemuImageOptions,
  qemuTlsObject,
  qemuValue,
} from './nbd-uri.ts';
import type { Offer, PullSource } from './offer.ts';
import { type PlannedDisk, type PullMode, type PullPlan, planPull } from './pull-plan.ts';
import { explainQemuImg, isDifference, QemuImgError, qemuImg } from './qemu-img.ts';

/** What is asked for. */
export interface PullRequest {
  readonly folder: string;
  readonly source: PullSource;
  readonly mode: PullMode;
  /** Undefined: increments that the server cannot prove to fit. */
  readonly verify: boolean | undefined;
  readonly compress: boolean;
  /** Disks at a time. */
  readonly parallel: number;
  readonly certificates: CertificateFolder;
  readonly stallMs: number;
}

export type PullStep = 'copy' | 'compare' | 'hash';

/** Told what happens. */
export interface PullObserver {
  recovered(recovery: Recovery): void;
  planned(offer: Offer, plan: PullPlan): void;
  /** @param fraction of the step, 0 to 1 */
  progress(disk: string, step: PullStep, fraction: number, writtenBytes: number): void;
  pulled(entry: ChainEntry): void;
  /** What does not make the pull wrong, and should be known. */
  problem(error: unknown): void;
}

/** The id of a chain that begins now. */
export function emptyManifest(chain: string): Manifest {
  return { chain, machine: null, points: [] };
}

async function writtenBytes(path: string): Promise<number> {
  const status = await stat(path).catch(() => undefined);
  return (status?.blocks ?? 0) * 512;
}

/** One pull. Runs once. */
class Pull {
  readonly #request: PullRequest;
  readonly #observer: PullObserver;
  readonly #writer: ChainWriter;
  readonly #signal: AbortSignal;

  constructor(
    request: PullRequest,
    observer: PullObserver,
    writer: ChainWriter,
    signal: AbortSignal,
  ) {
    this.#request = request;
    this.#observer = observer;
    this.#writer = writer;
    this.#signal = signal;
  }

  /**
   * Translates a failure. qemu-img says EIO both of a read error and of a server that goes
   * away; and one that does not answer any more has answered before.
   */
  async #explain(planned: PlannedDisk, error: unknown): Promise<unknown> {
    if (!(error instanceof QemuImgError)) {
      return error;
    }
    const what = formatNbdUri(planned.from);
    const isOurs = /No space left|quota/.test(error.output);
    const explained = explainQemuImg(
      error,
      isOurs ? join(this.#writer.folder, planned.file) : what,
    );
    const isGone =
      explained instanceof StillblockError && ['NO_SERVER', 'NO_EXPORT'].includes(explained.code);
    // The second line is what a comparison says, without the reason.
    const isEither =
      /Input\/output error|disconnect|Connection reset|Broken pipe/i.test(error.output) ||
      /Sector allocation test failed|Error while reading offset/.test(error.output);
    if (error.stalled || (!isGone && !isEither)) {
      return explained;
    }
    const { certificates, stallMs } = this.#request;
    const ask = { certificates, stallMs, signal: this.#signal };
    const answers =
      !isGone &&
      (await exportSize(planned.disk.uri, ask).then(
        () => true,
        () => false,
      ));
    return answers
      ? new StillblockError(
          'READ_FAILED',
          `${what}: the server could not read its snapshot, which may have failed`,
          'look at stillblock status there, such as whether the store was full, and pull again',
          { cause: error },
        )
      : new StillblockError(
          'SERVER_GONE',
          `${what}: the server went away`,
          'look whether it still runs there, and pull again',
          { cause: error },
        );
  }

  async #run(planned: PlannedDisk, step: PullStep, args: readonly string[]): Promise<void> {
    const target = join(this.#writer.folder, planned.file);
    const { name } = planned.disk;
    let fraction = 0;
    let last = 0;
    // What is compared leaves no trace but its share.
    const moved = async (): Promise<number> =>
      step === 'copy' ? writtenBytes(target) : Math.round(fraction * planned.disk.sizeBytes);
    const tell = (): void => {
      // Its size is asked for no more often than people can read it.
      if (performance.now() - last > 200) {
        last = performance.now();
        void moved().then((bytes) => this.#observer.progress(name, step, fraction, bytes));
      }
    };
    const timer = setInterval(tell, 1000);
    try {
      await qemuImg(args, {
        cwd: this.#writer.folder,
        signal: this.#signal,
        stallMs: this.#request.stallMs,
        target,
        onProgress: (now) => {
          fraction = now;
          tell();
        },
      });
    } catch (error) {
      throw await this.#explain(planned, error);
    } finally {
      clearInterval(timer);
    }
    fraction = 1;
    this.#observer.progress(name, step, fraction, await moved());
  }

  async #copy(planned: PlannedDisk): Promise<void> {
    const { from, base, file } = planned;
    await this.#run(planned, 'copy', [
      ...['convert', '-p', '-m', '8', '-O', 'qcow2'],
      ...qemuTlsObject(from, this.#request.certificates),
      ...(this.#request.compress ? ['-c', '-o', 'compression_type=zstd'] : []),
      ...(base === undefined ? [] : ['-B', base.entry.file, '-F', 'qcow2']),
      ...['--image-opts', qemuImageOptions(from), file],
    ]);
  }

  async #compare(planned: PlannedDisk): Promise<void> {
    const { disk, file, base } = planned;
    const image = `driver=qcow2,file.driver=file,file.filename=${qemuValue(join(this.#writer.folder, file))}`;
    const tls = qemuTlsObject(disk.uri, this.#request.certificates);
    try {
      await this.#run(planned, 'compare', [
        ...['compare', '-p', ...tls, '--image-opts'],
        ...[qemuImageOptions(disk.uri), image],
      ]);
    } catch (error) {
      const cause = error instanceof StillblockError ? error.cause : error;
      if (isDifference(cause)) {
        throw new StillblockError(
          'VERIFY_FAILED',
          base === undefined
            ? `${disk.name}: the copy differs from the server's image`
            : `${disk.name}: the changes since ${base.checkpoint} do not lead from the chain's image to the server's`,
          'pull it with --full',
          { cause: error },
        );
      }
      throw error;
    }
  }

  async pullDisk(planned: PlannedDisk): Promise<ChainEntry> {
    const { disk, base, file } = planned;
    await this.#copy(planned);
    const verify = this.#request.verify ?? !planned.proven;
    if (verify) {
      await this.#compare(planned);
    }
    this.#observer.progress(disk.name, 'hash', 0, 0);
    const sealed = await this.#writer.seal(file);
    this.#signal.throwIfAborted();
    const entry: ChainEntry = {
      disk: disk.name,
      sizeBytes: disk.sizeBytes,
      kind: base === undefined ? 'full' : 'incremental',
      file,
      backing: base?.entry.file ?? null,
      parent: base?.checkpoint ?? null,
      ...sealed,
      generation: disk.history?.generation ?? null,
      number: disk.history?.number ?? null,
      checkpointId: disk.history?.checkpointId ?? null,
      identity: disk.identity,
      verified: verify,
    };
    this.#observer.pulled(entry);
    return entry;
  }
}

/** Runs a task for each item, so many at a time. The first failure is the result's. */
async function inParallel<T, R>(
  items: readonly T[],
  count: number,
  stop: AbortController,
  task: (item: T) => Promise<R>,
): Promise<R[]> {
  const results: R[] = [];
  const left = [...items.entries()];
  const worker = async (): Promise<void> => {
    for (let next = left.shift(); next !== undefined; next = left.shift()) {
      stop.signal.throwIfAborted();
      results[next[0]] = await task(next[1]).catch((error: unknown) => {
        stop.abort(error);
        throw error;
      });
    }
  };
  const workers = Array.from({ length: Math.min(count, items.length) }, worker);
  // All have to end before files are removed under them.
  const ends = await Promise.allSettled(workers);
  if (ends.some(({ status }) => status === 'rejected')) {
    throw stop.signal.reason;
  }
  return results;
}

/** What is known of a snapshot that could not be let go of. */
function stillHeld(error: unknown): StillblockError {
  const why = error instanceof Error ? error.message : String(error);
  return new StillblockError(
    'SNAPSHOT_LEFT',
    `the server may still hold the snapshot, which the next pull into this folder ends: ${why}`,
    'run that once the server answers',
    { cause: error },
  );
}

function asBefore(error: unknown): unknown {
  return error instanceof StillblockError
    ? new StillblockError(error.code, `${error.message} (the chain is as before)`, error.advice, {
        cause: error.cause,
        exitCode: error.exitCode,
      })
    : error;
}

/** The checkpoint of each disk's newest image. */
function tips(manifest: Manifest): ReadonlyMap<string, string> {
  const names = manifest.points.flatMap(({ entries }) => entries.map(({ disk }) => disk));
  return new Map(names.map((name) => [name, tipOf(manifest, name)?.point.checkpoint ?? '']));
}

/**
 * Pulls.
 *
 * @param chain UUID of the chain if it begins now
 * @param signal ends it; the chain is then as it was
 * @returns the point that is now part of the chain
 * @throws StillblockError after which the chain is as it was
 */
export async function pull(
  request: PullRequest,
  observer: PullObserver,
  chain: string,
  signal: AbortSignal,
): Promise<ChainPoint> {
  const writer = await ChainWriter.open(request.folder, emptyManifest(chain));
  const stop = new AbortController();
  // Each disk's qemu-img listens to it.
  setMaxListeners(0, stop.signal);
  const forward = (): void => stop.abort(signal.reason);
  signal.addEventListener('abort', forward);
  try {
    if (writer.recovery !== undefined) {
      observer.recovered(writer.recovery);
      await request.source.endLeftover(writer.recovery);
    }
    signal.throwIfAborted();
    const { checkpoint: name, snapshot } = request.source;
    if (snapshot !== null) {
      // Whatever happens from here on, the next pull knows what to end.
      await writer.begin({ checkpoint: name, files: [], snapshot });
    }
    const offer = await request.source.begin(tips(writer.manifest), stop.signal);
    const plan = planPull(writer.manifest, offer, request.mode);
    observer.planned(offer, plan);
    await writer.begin({
      checkpoint: offer.checkpoint,
      files: plan.disks.map(({ file }) => file),
      snapshot,
    });
    const run = new Pull(request, observer, writer, stop.signal);
    const entries = await inParallel(plan.disks, request.parallel, stop, (disk) =>
      run.pullDisk(disk),
    );
    const { checkpoint, takenAt, layout, machine } = offer;
    const point = { checkpoint, takenAt, pulledAt: new Date().toISOString(), layout, entries };
    await writer.commit(point, machine);
    try {
      await request.source.end(true);
      await writer.forget();
    } catch (problem) {
      observer.problem(stillHeld(problem));
    }
    return point;
  } catch (error) {
    await writer.discard();
    let failure: StillblockError | undefined;
    try {
      failure = await request.source.end(false);
      await writer.forget();
    } catch (problem) {
      observer.problem(stillHeld(problem));
    }
    // What the server says of its snapshot is more than what a reader sees of it.
    throw asBefore(failure ?? (signal.aborted ? signal.reason : error));
  } finally {
    signal.removeEventListener('abort', forward);
    await writer.close();
  }
}
