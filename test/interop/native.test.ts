// SPDX-License-Identifier: Apache-2.0
/** What the other files here try with the TypeScript engine, with the native one. */
import './native-engine.ts';
import './extended.test.ts';
import './fio.test.ts';
import './libnbd.test.ts';
import './qemu.test.ts';
import './storage-daemon.test.ts';
