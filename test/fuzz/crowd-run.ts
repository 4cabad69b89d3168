// SPDX-License-Identifier: Apache-2.0
/**
 * Says how much a crowd of held and dribbling clients delays good ones, in ten alternating
 * rounds each: `node dist/test/fuzz/crowd-run.js`. Nothing else should run meanwhile.
 */
import { compare, median, serveCrowd } from './crowd.ts';

const { server, data } = await serveCrowd();
for (const transport of ['unix', 'tcp'] as const) {
  const { aloneMs, crowdedMs } = await compare(server[transport], data, 10);
  const [alone, crowded] = [median(aloneMs), median(crowdedMs)];
  process.stdout.write(
    `${transport}: the slowest of 20 clients takes ${alone.toFixed(1)} ms alone, ` +
      `${crowded.toFixed(1)} ms among 250 others\n`,
  );
}
await server.end();
