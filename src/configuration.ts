// SPDX-License-Identifier: Apache-2.0
/**
 * The daemon's configuration: one XML file, `configs/stillblock.xml` says what is in
 * it. A file with anything unknown or wrong in it is refused as a whole, with the
 * place of the mistake.
 */
import { isUtf8 } from 'node:buffer';
import { readFile } from 'node:fs/promises';
import { isIPv4 } from 'node:net';
import { join } from 'node:path';
import { env } from 'node:process';
import { LEAST_BYTES_PER_SECOND } from '../nbd/bandwidth.ts';
import { NBD_DEFAULT_PORT } from '../nbd/constants.ts';
import type { ListenAddress } from '../nbd/server.ts';
import { isDiskName } from './block-devices.ts';
import { EXIT, explain, StillblockError } from './errors.ts';
import { type Folders, folders } from './folders.ts';
import type { Hook } from './hooks.ts';
import { DEFAULT_HOST } from './listen.ts';
import { nativeConstants } from './native.ts';
import type { Rates } from './rates.ts';
import { formatSize, parseSize } from './sizes.ts';
import { type Checked, check, XmlDocument, type XmlElement } from './xml.ts';

/** A device to track from the daemon's start on. */
export interface DeviceSetting {
  readonly path: string;
  /** Of its exports; undefined for the default. */
  readonly name: string | undefined;
  /** Unit of change tracking; undefined for the module's choice. */
  readonly blockSizeBytes: number | undefined;
}

export interface StoreSettings {
  /** Folders and devices in the order of preference; if there are none, a place is chosen. */
  readonly places: readonly string[];
  /** Of each place to begin with; undefined to choose. */
  readonly sizeBytes: number | undefined;
  /** That each place may grow to; undefined for all room there is. */
  readonly maxBytes: number | undefined;
  /** Part of the free memory that may be used, 0 to 1. */
  readonly memoryShare: number;
}

/** Who may see which exports. In patterns `*` is any text. */
export interface TlsRule {
  /** What the pattern is for: a certificate's subject or alternative name, or a user with a key. */
  readonly kind: 'subject' | 'san' | 'user';
  readonly pattern: string;
  readonly export: string;
}

export interface TlsSettings {
  readonly mode: 'off' | 'on' | 'require';
  /** Folder of `ca-cert.pem`, `server-cert.pem` and `server-key.pem`. */
  readonly certificates: string | undefined;
  /** File of pre-shared keys. */
  readonly psk: string | undefined;
  readonly verifyPeer: boolean;
  /** Whether any address may be listened on without TLS. */
  readonly insecure: boolean;
  /** Everybody may see everything if there are none. */
  readonly rules: readonly TlsRule[];
}

/** Where the API is served by TCP and TLS, to clients with a certificate. */
export interface ApiListen {
  readonly host: string;
  readonly port: number;
  /** Folder of `ca-cert.pem`, `server-cert.pem` and `server-key.pem`. */
  readonly certificates: string;
}

/** Where change histories are kept over a reboot. */
export interface HistorySettings {
  readonly keep: boolean;
  /** File or device; undefined for a file in the state folder. */
  readonly place: string | undefined;
  /** Of the file, which is made longer if need be; undefined to choose. */
  readonly sizeBytes: number | undefined;
}

export interface Configuration {
  readonly folders: Folders;
  readonly history: HistorySettings;
  readonly logLevel: 'error' | 'warn' | 'info' | 'debug';
  readonly devices: readonly DeviceSetting[];
  readonly store: StoreSettings;
  readonly nbd: {
    readonly listen: readonly ListenAddress[];
    readonly tls: TlsSettings;
    readonly rates: Rates;
  };
  readonly metrics: ListenAddress | undefined;
  readonly api: { readonly socket: string; readonly listen: readonly ApiListen[] };
  readonly hooks: readonly Hook[];
  /** How many checkpoints are kept; undefined for all. */
  readonly keepCheckpoints: number | undefined;
  readonly freezeTimeoutMs: number;
}

/** Where the configuration is, which `STILLBLOCK_CONFIGURATION` overrides. */
export const CONFIGURATION_FILE: string =
  env['STILLBLOCK_CONFIGURATION'] || '/etc/stillblock/stillblock.xml';

const ADVICE = 'correct the file; stillblock.xml(5) lists all settings';
const DEFAULT_MEMORY_SHARE_PERCENT = 25;
const DEFAULT_HOOK_SECONDS = 30;
const MAX_HOOK_SECONDS = 3600;
const DEFAULT_FREEZE_SECONDS = 10;
/** The module takes no longer deadline. */
const MAX_FREEZE_SECONDS = 60;
/** The change history has 255 numbers; more checkpoints than these list slowly. */
const MAX_CHECKPOINTS = 10_000;
/** The module takes no smaller block. */
const MIN_BLOCK_BYTES = 4096;
/** A place for histories: the module's records take a quarter of it. */
const MIN_PLACE_BYTES = 1024 * 1024;
const MAX_PORT = 65_535;
const HOOK_NAME = /^[A-Za-z0-9_-][A-Za-z0-9_.-]{0,63}$/;

const YES_NO = ['yes', 'no'] as const;
const isYes = (word: 'yes' | 'no' | undefined): boolean => word === 'yes';

const readPath = (text: string): string | undefined =>
  /^\/\P{Cc}*$/u.test(text) ? text : undefined;
const readText = (text: string): string | undefined => (text === '' ? undefined : text);
const readName = (text: string): string | undefined => (isDiskName(text) ? text : undefined);
/** As the schema has it: without the spaces that people put on command lines. */
const sizeOf = (text: string): number | undefined =>
  /\s/.test(text) ? undefined : parseSize(text);
const readBlockSize = (text: string): number | undefined => {
  const bytes = sizeOf(text) ?? 0;
  return bytes >= MIN_BLOCK_BYTES && Number.isInteger(Math.log2(bytes)) ? bytes : undefined;
};
const readSize = (text: string): number | undefined => sizeOf(text) || undefined;
const readRate = (text: string): number | undefined => {
  const bytes = sizeOf(text) ?? 0;
  return bytes >= LEAST_BYTES_PER_SECOND ? bytes : undefined;
};
const readNumber =
  (least: number, most: number) =>
  (text: string): number | undefined => {
    const value = Number(text);
    return /^[0-9]{1,5}$/.test(text) && value >= least && value <= most ? value : undefined;
  };
const readPort = readNumber(0, MAX_PORT);

const A_PATH = 'an absolute path';
const A_PORT = `a port, 0 to ${MAX_PORT}`;
const A_RATE = `a rate in bytes per second, such as 100M, at least ${formatSize(LEAST_BYTES_PER_SECOND)}`;
const A_NAME = "a name of letters, digits, '_', '-', '+' and '.', not first";
const A_SIZE = 'a size, such as 512M';

/** Whether what is sent to an address stays on this machine. */
export function isLoopback(host: string): boolean {
  return host === '::1' || host === 'localhost' || (isIPv4(host) && host.startsWith('127.'));
}

/** Refuses the second of two things that are the same. */
function requireUnlike(seen: Set<string>, value: string, fail: (problem: string) => never): void {
  if (seen.has(value)) {
    fail(`${JSON.stringify(value)} is there twice`);
  }
  seen.add(value);
}

type Listening = Checked<'address' | 'port' | 'socket', never, never>;

/** An address is loopback and the port NBD's unless they are given. */
function readAddress(listen: Listening): ListenAddress {
  const path = listen.read('socket', readPath, A_PATH);
  const host = listen.read('address', readText, 'an address');
  const port = listen.read('port', readPort, A_PORT);
  if (path !== undefined) {
    if (host !== undefined || port !== undefined) {
      listen.fail('a socket has neither address nor port', 'socket');
    }
    return { path };
  }
  return { host: host ?? DEFAULT_HOST, port: port ?? NBD_DEFAULT_PORT };
}

/** Reads one document; the order of the functions is that of the example. */
class Reader {
  readonly #document: XmlDocument;

  constructor(document: XmlDocument) {
    this.#document = document;
  }

  folders(element: XmlElement | undefined, standard: Folders): Folders {
    if (element === undefined) {
      return standard;
    }
    const found = check(this.#document, element, { attributes: ['state', 'run'] });
    return {
      state: found.read('state', readPath, A_PATH) ?? standard.state,
      run: found.read('run', readPath, A_PATH) ?? standard.run,
    };
  }

  logLevel(element: XmlElement | undefined): Configuration['logLevel'] {
    const levels = ['error', 'warn', 'info', 'debug'] as const;
    const log = element && check(this.#document, element, { attributes: ['level'] });
    return log?.word('level', levels) ?? 'info';
  }

  devices(element: XmlElement | undefined): DeviceSetting[] {
    const list = element && check(this.#document, element, { many: ['device'] });
    const paths = new Set<string>();
    const names = new Set<string>();
    return (list?.many('device') ?? []).map((each) => {
      const attributes = ['path', 'name', 'blocksize'] as const;
      const device = check(this.#document, each, { attributes });
      const path = device.required('path');
      device.read('path', readPath, A_PATH);
      requireUnlike(paths, path, (problem) => device.fail(problem, 'path'));
      const name = device.read('name', readName, A_NAME);
      if (name !== undefined) {
        requireUnlike(names, name, (problem) => device.fail(problem, 'name'));
      }
      const wanted = 'a power of two from 4K on';
      return { path, name, blockSizeBytes: device.read('blocksize', readBlockSize, wanted) };
    });
  }

  store(element: XmlElement | undefined): StoreSettings {
    const store =
      element &&
      check(this.#document, element, {
        attributes: ['size', 'max'],
        once: ['memory'],
        many: ['folder', 'device'],
      });
    const memory = store?.once('memory');
    const seen = new Set<string>();
    // Folders and devices in the order in which they stand, which is that of preference.
    const places = (element?.children ?? [])
      .filter((child) => child !== memory)
      .map((child) => {
        const place = check(this.#document, child, { attributes: ['path'] });
        const path = place.required('path');
        place.read('path', readPath, A_PATH);
        requireUnlike(seen, path, (problem) => place.fail(problem, 'path'));
        return path;
      });
    const sizeBytes = store?.read('size', readSize, A_SIZE);
    const maxBytes = store?.read('max', readSize, A_SIZE);
    if (sizeBytes !== undefined && maxBytes !== undefined && maxBytes < sizeBytes) {
      store?.fail('max is less than size', 'max');
    }
    const share =
      memory &&
      check(this.#document, memory, { attributes: ['share'] }).read(
        'share',
        readNumber(0, 100),
        'a percentage, 0 to 100',
      );
    return {
      places,
      sizeBytes,
      maxBytes,
      memoryShare: (share ?? DEFAULT_MEMORY_SHARE_PERCENT) / 100,
    };
  }

  /**
   * @param devices of the configuration
   * @param list where these are
   */
  history(
    element: XmlElement | undefined,
    devices: readonly DeviceSetting[],
    list: XmlElement | undefined,
  ): HistorySettings {
    const attributes = ['keep', 'place', 'size'] as const;
    const history = element && check(this.#document, element, { attributes });
    const sizeBytes = history?.read('size', readSize, A_SIZE);
    if (sizeBytes !== undefined && sizeBytes < MIN_PLACE_BYTES) {
      history?.fail(`size is less than ${formatSize(MIN_PLACE_BYTES)}`, 'size');
    }
    const wanted = history !== undefined || devices.length > 0;
    const keep = isYes(history?.word('keep', YES_NO) ?? (wanted ? 'yes' : 'no'));
    // A place has one record for each.
    if (keep && list !== undefined && devices.length > nativeConstants().maxTrackers) {
      this.#document.fail(
        list.at,
        `<devices> names ${devices.length}, and the histories of ${nativeConstants().maxTrackers} are kept at most: name fewer, or <history keep="no"/>`,
      );
    }
    return {
      keep,
      place: history?.read('place', readPath, A_PATH),
      sizeBytes,
    };
  }

  nbd(element: XmlElement | undefined): Configuration['nbd'] {
    const nbd =
      element && check(this.#document, element, { once: ['tls', 'rates'], many: ['listen'] });
    const tls = this.#tls(nbd?.once('tls'));
    const seen = new Set<string>();
    const listen = (nbd?.many('listen') ?? []).map((each) => {
      const attributes = ['address', 'port', 'socket'] as const;
      const found = check(this.#document, each, { attributes });
      if (found.attribute('socket') === undefined) {
        found.required('address');
      }
      const address = readAddress(found);
      requireUnlike(seen, JSON.stringify(address), () => found.fail('it is there twice'));
      if ('host' in address && !isLoopback(address.host) && !tls.insecure) {
        if (tls.mode !== 'require') {
          found.fail('an address that others reach needs <tls mode="require">', 'address');
        }
      }
      return address;
    });
    return {
      listen: nbd === undefined || listen.length === 0 ? [DEFAULT_LISTEN] : listen,
      tls,
      rates: this.#rates(nbd?.once('rates')),
    };
  }

  #tls(element: XmlElement | undefined): TlsSettings {
    const tls =
      element &&
      check(this.#document, element, {
        attributes: ['mode', 'certificates', 'psk', 'verify-peer', 'insecure'],
        many: ['allow'],
      });
    const certificates = tls?.read('certificates', readPath, A_PATH);
    const psk = tls?.read('psk', readPath, A_PATH);
    const proof = certificates ?? psk;
    const mode =
      tls?.word('mode', ['off', 'on', 'require']) ?? (proof === undefined ? 'off' : 'require');
    const verifyPeer = isYes(tls?.word('verify-peer', YES_NO));
    const rules = (tls?.many('allow') ?? []).map((each) => this.#rule(each));
    if (mode !== 'off' && proof === undefined) {
      tls?.fail('TLS needs certificates or psk');
    }
    if (verifyPeer && certificates === undefined) {
      tls?.fail('verify-peer needs certificates', 'verify-peer');
    }
    if (rules.length > 0 && mode !== 'require') {
      tls?.fail('<allow> needs mode="require": without TLS nobody is known', 'mode');
    }
    const insecure = isYes(tls?.word('insecure', YES_NO));
    return { mode, certificates, psk, verifyPeer, insecure, rules };
  }

  #rule(element: XmlElement): TlsRule {
    const kinds = ['subject', 'san', 'user'] as const;
    const attributes = [...kinds, 'export'] as const;
    const allow = check(this.#document, element, { attributes });
    const [kind, ...others] = kinds.filter((each) => allow.attribute(each) !== undefined);
    if (kind === undefined || others.length > 0) {
      return allow.fail('<allow> needs one of subject, san and user');
    }
    const pattern = allow.read(kind, readText, 'a pattern') ?? '';
    if (kind === 'san' && !/^(dns|ip|uri|email):./.test(pattern)) {
      allow.fail('san begins with "dns:", "ip:", "uri:" or "email:"', 'san');
    }
    return { kind, pattern, export: allow.read('export', readText, 'a pattern') ?? '*' };
  }

  #rates(element: XmlElement | undefined): Rates {
    const rates =
      element && check(this.#document, element, { attributes: ['total'], many: ['export'] });
    const byName = new Map<string, number>();
    const seen = new Set<string>();
    for (const each of rates?.many('export') ?? []) {
      const found = check(this.#document, each, { attributes: ['name', 'rate'] });
      const name = found.required('name');
      found.read('name', readName, A_NAME);
      requireUnlike(seen, name, (problem) => found.fail(problem, 'name'));
      found.required('rate');
      byName.set(name, found.read('rate', readRate, A_RATE) ?? 0);
    }
    return { total: rates?.read('total', readRate, A_RATE), byName };
  }

  metrics(element: XmlElement | undefined): ListenAddress | undefined {
    if (element === undefined) {
      return undefined;
    }
    const attributes = ['address', 'port', 'socket'] as const;
    const metrics = check(this.#document, element, { attributes });
    if (metrics.attribute('socket') === undefined) {
      metrics.required('port');
    }
    return readAddress(metrics);
  }

  api(element: XmlElement | undefined, { run }: Folders): Configuration['api'] {
    const api =
      element && check(this.#document, element, { attributes: ['socket'], many: ['listen'] });
    const listen = (api?.many('listen') ?? []).map((each) => {
      const attributes = ['address', 'port', 'certificates'] as const;
      const found = check(this.#document, each, { attributes });
      for (const name of attributes) {
        found.required(name);
      }
      return {
        host: found.read('address', readText, 'an address') ?? '',
        port: found.read('port', readPort, A_PORT) ?? 0,
        certificates: found.read('certificates', readPath, A_PATH) ?? '',
      };
    });
    const socket = api?.read('socket', readPath, A_PATH) ?? join(run, 'control.sock');
    return { socket, listen };
  }

  hooks(element: XmlElement | undefined): Hook[] {
    const hooks = element && check(this.#document, element, { many: ['hook'] });
    const seen = new Set<string>();
    return (hooks?.many('hook') ?? []).map((each) => {
      const attributes = ['name', 'script', 'timeout'] as const;
      const hook = check(this.#document, each, { attributes });
      const name = hook.required('name');
      const wanted = "a name of letters, digits, '_', '-' and '.', not first";
      hook.read('name', (text) => (HOOK_NAME.test(text) ? text : undefined), wanted);
      requireUnlike(seen, name, (problem) => hook.fail(problem, 'name'));
      hook.required('script');
      const seconds = hook.read(
        'timeout',
        readNumber(1, MAX_HOOK_SECONDS),
        `a number of seconds, 1 to ${MAX_HOOK_SECONDS}`,
      );
      return {
        name,
        script: hook.read('script', readPath, A_PATH) ?? '',
        timeoutMs: (seconds ?? DEFAULT_HOOK_SECONDS) * 1000,
      };
    });
  }

  keepCheckpoints(element: XmlElement | undefined): number | undefined {
    const wanted = `a number, 1 to ${MAX_CHECKPOINTS}`;
    return (
      element &&
      check(this.#document, element, { attributes: ['keep'] }).read(
        'keep',
        readNumber(1, MAX_CHECKPOINTS),
        wanted,
      )
    );
  }

  freezeTimeoutMs(element: XmlElement | undefined): number {
    const wanted = `a number of seconds, 1 to ${MAX_FREEZE_SECONDS}`;
    const seconds =
      element &&
      check(this.#document, element, { attributes: ['timeout'] }).read(
        'timeout',
        readNumber(1, MAX_FREEZE_SECONDS),
        wanted,
      );
    return (seconds ?? DEFAULT_FREEZE_SECONDS) * 1000;
  }
}

const DEFAULT_LISTEN: ListenAddress = { host: DEFAULT_HOST, port: NBD_DEFAULT_PORT };

/**
 * Reads a configuration.
 *
 * @param source where it came from, for messages
 * @param standard folders that it may override
 * @throws XmlError at what is wrong
 */
export function parseConfiguration(
  xml: string,
  source: string = CONFIGURATION_FILE,
  standard: Folders = folders(),
): Configuration {
  const document = new XmlDocument(xml, { code: 'BAD_CONFIGURATION', source, advice: ADVICE });
  const { root } = document;
  if (root.name !== 'stillblock') {
    document.fail(root.at, `<${root.name}> is not <stillblock>`);
  }
  const settings = check(document, root, {
    once: [
      'folders',
      'log',
      'devices',
      'history',
      'store',
      'nbd',
      'metrics',
      'api',
      'hooks',
      'checkpoints',
      'freeze',
    ],
  });
  const reader = new Reader(document);
  const found = reader.folders(settings.once('folders'), standard);
  const list = settings.once('devices');
  const devices = reader.devices(list);
  return {
    folders: found,
    logLevel: reader.logLevel(settings.once('log')),
    devices,
    history: reader.history(settings.once('history'), devices, list),
    store: reader.store(settings.once('store')),
    nbd: reader.nbd(settings.once('nbd')),
    metrics: reader.metrics(settings.once('metrics')),
    api: reader.api(settings.once('api'), found),
    hooks: reader.hooks(settings.once('hooks')),
    keepCheckpoints: reader.keepCheckpoints(settings.once('checkpoints')),
    freezeTimeoutMs: reader.freezeTimeoutMs(settings.once('freeze')),
  };
}

/** What is in force without a configuration. */
export function defaultConfiguration(standard?: Folders): Configuration {
  return parseConfiguration('<stillblock/>', 'the defaults', standard);
}

/** @throws StillblockError if there is no such file, or as {@link parseConfiguration} */
export async function readConfiguration(path: string): Promise<Configuration> {
  let bytes: Buffer;
  try {
    bytes = await readFile(path);
  } catch (error) {
    if (error instanceof Error && 'code' in error && error.code === 'ENOENT') {
      throw new StillblockError(
        'NO_CONFIGURATION',
        `there is no configuration ${path}`,
        'copy the example that comes with stillblock, or name another file',
        { exitCode: EXIT.usage, cause: error },
      );
    }
    throw explain(error, path);
  }
  if (!isUtf8(bytes)) {
    throw new StillblockError('BAD_CONFIGURATION', `${path} is not UTF-8 text`, ADVICE, {
      exitCode: EXIT.usage,
    });
  }
  return parseConfiguration(bytes.toString(), path);
}

/**
 * What is in force: a file that nobody named need not be there.
 *
 * @param path undefined for the usual place
 */
export async function configurationInForce(path?: string): Promise<Configuration> {
  try {
    return await readConfiguration(path ?? CONFIGURATION_FILE);
  } catch (error) {
    const missing = error instanceof StillblockError && error.code === 'NO_CONFIGURATION';
    if (path === undefined && missing) {
      return defaultConfiguration();
    }
    throw error;
  }
}
