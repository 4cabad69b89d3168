// SPDX-License-Identifier: Apache-2.0
// What `npm run test:reboots` runs: boot after boot of a machine by our hook.

export default {
  files: ['dist/test/reboots/*.test.js'],
  timeout: '60m',
  workerThreads: false,
  concurrency: 1,
};
