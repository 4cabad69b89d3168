// SPDX-License-Identifier: Apache-2.0
/** What the next reboot would cost: whose history will not be kept, and why. */
import { stat } from 'node:fs/promises';
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

/**
 * @param devices all that are tracked
 * @returns a finding for each whose history the next reboot would end
 */
export async function examineHistories(
  machine: Machine,
  devices: readonly DeviceReport[],
): Promise<Finding[]> {
  const lost = devices
    .filter(({ kept }) => kept !== 'OK')
    .map(({ name, kept }) => {
      const { message, advice } = historyWords(kept);
      return warn(`history of ${name}`, `it will not survive a reboot: ${message}`, advice);
    });
  const kept = devices.length - lost.length;
  return [
    ...lost,
    ...(kept > 0 ? [ok('histories', `${kept} will survive a clean reboot`)] : []),
    ...(kept > 0 ? [await examineInitramfs(machine)] : []),
  ];
}
