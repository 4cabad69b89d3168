// SPDX-License-Identifier: Apache-2.0
/**
 * A server of a test's own that answers as the daemon's control API does, over disks that are
 * really served. The daemon itself is in test/vm.
 */
import { randomUUID } from 'node:crypto';
import { createServer, type IncomingMessage } from 'node:http';
import { join } from 'node:path';
import type { ExecutionContext } from 'ava';
import { collectLayout } from '../../src/layout.ts';
import { folder } from '../nbd/world.ts';
import { type Instant, Machine, MIB } from './pulling.ts';

interface Backup {
  readonly id: string;
  readonly checkpoint: string;
  readonly instant: Instant;
}

/** A server: its disks, its checkpoints and the backups that it holds. */
export class Server {
  readonly machine: Machine;
  readonly socket: string;
  readonly held: Backup[] = [];
  readonly #ids = new Map<string, string>();
  readonly checkpoints: string[] = [];
  generation: string = randomUUID();
  machineId = 'aaaa';
  /** Name of a reason, once snapshots fail. */
  failure: string | undefined;
  /** From this request on, which it still does, it answers nothing: the network is cut. */
  cutAt: string | undefined;
  #isCut = false;
  #t: ExecutionContext;

  private constructor(t: ExecutionContext, machine: Machine, socket: string) {
    this.#t = t;
    this.machine = machine;
    this.socket = socket;
  }

  static async start(t: ExecutionContext): Promise<Server> {
    const machine = await Machine.make(t, { sda: 4 * MIB, sdb: 2 * MIB });
    const server = new Server(t, machine, join(await folder(t), 'control.sock'));
    const http = createServer((request, response) => {
      server.#answer(request).then(
        ({ status, body }) => {
          server.#isCut ||= server.cutAt === server.#asked(request);
          if (server.#isCut) {
            return;
          }
          response.writeHead(status, { 'content-type': 'application/json' });
          response.end(JSON.stringify(body));
        },
        (error: unknown) => response.destroy(error as Error),
      );
    });
    await new Promise<void>((resolve) => http.listen(server.socket, resolve));
    t.teardown(() => http.close());
    return server;
  }

  #asked({ method, url = '' }: IncomingMessage): string {
    return `${method} ${url.split('/')[2]}`;
  }

  /** The network is there again. */
  mend(): void {
    this.cutAt = undefined;
    this.#isCut = false;
  }

  async #answer(request: IncomingMessage): Promise<{ status: number; body: object }> {
    const name = (request.url ?? '').split('/')[3] ?? '';
    const pieces: string[] = [];
    for await (const piece of request) {
      pieces.push(String(piece));
    }
    if (this.#isCut) {
      return { status: 500, body: {} };
    }
    switch (this.#asked(request)) {
      case 'GET layout':
        return { status: 200, body: { ...(await collectLayout([])), machine: this.machineId } };
      case 'GET backups':
        return {
          status: 200,
          body: { backups: this.held.map(({ id, checkpoint }) => ({ id, checkpoint })) },
        };
      case 'POST backups': {
        const asked = JSON.parse(pieces.join('')) as { id: string; checkpoint: string };
        return { status: 201, body: await this.begin(asked.id, asked.checkpoint) };
      }
      case 'DELETE backups': {
        await this.end(name);
        const { failure } = this;
        const failed =
          failure === undefined ? { failed: false } : { failed: true, reason: failure };
        return { status: 200, body: { checkpoint: name, ...failed } };
      }
      case 'GET checkpoints': {
        const checkpoints = this.checkpoints.map((each) => ({
          name: each,
          id: this.#ids.get(each),
        }));
        return { status: 200, body: { checkpoints, broken: [] } };
      }
      case 'DELETE checkpoints': {
        this.checkpoints.splice(this.checkpoints.indexOf(name), 1);
        for (const { since } of this.machine.disks.values()) {
          since.delete(name);
        }
        return { status: 200, body: { deleted: name } };
      }
      default:
        return { status: 404, body: {} };
    }
  }

  async end(checkpoint: string): Promise<void> {
    const index = this.held.findIndex((backup) => backup.checkpoint === checkpoint);
    const [backup] = this.held.splice(index, 1);
    await backup?.instant.close();
  }

  async begin(id: string, checkpoint: string): Promise<object> {
    const earlier = [...this.checkpoints];
    const instant = await this.machine.serve(this.#t, checkpoint);
    this.#ids.set(checkpoint, id);
    this.held.push({ id, checkpoint, instant });
    this.checkpoints.push(checkpoint);
    const { generation } = this;
    const numberOf = (name: string): number => this.checkpoints.indexOf(name) + 1;
    const disks = [...this.machine.disks.values()].map(({ name, data }) => ({
      ...{ name, device: `/dev/${name}`, sizeBytes: data.length, image: '', full: [] },
      ...{ generation, number: numberOf(checkpoint), incremental: earlier },
    }));
    const exports = disks.flatMap(({ name, sizeBytes }) => [
      { name, disk: name, uris: instant.uris(name), sizeBytes },
      ...earlier.map((since) => ({
        ...{ name: `${name}@${since}`, disk: name, checkpoint: since, sizeBytes, generation },
        ...{ uris: instant.uris(`${name}@${since}`), number: numberOf(since) },
        checkpointId: this.#ids.get(since),
      })),
    ]);
    const takenAt = '2026-01-01T00:00:00.000Z';
    return {
      id,
      state: 'serving',
      checkpoint,
      pid: 1,
      takenAt,
      disks,
      exports,
      brokenCheckpoints: [],
    };
  }
}
