// SPDX-License-Identifier: Apache-2.0
/** A disk in a file, served as a product would serve it: on a unix socket and on TCP. */
import { join } from 'node:path';
import type { ExecutionContext } from 'ava';
import { NBD_STATE_HOLE, NBD_STATE_ZERO } from '../../nbd/constants.ts';
import { type DiskOptions, diskExports, openFileSource } from '../../nbd/export.ts';
import { type Extent, ExtentMap } from '../../nbd/extents.ts';
import type { NbdServer } from '../../nbd/server.ts';
import { nativeEngine } from '../../src/engine.ts';
import { folder, type World, world } from '../nbd/world.ts';
import { writeSparse } from './clients.ts';

/** A disk with data at some places and holes elsewhere. */
export interface DiskContent {
  readonly sizeBytes: number;
  readonly data: readonly (Extent & { readonly bytes: Buffer })[];
  readonly checkpoints?: DiskOptions['checkpoints'];
}

export interface ServedDisk extends World {
  readonly home: string;
  /** The file that is served. */
  readonly disk: string;
  readonly port: number;
  /** URIs of an export, on the unix socket and on TCP. */
  uris(name?: string): { readonly unix: string; readonly tcp: string };
}

function uriAt(server: NbdServer, name: string, index: number): string {
  const uri = server.uris(name)[index];
  if (uri === undefined) {
    throw new Error('server does not listen');
  }
  return uri;
}

/** Serves a disk named `sda` until the test ends. */
export async function serveDisk(t: ExecutionContext, content: DiskContent): Promise<ServedDisk> {
  const home = await folder(t);
  const disk = join(home, 'disk.img');
  await writeSparse(disk, content.sizeBytes, content.data);
  const source = await openFileSource(disk);
  const exports = diskExports({
    name: 'sda',
    description: 'first disk',
    source,
    allocation: ExtentMap.fromRanges(
      content.sizeBytes,
      content.data,
      0,
      NBD_STATE_HOLE | NBD_STATE_ZERO,
      4096,
    ),
    checkpoints: content.checkpoints ?? [],
  });
  // See native-engine.ts.
  const engine = process.env['STILLBLOCK_TEST_ENGINE'] === 'native' ? nativeEngine() : undefined;
  const made = await world(t, exports, {}, { engine });
  // Runs before the server's own teardown, which does no harm a second time.
  t.teardown(() => made.server.close().then(() => source.close()));
  const listening = await made.server.listen({ host: '127.0.0.1', port: 0 });
  const port = 'port' in listening ? listening.port : 0;
  return {
    ...made,
    home,
    disk,
    port,
    uris: (name = 'sda') => ({
      unix: uriAt(made.server, name, 0),
      tcp: uriAt(made.server, name, 1),
    }),
  };
}
