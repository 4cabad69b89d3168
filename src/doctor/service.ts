// SPDX-License-Identifier: Apache-2.0
/** Whether what the configuration says can be done: devices, hooks, ports, TLS. */
import { isIPv4, isIPv6 } from 'node:net';
import type { ListenAddress } from '../../nbd/server.ts';
import { type Configuration, isLoopback } from '../configuration.ts';
import { examineCertificates, examineSecret } from './certificates.ts';
import { type Finding, fail, type Machine, ok, warn } from './machine.ts';

/** State of a socket that listens, in /proc/net/tcp. */
const LISTEN = '0A';
const S_IFMT = 0o170000;
const S_IFBLK = 0o060000;
const S_IFREG = 0o100000;
/** Clients that are of use on the server itself, and for what. */
const CLIENTS = ['qemu-img', 'nbdcopy', 'nbdinfo', 'nbd-client'] as const;
const PATH = [
  '/usr/local/sbin',
  '/usr/local/bin',
  '/usr/sbin',
  '/usr/bin',
  '/sbin',
  '/bin',
] as const;

interface Listener {
  /** As the kernel writes it: hexadecimal, in the machine's byte order. */
  readonly address: string;
  readonly port: number;
  readonly inode: string;
}

async function readListeners(machine: Machine): Promise<Listener[]> {
  const texts = await Promise.all(['tcp', 'tcp6'].map((name) => machine.text(`/proc/net/${name}`)));
  return texts.flatMap((text) =>
    (text ?? '').split('\n').flatMap((line) => {
      const [, local = '', , state, , , , , , inode = ''] = line.trim().split(/\s+/);
      const [address = '', port = ''] = local.split(':');
      return state === LISTEN ? [{ address, port: Number.parseInt(port, 16), inode }] : [];
    }),
  );
}

/** The command line of the process that a socket belongs to. */
async function ownerOf(machine: Machine, inode: string): Promise<string | undefined> {
  const wanted = `socket:[${inode}]`;
  for (const pid of (await machine.list('/proc')).filter((name) => /^\d+$/.test(name))) {
    for (const fd of await machine.list(`/proc/${pid}/fd`)) {
      if ((await machine.link(`/proc/${pid}/fd/${fd}`)) === wanted) {
        return (await machine.text(`/proc/${pid}/cmdline`))?.replaceAll('\0', ' ').trim();
      }
    }
  }
  return undefined;
}

/** Whether one cannot listen on an address because of another listener. */
function isInTheWay(listener: Listener, host: string, port: number): boolean {
  const { address } = listener;
  if (listener.port !== port) {
    return false;
  }
  if (/^0+$/.test(address) || host === '0.0.0.0' || host === '::') {
    return true;
  }
  if (isIPv4(host)) {
    return (
      address === Buffer.from(host.split('.').map(Number)).reverse().toString('hex').toUpperCase()
    );
  }
  // Of names and IPv6 it is not told apart.
  return !isIPv6(host) || address.length === 32;
}

async function examinePort(
  machine: Machine,
  listeners: readonly Listener[],
  use: string,
  host: string,
  port: number,
): Promise<Finding> {
  const check = `port ${port} (${use})`;
  const taken = listeners.find((listener) => isInTheWay(listener, host, port));
  if (taken === undefined) {
    return ok(check, 'free');
  }
  const owner = await ownerOf(machine, taken.inode);
  if (owner?.includes('stillblock') === true) {
    return ok(check, 'ours');
  }
  const who = owner === undefined ? 'something' : owner.slice(0, 60);
  return warn(check, `${who} listens on it`, 'stop that, or choose another port');
}

async function examinePorts(machine: Machine, configuration: Configuration): Promise<Finding[]> {
  const { nbd, metrics, api } = configuration;
  const wanted: readonly (readonly [string, ListenAddress])[] = [
    ...nbd.listen.map((address) => ['NBD', address] as const),
    ...(metrics === undefined ? [] : [['metrics', metrics] as const]),
    ...api.listen.map((address) => ['API', address] as const),
  ];
  const listeners = await readListeners(machine);
  const findings: Finding[] = [];
  for (const [use, address] of wanted) {
    if ('port' in address && address.port !== 0) {
      findings.push(await examinePort(machine, listeners, use, address.host, address.port));
    }
  }
  return findings;
}

async function examineTls(machine: Machine, configuration: Configuration): Promise<Finding[]> {
  const { nbd, api } = configuration;
  const open = nbd.listen.filter((address) => 'host' in address && !isLoopback(address.host));
  const findings: Finding[] = [];
  if (open.length > 0 && nbd.tls.mode !== 'require') {
    const hosts = open.map((address) => ('host' in address ? address.host : '')).join(', ');
    findings.push(
      warn('TLS', `NBD is not encrypted on ${hosts}`, 'set <tls mode="require"> with certificates'),
    );
  } else {
    findings.push(ok('TLS', open.length > 0 ? 'required' : 'NBD is not reached from outside'));
  }
  const folders = [nbd.tls.certificates, ...api.listen.map(({ certificates }) => certificates)];
  for (const folder of new Set(folders.filter((each) => each !== undefined))) {
    findings.push(...(await examineCertificates(machine, folder)));
  }
  if (nbd.tls.psk !== undefined) {
    findings.push(...(await examineSecret(machine, nbd.tls.psk)));
  }
  return findings;
}

async function examineDevices(machine: Machine, configuration: Configuration): Promise<Finding[]> {
  if (configuration.devices.length === 0) {
    const advice = 'name them with <device>, or run stillblock device attach';
    return [warn('devices', 'the configuration names none', advice)];
  }
  return Promise.all(
    configuration.devices.map(async ({ path }) => {
      const mode = await machine.mode(path);
      const check = `device ${path}`;
      if (mode === undefined) {
        return fail(check, 'it is not there', 'correct its path, or take it out');
      }
      return (mode & S_IFMT) === S_IFBLK
        ? ok(check, 'there')
        : fail(check, 'it is not a block device', 'name a disk, partition or logical volume');
    }),
  );
}

async function examineHooks(machine: Machine, { hooks }: Configuration): Promise<Finding[]> {
  return Promise.all(
    hooks.map(async ({ name, script }) => {
      const mode = await machine.mode(script);
      const check = `hook ${name}`;
      if (mode === undefined) {
        return fail(check, `${script} is not there`, 'correct its path, or take it out');
      }
      if ((mode & S_IFMT) !== S_IFREG || (mode & 0o111) === 0) {
        return fail(check, `${script} is not executable`, `run chmod +x ${script}`);
      }
      return (mode & 0o022) === 0
        ? ok(check, script)
        : fail(check, `${script} can be changed by others`, `run chmod go-w ${script}`);
    }),
  );
}

async function examineClients(machine: Machine): Promise<Finding> {
  const found: string[] = [];
  for (const client of CLIENTS) {
    const places = await Promise.all(PATH.map((folder) => machine.exists(`${folder}/${client}`)));
    if (places.includes(true)) {
      found.push(client);
    }
  }
  return found.length > 0
    ? ok('clients', found.join(', '))
    : warn(
        'clients',
        'none is on this machine',
        'to try it here, install qemu-utils or libnbd-bin',
      );
}

/** Looks at what the configuration asks for. */
export async function examineService(
  machine: Machine,
  configuration: Configuration,
): Promise<Finding[]> {
  return [
    ...(await examineDevices(machine, configuration)),
    ...(await examineHooks(machine, configuration)),
    ...(await examinePorts(machine, configuration)),
    ...(await examineTls(machine, configuration)),
    await examineClients(machine),
  ];
}
