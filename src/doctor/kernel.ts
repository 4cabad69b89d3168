// SPDX-License-Identifier: Apache-2.0
/** Whether the kernel has what the module needs, and lets it in. */
import { type Finding, fail, type Machine, ok, warn } from './machine.ts';

/** What docs/support.md says. */
const OLDEST = [5, 10] as const;
const NEWEST = [7, 2] as const;
/** The function where writes are seen. */
const HOOKED = 'submit_bio_noacct';
/** Other products' modules that sit on the path of writes. */
const OTHER_FILTERS: Readonly<Record<string, string>> = {
  blksnap: 'Veeam or blksnap',
  veeamblksnap: 'Veeam',
  veeamsnap: 'Veeam',
  dattobd: 'Datto',
  elastio_snap: 'Elastio',
  assurio_snap: 'Elastio',
  snapapi26: 'Acronis',
  snumbd26: 'Acronis',
};
const SECURE_BOOT = 'SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c';

/** Whether a is an older version than b. */
function isOlder(
  [a1 = 0, a2 = 0]: readonly number[],
  [b1 = 0, b2 = 0]: readonly number[],
): boolean {
  return a1 < b1 || (a1 === b1 && a2 < b2);
}

function examineRelease(release: string): Finding {
  const version = /^(\d+)\.(\d+)/.exec(release)?.slice(1).map(Number) ?? [];
  const range = `${OLDEST.join('.')} to ${NEWEST.join('.')}`;
  if (isOlder(version, OLDEST)) {
    return fail('kernel', release, `use a kernel from ${range}`);
  }
  return isOlder(NEWEST, version)
    ? warn('kernel', release, `it is newer than those that were tested, ${range}`)
    : ok('kernel', release);
}

async function examineTracing(machine: Machine, release: string): Promise<Finding> {
  const check = 'function tracing';
  if ((await machine.text('/proc/sys/kernel/ftrace_enabled'))?.trim() === '0') {
    return fail(check, 'it is switched off', 'run sysctl kernel.ftrace_enabled=1');
  }
  for (const folder of ['/sys/kernel/tracing', '/sys/kernel/debug/tracing']) {
    const functions = await machine.text(`${folder}/available_filter_functions`);
    if (functions !== undefined) {
      return new RegExp(`^${HOOKED}( |$)`, 'm').test(functions)
        ? ok(check, `${HOOKED} can be traced`)
        : fail(check, `${HOOKED} cannot be traced`, 'use a kernel as distributions build it');
    }
  }
  const config = await machine.text(`/boot/config-${release}`);
  if (config === undefined) {
    return warn(check, 'it could not be seen', 'run doctor as root, with tracefs mounted');
  }
  return /^CONFIG_DYNAMIC_FTRACE=y$/m.test(config)
    ? ok(check, "the kernel's configuration has it")
    : fail(check, 'the kernel was built without it', 'use one with CONFIG_DYNAMIC_FTRACE');
}

async function examineFilters(machine: Machine): Promise<Finding> {
  const check = 'other filters';
  const loaded = (await machine.text('/proc/modules')) ?? '';
  const names = loaded.split('\n').map((line) => line.split(' ')[0] ?? '');
  const others = names.filter((name) => Object.hasOwn(OTHER_FILTERS, name));
  if (others.length > 0) {
    const list = others.map((name) => `${name} (${OTHER_FILTERS[name]})`).join(', ');
    return warn(
      check,
      `${list} is loaded`,
      "two filters see each other's writes: remove the other product, or test both together",
    );
  }
  const hooks = (await machine.text('/sys/kernel/tracing/enabled_functions')) ?? '';
  const [, flags = ''] = new RegExp(`^${HOOKED} \\(\\d+\\)([ A-Z]*)`, 'm').exec(hooks) ?? [];
  return flags.includes('I') && !names.includes('stillblock')
    ? fail(
        check,
        `something else replaces ${HOOKED}, such as a live patch`,
        'look at /sys/kernel/tracing/enabled_functions, and remove it',
      )
    : ok(check, 'none');
}

/** Where the module lies, if it is installed for this kernel. */
async function findModule(machine: Machine, release: string): Promise<string | undefined> {
  const index = await machine.text(`/lib/modules/${release}/modules.dep`);
  const path = /^(\S*\/stillblock\.ko(?:\.[a-z]+)?):/m.exec(index ?? '')?.[1];
  return path === undefined ? undefined : `/lib/modules/${release}/${path}`;
}

/** Whether the kernel loads signed modules only, and why. */
async function whyEnforced(machine: Machine): Promise<string | undefined> {
  if ((await machine.text('/sys/module/module/parameters/sig_enforce'))?.trim() === 'Y') {
    return 'module.sig_enforce is set';
  }
  const lockdown = await machine.text('/sys/kernel/security/lockdown');
  const level = /\[(integrity|confidentiality)\]/.exec(lockdown ?? '')?.[1];
  return level === undefined ? undefined : `the kernel is locked down (${level})`;
}

async function examineSignature(
  machine: Machine,
  path: string | undefined,
  loaded: boolean,
): Promise<Finding> {
  const check = 'Secure Boot';
  // Four bytes of attributes, then the value (UEFI 2.10, 3.3).
  const variable = await machine.bytes(`/sys/firmware/efi/efivars/${SECURE_BOOT}`);
  const state = variable?.[4] === 1 ? 'on' : variable === undefined ? 'not there' : 'off';
  const enforced = await whyEnforced(machine);
  if (enforced === undefined || loaded) {
    return ok(
      check,
      enforced === undefined ? `${state}; any module may be loaded` : `${state}; ours is loaded`,
    );
  }
  const sign = 'sign the module and enrol the key, as docs/module.md says';
  if (path === undefined) {
    return warn(check, `${state}; ${enforced}: modules have to be signed`, sign);
  }
  const signer = await machine.ask('modinfo', '-F', 'signer', machine.path(path));
  if (signer === undefined || signer === '') {
    return fail(check, `${state}; ${enforced}, and ${path} is not signed`, sign);
  }
  const keys = (await machine.text('/proc/keys')) ?? '';
  return keys.includes(signer)
    ? ok(check, `${state}; the module is signed by ${signer}, whom the kernel trusts`)
    : fail(
        check,
        `${state}; the module is signed by ${signer}, whom the kernel does not trust`,
        'enrol that key with mokutil --import, restart, and confirm it',
      );
}

async function examineModule(
  machine: Machine,
  release: string,
  path: string | undefined,
  loaded: boolean,
): Promise<Finding[]> {
  const headers = await machine.exists(`/lib/modules/${release}/build/Makefile`);
  const needed = ok('kernel headers', headers ? 'installed' : 'not needed: the module is there');
  const findings =
    headers || path !== undefined || loaded
      ? [needed]
      : [
          fail(
            'kernel headers',
            `those of ${release} are not installed`,
            `run apt-get install linux-headers-${release}`,
          ),
        ];
  if (loaded) {
    const version = (await machine.text('/sys/module/stillblock/version'))?.trim();
    return [...findings, ok('module', `loaded, version ${version ?? 'unknown'}`)];
  }
  const module =
    path === undefined
      ? fail('module', `not installed for ${release}`, 'build it by DKMS, as docs/module.md says')
      : warn('module', `${path} is not loaded`, 'run modprobe stillblock');
  return [...findings, module];
}

/** Looks at the kernel, its tracing, other filters, Secure Boot and our module. */
export async function examineKernel(machine: Machine): Promise<Finding[]> {
  const release = (await machine.text('/proc/sys/kernel/osrelease'))?.trim() ?? 'unknown';
  const path = await findModule(machine, release);
  const loaded = /^stillblock /m.test((await machine.text('/proc/modules')) ?? '');
  return [
    examineRelease(release),
    await examineTracing(machine, release),
    await examineFilters(machine),
    await examineSignature(machine, path, loaded),
    ...(await examineModule(machine, release, path, loaded)),
  ];
}
