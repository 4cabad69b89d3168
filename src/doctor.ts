// SPDX-License-Identifier: Apache-2.0
/** What works on this machine, and what to do about what does not. */

import { stat } from 'node:fs/promises';
import { BlockDevices, splitDeviceNumber } from './block-devices.ts';
import type { Configuration } from './configuration.ts';
import { type DeviceReport, listDisks, toDeviceReport } from './devices.ts';
import { examineHistories } from './doctor/history.ts';
import { examineKernel } from './doctor/kernel.ts';
import { type Finding, fail, Machine, ok } from './doctor/machine.ts';
import { examineService } from './doctor/service.ts';
import { StillblockError } from './errors.ts';
import { ControlDevice } from './native.ts';
import { formatSize } from './sizes.ts';
import { chooseStore, type StoreChoice } from './store-policy.ts';

export type { Finding } from './doctor/machine.ts';

/** What can be other than it is here, for tests. */
export interface ExamineOptions {
  /** Where the machine's root folder is. */
  readonly root?: string;
  /** Since 1970. */
  readonly nowMs?: number;
  /** Chooses the store that a snapshot of all devices would have. */
  readonly choose?: () => Promise<StoreChoice>;
  /** All tracked devices. */
  readonly tracked?: () => Promise<readonly DeviceReport[]>;
}

/** None where the module cannot be asked, which is a finding of its own. */
async function trackedHere({ devices }: Configuration): Promise<readonly DeviceReport[]> {
  if (devices.length === 0) {
    return [];
  }
  let control: ControlDevice;
  try {
    control = ControlDevice.open();
  } catch {
    return [];
  }
  try {
    return (await listDisks(control, new Map())).map(toDeviceReport);
  } finally {
    control.close();
  }
}

/** The store that a snapshot of the configured devices would have now. */
async function chooseHere({ devices, store }: Configuration): Promise<StoreChoice> {
  const all = await BlockDevices.read();
  const statuses = await Promise.all(devices.map(({ path }) => stat(path).catch(() => undefined)));
  const origins = statuses
    .filter((status) => status !== undefined)
    .map(({ rdev }) => splitDeviceNumber(rdev))
    .map((number) => ({ number, sizeBytes: all.get(number)?.sizeBytes ?? 0 }));
  return chooseStore(store, origins, all, undefined);
}

async function examineStore(choose: () => Promise<StoreChoice>): Promise<Finding> {
  try {
    const { request, why } = await choose();
    const size = request.sizeBytes === undefined ? '' : `${formatSize(request.sizeBytes)} in `;
    return ok('store', `${size}${request.places.join(', ')}: ${why}`);
  } catch (error) {
    const { message } = error as Error;
    const advice = error instanceof StillblockError ? error.advice : 'correct <store>';
    return fail('store', message, advice);
  }
}

/**
 * Examines the machine.
 *
 * @returns a finding for each thing that was looked at, in the order of what depends on what
 */
export async function examine(
  configuration: Configuration,
  options: ExamineOptions = {},
): Promise<Finding[]> {
  const { root = '/', nowMs = Date.now() } = options;
  const choose = options.choose ?? (() => chooseHere(configuration));
  const tracked = options.tracked ?? (() => trackedHere(configuration));
  const machine = new Machine(root, nowMs);
  return [
    ...(await examineKernel(machine)),
    ...(configuration.devices.length === 0 ? [] : [await examineStore(choose)]),
    ...(await examineHistories(machine, configuration, await tracked())),
    ...(await examineService(machine, configuration)),
  ];
}
