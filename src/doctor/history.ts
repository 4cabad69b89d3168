// SPDX-License-Identifier: Apache-2.0
/** What the next reboot would cost: whose history will not be kept, and why. */
import { stat } from 'node:fs/promises';
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
const PLAN = '/var/lib/stillblock/boot-plan';

async function changedAt(path: string): Promise<number | undefined> {
  return stat(path).then(
    ({ mtimeMs }) => mtimeMs,
    () => undefined,
  );
}

async function examineInitramfs(machine: Machine): Promise<Finding> {
  const check = 'initramfs';
  const found = await Promise.all(HOOKS.map((path) => machine.exists(path)));
  if (!found.includes(true)) {
    return warn(
      check,
      'devices are tracked after they are mounted: each reboot begins new histories',
      'install the hook as docs/reboot.md says, and run update-initramfs -u',
    );
  }
  const release = (await machine.text('/proc/sys/kernel/osrelease'))?.trim() ?? '';
  const [plan, image] = await Promise.all([
    changedAt(machine.path(PLAN)),
    changedAt(machine.path(`/boot/initrd.img-${release}`)),
  ]);
  if (plan === undefined) {
    return warn(check, `there is no ${PLAN}`, 'restart stillblock.service');
  }
  if (image !== undefined && image < plan) {
    return warn(
      check,
      'it was made before the devices to track changed: they begin new histories at the next boot',
      'run update-initramfs -u',
    );
  }
  return ok(check, 'devices are tracked before they are mounted');
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
  { history }: Pick<Configuration, 'history'>,
  devices: readonly DeviceReport[],
): Promise<Finding[]> {
  if (!history.keep) {
    const none = ok('histories', 'a reboot ends them: <history> does not say that they are kept');
    return devices.length === 0 ? [] : [none];
  }
  const kept = devices.filter((device) => device.kept === 'OK').length;
  return [
    ...lostHistories(devices),
    ...(kept > 0 ? [ok('histories', `${kept} will survive a clean reboot`)] : []),
    ...(kept > 0 ? [await examineInitramfs(machine)] : []),
  ];
}
