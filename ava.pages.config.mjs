// SPDX-License-Identifier: Apache-2.0
// What `npm run test:pages` runs: the pages' commands that take too long for `npm test`.

export default {
  files: ['dist/test/long/*.test.js'],
  timeout: '60m',
  workerThreads: false,
  concurrency: 1,
};
