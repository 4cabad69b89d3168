// SPDX-License-Identifier: Apache-2.0
/**
 * Says how much a crowd of held and dribbling clients delays good ones, in ten alternating
 * rounds each: `node dist/test/fuzz/crowd-run.js`; `--help` shows how to have fewer. Nothing
 * else should run meanwhile.
 */
import { Command, InvalidArgumentError } from 'commander';
import { compare, median, serveCrowd } from './crowd.ts';

function number(text: string): number {
  const value = Number(text);
  if (!Number.isSafeInteger(value) || value < 1) {
    throw new InvalidArgumentError('a whole number');
  }
  return value;
}

const { rounds } = new Command('crowd-run')
  .description('says how much a crowd of held and dribbling clients delays good ones')
  .option('--rounds <count>', 'with the crowd, and as many without', number, 10)
  .parse()
  .opts<{ readonly rounds: number }>();
const { server, data } = await serveCrowd();
for (const transport of ['unix', 'tcp'] as const) {
  const { aloneMs, crowdedMs } = await compare(server[transport], data, rounds);
  const [alone, crowded] = [median(aloneMs), median(crowdedMs)];
  process.stdout.write(
    `${transport}: the slowest of 20 clients takes ${alone.toFixed(1)} ms alone, ` +
      `${crowded.toFixed(1)} ms among 250 others\n`,
  );
}
await server.end();
