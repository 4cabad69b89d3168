// SPDX-License-Identifier: Apache-2.0
// Certificates in a guest, made on the host.

import { mkdtemp, readdir, readFile, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import {
  Authority,
  clientTemplate,
  conventionalFolder,
  SERVER,
  type Template,
} from '../nbd/certificates.ts';
import type { Guest } from './guest.ts';
import { shellQuote } from './initrd.ts';

/**
 * Makes an authority, and folders with nbdkit's names in the guest, each readable by root
 * alone.
 *
 * @param server the server's folder, for `localhost` and `127.0.0.1`
 * @param clients their folders, by their common names
 */
export async function certify(
  guest: Guest,
  server: string,
  clients: Readonly<Record<string, string>>,
): Promise<void> {
  const home = await mkdtemp(join(tmpdir(), 'stillblock-certificates-'));
  try {
    const authority = await Authority.make(join(home, 'ca'));
    const put = async (role: 'server' | 'client', template: Template, there: string) => {
      const here = join(home, there);
      await conventionalFolder(here, authority, { [role]: await authority.issue(template) });
      await guest.run(`mkdir -m 700 ${there}`);
      for (const name of await readdir(here)) {
        const text = await readFile(join(here, name), 'utf8');
        await guest.run(`printf %s ${shellQuote(text)} >${join(there, name)}`);
      }
    };
    await put('server', SERVER, server);
    for (const [name, there] of Object.entries(clients)) {
      await put('client', clientTemplate(name), there);
    }
  } finally {
    await rm(home, { recursive: true });
  }
}
