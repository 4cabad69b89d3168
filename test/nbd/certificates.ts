// SPDX-License-Identifier: Apache-2.0
/** Authorities and certificates of the tests' own, made by GnuTLS' certtool. */
import { execFile } from 'node:child_process';
import { randomBytes } from 'node:crypto';
import { readFileSync } from 'node:fs';
import { copyFile, mkdir, writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import { promisify } from 'node:util';
import type { TlsCredentials } from '../../nbd/tls.ts';

const execute = promisify(execFile);

async function certtool(...args: string[]): Promise<void> {
  // It does not come to an end with the runtime of a sanitizer in it.
  const { LD_PRELOAD: _, ...env } = process.env;
  await execute('certtool', args, { env });
}

/** A certificate and its key, in files. */
export interface Certificate {
  readonly certificate: string;
  readonly key: string;
}

/** Lines of certtool's templates, beside what all certificates have. */
export type Template = readonly string[];

/** What a server has. */
export const SERVER: Template = [
  'cn = "localhost"',
  'dns_name = "localhost"',
  'ip_address = "127.0.0.1"',
  'tls_www_server',
];

/** What a client of some name has. */
export function clientTemplate(name: string, ...more: string[]): Template {
  return [`cn = "${name}"`, 'organization = "Example"', 'tls_www_client', ...more];
}

/** One that was good in another century. */
export const EXPIRED: Template = [
  'activation_date = "1999-01-01 00:00:00"',
  'expiration_date = "1999-12-31 00:00:00"',
];

/** Signs certificates. */
export class Authority {
  readonly home: string;
  readonly certificate: string;
  readonly #key: string;
  #issued = 0;

  private constructor(home: string) {
    this.home = home;
    this.certificate = join(home, 'ca-cert.pem');
    this.#key = join(home, 'ca-key.pem');
  }

  /** @param home an empty folder, or none yet */
  static async make(home: string, name = 'an authority'): Promise<Authority> {
    await mkdir(home, { recursive: true });
    const made = new Authority(home);
    const template = join(home, 'ca.info');
    await writeFile(template, `cn = "${name}"\nca\ncert_signing_key\ncrl_signing_key\n`);
    await certtool('--generate-privkey', '--key-type=ecdsa', '--outfile', made.#key);
    await certtool(
      ...['--generate-self-signed', '--load-privkey', made.#key],
      ...['--template', template, '--outfile', made.certificate],
    );
    return made;
  }

  /** Makes a key and signs a certificate for it. */
  async issue(template: Template): Promise<Certificate> {
    this.#issued += 1;
    const number = this.#issued;
    const at = (suffix: string): string => join(this.home, `${number}${suffix}`);
    const made = { certificate: at('-cert.pem'), key: at('-key.pem') };
    await writeFile(at('.info'), `${template.join('\n')}\nsigning_key\n`);
    await certtool('--generate-privkey', '--key-type=ecdsa', '--outfile', made.key);
    await certtool(
      ...['--generate-certificate', '--load-privkey', made.key],
      ...['--load-ca-certificate', this.certificate, '--load-ca-privkey', this.#key],
      ...['--template', at('.info'), '--outfile', made.certificate],
    );
    return made;
  }

  /** A list of certificates that are good no more, PEM. */
  async revoke(revoked: Certificate): Promise<string> {
    const path = join(this.home, 'ca-crl.pem');
    const template = join(this.home, 'crl.info');
    await writeFile(template, 'crl_next_update = 43\ncrl_number = 1\n');
    await certtool(
      ...['--generate-crl', '--load-ca-certificate', this.certificate],
      ...['--load-ca-privkey', this.#key, '--load-certificate', revoked.certificate],
      ...['--template', template, '--outfile', path],
    );
    return path;
  }
}

/** Puts certificates into a folder under the names that nbdkit and libnbd look for. */
export async function conventionalFolder(
  home: string,
  authority: Authority,
  parts: { readonly server?: Certificate; readonly client?: Certificate },
): Promise<string> {
  await mkdir(home, { recursive: true });
  await copyFile(authority.certificate, join(home, 'ca-cert.pem'));
  for (const [role, made] of Object.entries(parts)) {
    await copyFile(made.certificate, join(home, `${role}-cert.pem`));
    await copyFile(made.key, join(home, `${role}-key.pem`));
  }
  return home;
}

/** The credentials of a server. */
export function credentialsOf(
  server: Certificate,
  clients?: { readonly authority: Authority; readonly required: boolean },
): TlsCredentials {
  return {
    certificates: {
      certificate: readFileSync(server.certificate),
      key: readFileSync(server.key),
      ...(clients !== undefined && { authorities: readFileSync(clients.authority.certificate) }),
    },
    clientCertificates: clients === undefined ? 'none' : clients.required ? 'required' : 'optional',
  };
}

/** A key as psktool makes them. */
export function newKey(): Buffer {
  return randomBytes(32);
}
