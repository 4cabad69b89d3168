// SPDX-License-Identifier: Apache-2.0
/** `stillblock serve`: the daemon. */
import process, { env, pid } from 'node:process';
import type { Command } from 'commander';
import { takeInheritedSockets } from '../activation.ts';
import { runningBackup } from '../api-client.ts';
import { CONFIGURATION_FILE, configurationInForce } from '../configuration.ts';
import { Daemon } from '../daemon.ts';
import { usageError } from '../errors.ts';
import { makeLog } from '../log.ts';
import { ReleaseStack } from '../release-stack.ts';
import { ServiceManager } from '../service.ts';
import { type CommonOptions, newCommand } from './common.ts';

interface ServeOptions extends CommonOptions {
  readonly config?: string;
}

/** Settles with the first signal that asks to end; a second one ends the process. */
function endingSignal(): Promise<string> {
  return new Promise((resolve) => {
    for (const signal of ['SIGINT', 'SIGTERM'] as const) {
      process.once(signal, () => resolve(signal));
    }
  });
}

async function run(options: ServeOptions): Promise<void> {
  const configuration = await configurationInForce(options.config);
  const log = makeLog(options.verbose ?? 0);
  log.level = options.verbose === undefined ? configuration.logLevel : log.level;
  const { folders } = configuration;
  const [control, ...others] = takeInheritedSockets(env, pid);
  if (others.length > 0) {
    throw usageError(
      'more than the control socket has been inherited',
      'leave the others out of the socket unit: the configuration says where else to listen',
    );
  }
  const manager = new ServiceManager(log);
  const stack = new ReleaseStack();
  try {
    const daemon = new Daemon(folders, log, false, () => configurationInForce(options.config));
    stack.push(() => daemon.close());
    await daemon.lock(() => runningBackup(configuration));
    await daemon.configure(configuration);
    // Other commands start faster without it.
    const { serveOnSocket, serveOnTls } = await import('../api-server.ts');
    const server = await serveOnSocket(daemon, configuration.api.socket, log, control?.descriptor);
    stack.push(() => server.close());
    for (const address of configuration.api.listen) {
      const secure = await serveOnTls(daemon, address, log);
      stack.push(() => secure.close());
      daemon.onReload(() => secure.reload());
    }
    stack.push(() => daemon.endBackups());
    const end = endingSignal();
    let reloading = Promise.resolve();
    process.on('SIGHUP', () => {
      reloading = reloading.then(async () => {
        manager.reloading();
        await daemon.reload().then(
          () => log.info('reloaded'),
          (err: unknown) => log.error({ err }, 'not reloaded: what was in force stays'),
        );
        manager.ready('serving');
      });
    });
    manager.ready('serving');
    log.info('ready');
    log.info({ signal: await end }, 'ending');
    manager.stopping();
  } finally {
    await stack.release((err) => log.error({ err }, 'release'));
  }
}

/** `stillblock serve` */
export function serveCommand(): Command {
  return newCommand('serve', 'run the daemon, in the foreground')
    .option('--config <FILE>', `configuration (default: ${CONFIGURATION_FILE}, if there is one)`)
    .addHelpText(
      'after',
      `
It holds the backups that other commands begin and end. SIGHUP reads the configuration
again; SIGTERM ends all backups and then the daemon. Devices stay tracked.

Example:
  systemctl enable --now stillblock`,
    )
    .action(run);
}
