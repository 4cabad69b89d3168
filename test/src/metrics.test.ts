// SPDX-License-Identifier: Apache-2.0
/** What several NBD servers of one daemon have counted, in one answer. */
import test from 'ava';
import { countRequest, emptyFigures } from '../../nbd/figures.ts';
import { type NbdFigures, NO_FIGURES, sumFigures } from '../../src/metrics.ts';
import { Metrics } from '../../src/prometheus.ts';

function figuresOf(connections: number, reads: Readonly<Record<string, number>>): NbdFigures {
  const exports = new Map(
    Object.entries(reads).map(([name, readBytes]) => {
      const figures = emptyFigures();
      figures.readBytes = readBytes;
      countRequest(figures.requests.read, 0.002, readBytes === 0);
      return [name, figures] as const;
    }),
  );
  return { handshakes: 1, connections, accepted: 10 * connections, bytesInFlight: 4096, exports };
}

test('figures of several servers are summed, exports by their names', async (t) => {
  const one = figuresOf(2, { system: 1000, data: 0 });
  const other = figuresOf(3, { system: 24 });
  const text = await new Metrics(() => ({ nbd: sumFigures([one, NO_FIGURES, other]) })).text();
  for (const line of [
    'stillblock_nbd_handshakes 2',
    'stillblock_nbd_connections 5',
    'stillblock_nbd_connections_total 50',
    'stillblock_nbd_in_flight_bytes 8192',
    'stillblock_nbd_read_bytes_total{export="system"} 1024',
    'stillblock_nbd_read_bytes_total{export="data"} 0',
    'stillblock_nbd_request_errors_total{export="data",command="read"} 1',
    'stillblock_nbd_request_duration_seconds_bucket{export="system",command="read",le="0.001"} 0',
    'stillblock_nbd_request_duration_seconds_bucket{export="system",command="read",le="0.003"} 2',
  ]) {
    t.true(text.split('\n').includes(line), `${line} in\n${text}`);
  }
  // What was given is not what was added up.
  t.is(one.exports.get('system')?.readBytes, 1000);
});
