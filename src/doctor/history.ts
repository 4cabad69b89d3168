// SPDX-License-Identifier: Apache-2.0
/** What the next reboot would cost: whose history will not be kept, and why. */
import { realpath, stat } from 'node:fs/promises';
import type { Configuration } from '../configuration.ts';
import type { DeviceReport } from '../devices.ts';
import { historyWords } from '../errors.ts';
import { type Finding, type Machine, ok, warn } from './machine.ts';

/** What puts devices under tracking before they are mounted. */
const HOOKS = [
  '/usr/share/initramfs-tools/hooks/stillblock',
  '/etc/initramfs-tools/hooks/stillblock',
  '/usr/lib/dracut/modules.d/90stillblock',
] as const;
/** What the hooks take into an initramfs. */
const PLAN = '/var/lib/stillblock/boot-plan';
/** By initramfs-tools and by dracut, of a kernel's release. */
const imagesOf = (release: string): readonly string[] => [
  `/boot/initrd.img-${release}`,
  `/boot/initramfs-${release}.img`,
];

/** When each of some files changed, milliseconds since 1970, as far as they are there. */
async function times(
  machine: Machine,
  paths: readonly string[],
  kind: 'mtimeMs' | 'ctimeMs',
): Promise<number[]> {
  const found = await Promise.all(
    paths.map((path) => stat(machine.path(path)).catch(() => undefined)),
  );
  return found.flatMap((status) => (status === undefined ? [] : [status[kind]]));
}

async function examineInitramfs(machine: Machine): Promise<Finding> {
  const check = 'initramfs';
  // A package's files keep the time when they were made: only the inode's tells when they came.
  const hooks = await times(machine, HOOKS, 'ctimeMs');
  if (hooks.length === 0) {
    return warn(
      check,
      'devices are tracked after they are mounted: each reboot begins new histories',
      'install the hook as docs/reboot.md says, and run update-initramfs -u',
    );
  }
  const [plan] = await times(machine, [PLAN], 'mtimeMs');
  if (plan === undefined) {
    return warn(
      check,
      `there is no ${PLAN}, which tells it what to track`,
      'restart stillblock.service, whose <folders state> has to be the usual one',
    );
  }
  const release = (await machine.text('/proc/sys/kernel/osrelease'))?.trim() ?? '';
  const [image] = await times(machine, imagesOf(release), 'mtimeMs');
  if (image === undefined) {
    return warn(
      check,
      `there is none of kernel ${release} in /boot: whether it tracks devices is not known`,
      'run update-initramfs -u, or dracut -f',
    );
  }
  if (image < Math.max(plan, ...hooks)) {
    const late = image < plan ? 'the devices to track changed' : 'the hook was installed';
    return warn(
      check,
      `it was made before ${late}: what it does not know begins a new history at the next boot`,
      'run update-initramfs -u, or dracut -f',
    );
  }
  return ok(check, 'devices are tracked before they are mounted');
}

/** Devices that were attached by hand: the next boot does not know them. */
async function attachedByHand(
  machine: Machine,
  configured: Configuration['devices'],
  devices: readonly DeviceReport[],
): Promise<Finding[]> {
  const paths = await Promise.all(
    configured.map(({ path }) => realpath(machine.path(path)).catch(() => machine.path(path))),
  );
  const unknown = devices.filter(({ device }) => !paths.includes(machine.path(device)));
  return unknown.length === 0
    ? []
    : [
        warn(
          `history of ${unknown.map(({ name }) => name).join(', ')}`,
          'a reboot would end it: nothing tracks the device before it is mounted',
          'name it in <devices> of stillblock.xml',
        ),
      ];
}

/** One for each reason. */
function lostHistories(devices: readonly DeviceReport[]): Finding[] {
  const names = new Map<string, string[]>();
  for (const { name, kept } of devices.filter((device) => device.kept !== 'OK')) {
    names.set(kept, [...(names.get(kept) ?? []), name]);
  }
  return [...names].map(([why, all]) => {
    const { message, advice } = historyWords(why);
    return warn(`history of ${all.join(', ')}`, `a reboot would end it: ${message}`, advice);
  });
}

/**
 * @param devices all that are tracked
 * @returns what of their histories the next reboot would end, and why
 */
export async function examineHistories(
  machine: Machine,
  { history, devices: configured }: Pick<Configuration, 'history' | 'devices'>,
  devices: readonly DeviceReport[],
): Promise<Finding[]> {
  if (devices.length === 0) {
    return [];
  }
  if (!history.keep) {
    const why = configured.length === 0 ? '<devices> names none' : '<history keep="no"/>';
    return [ok('histories', `a reboot ends them: ${why}`)];
  }
  const kept = devices.filter((device) => device.kept === 'OK');
  const byHand = await attachedByHand(machine, configured, kept);
  return [
    ...lostHistories(devices),
    ...byHand,
    ...(kept.length > 0
      ? [ok('histories', `${kept.length} will be written at a clean reboot`)]
      : []),
    ...(kept.length > 0 ? [await examineInitramfs(machine)] : []),
  ];
}
