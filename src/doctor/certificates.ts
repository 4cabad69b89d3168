// SPDX-License-Identifier: Apache-2.0
/** Whether certificates and keys are good, and for how long. */
import { createPrivateKey, X509Certificate } from 'node:crypto';
import { join } from 'node:path';
import { type Finding, fail, type Machine, ok, warn } from './machine.ts';

const DAY_MS = 86_400_000;
/** Time to renew one, days. */
const SOON_DAYS = 30;
/** Readable by the group or by others. */
const READABLE = 0o044;

/** All certificates of a PEM file: the first is its subject's, the others lead to an authority. */
function readCertificates(pem: string): X509Certificate[] {
  const blocks = pem.match(/-----BEGIN CERTIFICATE-----[^-]*-----END CERTIFICATE-----/g) ?? [];
  return blocks.map((block) => new X509Certificate(block));
}

const nameOf = ({ subject }: X509Certificate): string => subject.replaceAll('\n', ', ');

/** Why a chain does not lead from a certificate to an authority; undefined if it does. */
function whyUntrusted(
  chain: readonly X509Certificate[],
  authorities: readonly X509Certificate[],
): string | undefined {
  for (const [index, certificate] of chain.entries()) {
    const signs = (issuer: X509Certificate): boolean =>
      certificate.checkIssued(issuer) && certificate.verify(issuer.publicKey);
    if (authorities.some(signs)) {
      return undefined;
    }
    const next = chain[index + 1];
    if (next === undefined || !signs(next)) {
      return `nothing in ca-cert.pem has signed ${nameOf(certificate)}`;
    }
  }
  return 'it holds no certificate';
}

function examineTime(check: string, certificate: X509Certificate, nowMs: number): Finding {
  const name = nameOf(certificate);
  const days = Math.floor((Date.parse(certificate.validTo) - nowMs) / DAY_MS);
  if (Date.parse(certificate.validFrom) > nowMs) {
    return fail(check, `${name} is not valid before ${certificate.validFrom}`, 'set the clock');
  }
  if (days < 0) {
    return fail(check, `${name} has expired on ${certificate.validTo}`, 'renew it');
  }
  const left = `${name} is valid for ${days} more day${days === 1 ? '' : 's'}`;
  return days < SOON_DAYS ? warn(check, left, 'renew it') : ok(check, left);
}

/** Looks at a folder of certificates. */
export async function examineCertificates(machine: Machine, folder: string): Promise<Finding[]> {
  const check = `certificates in ${folder}`;
  const names = ['ca-cert.pem', 'server-cert.pem', 'server-key.pem'] as const;
  const texts = await Promise.all(names.map((name) => machine.text(join(folder, name))));
  const missing = names.filter((_, index) => texts[index] === undefined);
  if (missing.length > 0) {
    return [
      fail(check, `${missing.join(', ')} cannot be read`, 'make them, with certtool or openssl'),
    ];
  }
  const [ca = '', server = '', key = ''] = texts;
  let chain: X509Certificate[];
  let authorities: X509Certificate[];
  let matches: boolean;
  try {
    chain = readCertificates(server);
    authorities = readCertificates(ca);
    matches = chain[0]?.checkPrivateKey(createPrivateKey(key)) === true;
  } catch (error) {
    const problem = error instanceof Error ? error.message : String(error);
    return [fail(check, `they cannot be understood: ${problem}`, 'make them again')];
  }
  const untrusted = whyUntrusted(chain, authorities);
  if (untrusted !== undefined) {
    return [fail(check, untrusted, 'add what is between them to server-cert.pem')];
  }
  if (!matches) {
    return [fail(check, 'server-key.pem is not the key of server-cert.pem', 'put its key there')];
  }
  const findings = [...chain, ...authorities].map((each) =>
    examineTime(check, each, machine.nowMs),
  );
  const worst =
    findings.find(({ verdict }) => verdict === 'fail') ??
    findings.find(({ verdict }) => verdict === 'warn') ??
    findings[0];
  return [
    ...(worst === undefined ? [] : [worst]),
    ...(await examineSecret(machine, join(folder, 'server-key.pem'))),
  ];
}

/** Says it if a file that must be there and secret is not. */
export async function examineSecret(machine: Machine, path: string): Promise<Finding[]> {
  const mode = await machine.mode(path);
  if (mode === undefined) {
    return [fail('secrets', `${path} cannot be read`, 'make it')];
  }
  return (mode & READABLE) === 0
    ? []
    : [warn('secrets', `${path} can be read by others`, `run chmod 600 ${path}`)];
}
