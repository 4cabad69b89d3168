// SPDX-License-Identifier: Apache-2.0
/** TLS by the addon: what holds for Node's own holds for it, too. */
import { nativeTls } from '../../src/native-tls.ts';
import { testTls } from '../nbd/tls-suite.ts';

const make = await nativeTls();
testTls((credentials) => {
  const made = make?.(credentials);
  if (made === undefined) {
    throw new Error('the addon has no TLS');
  }
  return made;
});
