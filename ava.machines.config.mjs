// SPDX-License-Identifier: Apache-2.0
// What `npm run test:machines` runs: tests of whole machines, which take minutes for
// each boot where they are emulated.

export default {
  files: ['dist/test/machines/*.test.js'],
  timeout: '60m',
  workerThreads: false,
  concurrency: 1,
};
