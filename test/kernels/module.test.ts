// SPDX-License-Identifier: Apache-2.0
// The module as source: what the kernel's own checkers say of it, and whether
// DKMS makes a module of it where users have it.

import { join } from 'node:path';
import test from 'ava';
import { checkout, testKernel } from '../vm/checkout.ts';
import { runTool } from '../vm/host.ts';

const kernel = testKernel();
const limitMs = 15 * 60_000;

async function script(name: string, ...options: string[]): Promise<{ code: number; said: string }> {
  const path = join(checkout, 'scripts', name);
  const { code, stdout, stderr } = await runTool(path, [...options, kernel], {
    check: false,
    timeoutMs: limitMs,
  });
  return { code, said: stdout + stderr };
}

// The first two say the same whatever the kernel is.
const [checkers, options] =
  kernel === '6.1'
    ? ['checkpatch, kernel-doc, W=1 and sparse', []]
    : ['W=1 and sparse', ['--build']];

test.serial(`${checkers} find nothing`, async (t) => {
  t.timeout(limitMs);
  const { code, said } = await script('check-module.sh', ...options);
  t.is(code, 0, said);
});

// Nobody installs the kernel `debug`.
if (kernel !== 'debug') {
  test.serial('DKMS builds it', async (t) => {
    t.timeout(limitMs);
    const { code, said } = await script('test-dkms.sh');
    t.is(code, 0, said);
    t.regex(said, /^1 passed, 0 failed$/m);
  });
}
