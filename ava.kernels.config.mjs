// SPDX-License-Identifier: Apache-2.0
// What scripts/test-kernels.sh runs on every kernel; `npm test` has its own
// configuration in package.json.

export default {
  files: ['dist/test/kernels/*.test.js', 'dist/test/vm/scenario.test.js'],
  timeout: '20m',
  workerThreads: false,
  concurrency: 1,
};
