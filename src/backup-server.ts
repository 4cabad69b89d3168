// SPDX-License-Identifier: Apache-2.0
/** The exports of one backup, on an NBD server of its own or among others on the daemon's. */

import type { Bandwidth } from '../nbd/bandwidth.ts';
import type { Export } from '../nbd/export.ts';
import type { Logger } from '../nbd/logger.ts';
import { type InheritedSocket, type ListenAddress, NbdServer } from '../nbd/server.ts';
import { chooseEngine } from './engine.ts';
import { StillblockError } from './errors.ts';
import { explainListen } from './listen.ts';
import type { NbdFigures } from './metrics.ts';
import { RateCaps, type Rates } from './rates.ts';
import { Security, type TlsPlan } from './tls.ts';

/** Where a server listens, and how. */
export interface ServerRequest {
  readonly listen: readonly (ListenAddress | InheritedSocket)[];
  /** Undefined for the configuration's; true and false for that, required or off. */
  readonly tls: TlsPlan | boolean | undefined;
}

/** What a backup needs of the server that it is served by. */
export interface BackupServer {
  /** @throws StillblockError if the name is taken */
  add(added: Export): void;
  uris(exportName: string): string[];
  /** Answers EIO from now on for all that was added. */
  fail(): void;
  /** Clients that are served. */
  connections(): number;
  /** Caps of the server itself that a disk's data passes. */
  bandwidthOf(disk: string): readonly Bandwidth[];
  /** Warns if clients that come by these URIs find the certificate not to be for them. */
  checkNames(uris: readonly string[]): void;
  figures(): NbdFigures;
  /** Offers them no longer. Settles when nothing uses their sources; safe to repeat. */
  close(): Promise<void>;
}

/** @returns the image among the exports of one disk: delta exports have the others' names */
function onlyImage(names: readonly string[]): string | undefined {
  const [only, ...others] = names.filter((name) => !name.includes('@'));
  return others.length === 0 ? only : undefined;
}

const NO_RATES: Rates = { total: undefined, byName: new Map() };

/** A server that several backups share; it listens for as long as it lives. */
export class SharedServer {
  readonly #server: NbdServer;
  readonly #security: Security | undefined;
  readonly #caps: RateCaps;
  readonly #logger: Logger;
  readonly #names = new Set<string>();

  private constructor(security: Security | undefined, rates: Rates, logger: Logger) {
    this.#server = new NbdServer({
      logger,
      engine: chooseEngine(undefined, logger),
      ...security?.options,
    });
    this.#security = security;
    this.#caps = new RateCaps(rates);
    this.#logger = logger;
  }

  /**
   * Reads certificates and listens.
   *
   * @throws StillblockError if one of that can't be; nothing listens then
   */
  static async open(
    { listen, tls }: { readonly listen: ServerRequest['listen']; readonly tls: TlsPlan },
    logger: Logger,
    rates: Rates = NO_RATES,
  ): Promise<SharedServer> {
    const shared = new SharedServer(await Security.open(tls), rates, logger);
    try {
      for (const address of listen) {
        await shared.#server.listen(address, tls).catch((error: unknown) => {
          throw explainListen(address, error);
        });
      }
    } catch (error) {
      await shared.close();
      throw error;
    }
    return shared;
  }

  /**
   * Reads certificates, keys and rules anew.
   *
   * @throws StillblockError that names the file; those of before stay then
   */
  async reload(): Promise<void> {
    await this.#security?.reload();
  }

  figures(): NbdFigures {
    const server = this.#server;
    return { ...server.usage, accepted: server.accepted, exports: server.figures };
  }

  /** A part of it for one backup. */
  lease(): BackupServer {
    const server = this.#server;
    const own = new Set<string>();
    return {
      add: (added) => {
        if (this.#names.has(added.name)) {
          throw new StillblockError(
            'NAME_TAKEN',
            `there is an export ${JSON.stringify(added.name)} already`,
            'choose another name with --disk NAME=DEV, or exportname',
          );
        }
        server.addExport(added);
        own.add(added.name);
        this.#names.add(added.name);
        this.#chooseDefault();
      },
      uris: (name) => server.uris(name),
      fail: () => server.failExports(own),
      connections: () => server.usage.connections,
      bandwidthOf: (disk) => this.#caps.of(disk),
      checkNames: (uris) => this.#security?.checkNames(uris, this.#logger),
      figures: () => this.figures(),
      close: async () => {
        const names = [...own];
        own.clear();
        for (const name of names) {
          this.#names.delete(name);
        }
        this.#chooseDefault();
        await Promise.all(names.map((name) => server.removeExport(name)));
      },
    };
  }

  /** Clients that name no export get the only disk there is. */
  #chooseDefault(): void {
    this.#server.setDefaultExport(onlyImage([...this.#names]) ?? '');
  }

  close(): Promise<void> {
    return this.#server.close();
  }
}
