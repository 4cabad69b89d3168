// SPDX-License-Identifier: Apache-2.0
/** What several NBD servers of one daemon have counted, in one answer. */
import test from 'ava';
import { countRequest, emptyFigures } from '../../nbd/figures.ts';
import type { DeviceReport } from '../../src/devices.ts';
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

test('why a history began, and why one will not be kept, is in the metrics', async (t) => {
  const device = (name: string, began: string, kept: string): DeviceReport => ({
    ...{ name, device: `/dev/${name}`, tracker: '1', sizeBytes: 1, blockSizeBytes: 65_536 },
    ...{ generation: 'a', number: 1, takenUp: false, began, kept, writes: 0, heldWrites: 0 },
    ...{ inSnapshot: false, resized: false, gone: false },
  });
  const devices = [device('sda', 'NOT_SAVED', 'OK'), device('sdb', 'FIRST', 'CONTAINER')];
  const text = await new Metrics(() => ({ nbd: NO_FIGURES, devices })).text();
  for (const line of [
    'stillblock_history_began{disk="sda",reason="NOT_SAVED"} 1',
    'stillblock_history_began{disk="sdb",reason="FIRST"} 1',
    'stillblock_history_kept{disk="sda",reason="OK"} 1',
    'stillblock_history_kept{disk="sdb",reason="CONTAINER"} 0',
  ]) {
    t.true(text.split('\n').includes(line), `${line} in\n${text}`);
  }
});
