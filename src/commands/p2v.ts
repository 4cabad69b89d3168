// SPDX-License-Identifier: Apache-2.0
/** `stillblock p2v`: a machine's disks of one instant, for virt-v2v on this machine. */
import { writeFile } from 'node:fs/promises';
import process, { stderr } from 'node:process';
import { type Command, Option } from 'commander';
import { explain, usageError } from '../errors.ts';
import type { MachineLayout } from '../layout.ts';
import type { Offer } from '../offer.ts';
import { errorLine, printJson, printLine } from '../output.ts';
import { Forwarder, formatDomain, libvirtArchitecture } from '../p2v.ts';
import { type CommonOptions, countOption, sizeOption } from './common.ts';
import { endingSignal } from './pull.ts';
import {
  certificatesOf,
  hostSource,
  nbdSource,
  newCheckpointName,
  newSourceCommand,
  type SourceOptions,
} from './source.ts';

interface P2vOptions extends CommonOptions, SourceOptions {
  readonly name?: string;
  readonly memory?: number;
  readonly cpus?: number;
  readonly firmware?: 'bios' | 'uefi';
  readonly xml?: string;
}

const DEFAULT_MEMORY_BYTES = 2 * 1024 ** 3;
/** Servers that are up already answer at once. */
const STALL_MS = 60_000;

function domainXml(
  name: string,
  layout: MachineLayout | null,
  ports: readonly number[],
  options: P2vOptions,
): string {
  return formatDomain({
    name,
    memoryBytes: options.memory ?? layout?.memoryBytes ?? DEFAULT_MEMORY_BYTES,
    processors: options.cpus ?? layout?.processors ?? 1,
    architecture: libvirtArchitecture(layout?.architecture ?? process.arch),
    firmware: options.firmware ?? layout?.firmware.kind ?? 'bios',
    ports,
    macs: (layout?.networkCards ?? []).map(({ mac }) => mac),
  });
}

/** Virt-v2v makes files of this name, and refuses an empty one. */
function requireName(options: P2vOptions, offer: Offer): string {
  const name = options.name ?? offer.layout?.hostname ?? '';
  if (!/^[A-Za-z0-9][A-Za-z0-9._-]*$/.test(name)) {
    throw usageError('the new machine has no proper name', 'give it one with --name');
  }
  return name;
}

async function serve(offer: Offer, options: P2vOptions, signal: AbortSignal): Promise<void> {
  const name = requireName(options, offer);
  const path = options.xml ?? `${name}.xml`;
  const forwarders: Forwarder[] = [];
  try {
    for (const { uri } of offer.disks) {
      forwarders.push(await Forwarder.start(uri, certificatesOf(options)));
    }
    const ports = forwarders.map(({ port }) => port);
    const xml = domainXml(name, offer.layout, ports, options);
    await writeFile(path, xml).catch((error: unknown) => {
      throw explain(error, path);
    });
    const command = ['virt-v2v', '-i', 'libvirtxml', path, '-o', 'local', '-os', '.'];
    if (options.json === true) {
      const disks = offer.disks.map((disk, index) => ({ disk: disk.name, port: ports[index] }));
      printJson({ event: 'serving', xml, file: path, disks, command });
    } else {
      printLine(`${xml}\nwritten to ${path}. Now run, in another terminal:\n`);
      printLine(`  ${command.join(' ')}\n`);
      printLine('Ctrl-C ends it.');
    }
    const stopped = new Promise<void>((done) => {
      signal.addEventListener('abort', () => done());
      if (signal.aborted) {
        done();
      }
    });
    await Promise.race([stopped, ...forwarders.map(({ ended }) => ended)]);
  } finally {
    await Promise.all(forwarders.map((forwarder) => forwarder.close()));
  }
}

async function run(host: string | undefined, options: P2vOptions): Promise<void> {
  if ((host === undefined) === (options.nbd === undefined)) {
    throw usageError('it is not said which disks', 'write HOST, or --nbd URI for each in order');
  }
  const checkpoint = newCheckpointName('p2v', new Date());
  const source =
    host === undefined
      ? await nbdSource(checkpoint, options, STALL_MS)
      : await hostSource(host, checkpoint, options, STALL_MS);
  const signal = endingSignal();
  try {
    await serve(await source.begin(new Map(), signal), options, signal);
  } finally {
    // The instant was of use to this conversion alone.
    const failure = await source.end(false);
    if (failure !== undefined) {
      process.exitCode = failure.exitCode;
      stderr.write(errorLine(failure));
    }
  }
  if (options.json === true) {
    printJson({ event: 'ended' });
  }
}

/** `stillblock p2v` */
export function p2vCommand(): Command {
  return newSourceCommand('p2v', "offer a server's disks to virt-v2v on this machine")
    .option('--name <NAME>', "of the new machine (default: the server's)")
    .option('--memory <SIZE>', "of the new machine (default: the server's, else 2G)", sizeOption)
    .option('--cpus <N>', "of the new machine (default: the server's)", countOption(1, 4096))
    .addOption(
      new Option('--firmware <KIND>', "of the new machine (default: the server's)").choices([
        'bios',
        'uefi',
      ]),
    )
    .option('--xml <FILE>', 'where the domain XML goes (default: NAME.xml)')
    .addHelpText(
      'after',
      `
Opens a port of localhost for each disk, in the order of --nbd, writes the XML, prints the
command for virt-v2v, and runs until Ctrl-C. virt-v2v knows neither export names nor TLS:
a qemu-nbd for each disk stands between.

Exit codes: 0 ended, 1 failed, 2 usage, 4 the store of the server's snapshot was full.

Example:
  stillblock p2v --nbd nbds://192.0.2.7/sda --layout layout.json --name web1`,
    )
    .action(run);
}
