// SPDX-License-Identifier: Apache-2.0
/**
 * How other commands talk to a running backup: HTTP and JSON over a unix socket that
 * is root's alone.
 *
 *     GET /v1/snapshot       how it does
 *     DELETE /v1/snapshot    end it; answered when it is released
 */
import { rm } from 'node:fs/promises';
import {
  createServer,
  type IncomingMessage,
  request,
  type Server,
  type ServerResponse,
} from 'node:http';
import { join } from 'node:path';
import { umask } from 'node:process';
import type { BackupDescription, BackupEnded } from './backup-report.ts';
import { explain } from './errors.ts';
import { type Folders, makeFolder } from './folders.ts';

const SNAPSHOT = '/v1/snapshot';
/** An answer is a few kilobytes for each of 64 disks with 255 checkpoints. */
const MAX_ANSWER_BYTES = 64 * 1024 * 1024;

/** The backup as its socket sees it. */
export interface Controlled {
  /** What GET answers; plain JSON values. */
  describe(): object;
  /** Ends the backup. Settles when it is released; what it returns DELETE answers. */
  end(): Promise<object>;
}

function socketPath(folders: Folders): string {
  return join(folders.run, 'control.sock');
}

function answer(response: ServerResponse, status: number, body: object): void {
  response.writeHead(status, { 'content-type': 'application/json' });
  response.end(`${JSON.stringify(body)}\n`);
}

async function handle(
  controlled: Controlled,
  incoming: IncomingMessage,
  response: ServerResponse,
): Promise<void> {
  incoming.resume();
  if (incoming.url !== SNAPSHOT) {
    answer(response, 404, { error: { code: 'NOT_FOUND', message: `only ${SNAPSHOT} is here` } });
  } else if (incoming.method === 'GET') {
    answer(response, 200, controlled.describe());
  } else if (incoming.method === 'DELETE') {
    answer(response, 200, await controlled.end());
  } else {
    response.setHeader('allow', 'GET, DELETE');
    answer(response, 405, { error: { code: 'METHOD', message: 'use GET or DELETE' } });
  }
}

/** The socket of a running backup. */
export class ControlSocket {
  readonly #server: Server;
  readonly #removeFolder: () => Promise<void>;

  private constructor(server: Server, removeFolder: () => Promise<void>) {
    this.#server = server;
    this.#removeFolder = removeFolder;
  }

  /**
   * Listens. The caller is the only backup that runs: a socket that is there is a dead
   * process's, and is replaced.
   */
  static async open(folders: Folders, controlled: Controlled): Promise<ControlSocket> {
    const path = socketPath(folders);
    const removeFolder = await makeFolder(folders.run);
    const server = createServer((incoming, response) => {
      handle(controlled, incoming, response).catch((error: unknown) => {
        const message = error instanceof Error ? error.message : String(error);
        answer(response, 500, { error: { code: 'FAILED', message } });
      });
    });
    try {
      await rm(path, { force: true });
      await new Promise<void>((resolve, reject) => {
        server.once('error', reject);
        // The socket is made, with its mode, before listen() returns.
        const before = umask(0o177);
        server.listen(path, resolve);
        umask(before);
      });
    } catch (error) {
      await removeFolder();
      throw explain(error, path);
    }
    return new ControlSocket(server, removeFolder);
  }

  /** Sends the answers that are due and removes the socket. */
  async close(): Promise<void> {
    await new Promise<void>((resolve) => {
      this.#server.close(() => resolve());
      this.#server.closeIdleConnections();
    });
    await this.#removeFolder();
  }
}

function ask(folders: Folders, method: string): Promise<unknown> {
  return new Promise((resolve, reject) => {
    const outgoing = request(
      { socketPath: socketPath(folders), path: SNAPSHOT, method, agent: false },
      (incoming) => {
        let text = '';
        incoming.setEncoding('utf8');
        incoming.on('data', (piece: string) => {
          text += piece;
          if (text.length > MAX_ANSWER_BYTES) {
            incoming.destroy(new Error('the answer is too long'));
          }
        });
        incoming.on('error', reject);
        incoming.on('end', () => {
          try {
            resolve(JSON.parse(text));
          } catch (error) {
            reject(error instanceof Error ? error : new Error(String(error)));
          }
        });
      },
    );
    outgoing.on('error', reject);
    outgoing.end();
  });
}

async function askBackup(folders: Folders, method: string): Promise<object | undefined> {
  try {
    const found = await ask(folders, method);
    if (typeof found !== 'object' || found === null) {
      throw new Error('the answer is no object');
    }
    return found;
  } catch (error) {
    const code = error instanceof Error && 'code' in error ? error.code : undefined;
    if (code === 'ENOENT' || code === 'ECONNREFUSED' || code === 'ENOTDIR') {
      return undefined;
    }
    throw explain(error, socketPath(folders));
  }
}

/** What a running backup says of itself; see {@link BackupDescription}. */
export async function describeBackup(folders: Folders): Promise<BackupDescription | undefined> {
  return (await askBackup(folders, 'GET')) as BackupDescription | undefined;
}

/**
 * Ends the running backup and waits until it is released.
 *
 * @returns undefined if none is running
 */
export async function endBackup(folders: Folders): Promise<BackupEnded | undefined> {
  return (await askBackup(folders, 'DELETE')) as BackupEnded | undefined;
}
