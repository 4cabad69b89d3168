// SPDX-License-Identifier: Apache-2.0
/** What the metrics are, and how Prometheus reads them. */
import { Counter, Gauge, Histogram, Registry } from 'prom-client';
import {
  DURATION_BOUNDS_SECONDS,
  type ExportFigures,
  REQUEST_KINDS,
  type RequestKind,
} from '../nbd/figures.ts';
import type { BackupDescription } from './backup-report.ts';
import type { Measured } from './metrics.ts';

/** One line of a metric, without its name. */
interface Sample {
  readonly labels: Readonly<Record<string, string>>;
  readonly value: number;
}

type MetricDefinition = {
  readonly type: 'counter' | 'gauge';
  readonly name: string;
  readonly help: string;
  readonly labelNames: readonly string[];
  readonly samples: (measured: Measured) => readonly Sample[];
};

const SNAPSHOT_STATES: readonly BackupDescription['state'][] = [
  'preparing',
  'taking',
  'serving',
  'failed',
  'ending',
  'ended',
];

function perRequest(
  { nbd }: Measured,
  value: (figures: ExportFigures, kind: RequestKind) => number,
): Sample[] {
  return [...nbd.exports].flatMap(([name, figures]) =>
    REQUEST_KINDS.map((kind) => ({
      labels: { export: name, command: kind },
      value: value(figures, kind),
    })),
  );
}

function one(value: number | undefined): Sample[] {
  return value === undefined ? [] : [{ labels: {}, value }];
}

/** One sample of each backup that has the value. */
function perBackup(
  { backups = [] }: Measured,
  value: (backup: BackupDescription) => number | null | undefined,
): Sample[] {
  return backups.flatMap((backup) => {
    const found = value(backup);
    const labels = { backup: backup.checkpoint };
    return found === undefined || found === null ? [] : [{ labels, value: found }];
  });
}

function invalidCheckpoints(backup: BackupDescription): Sample[] {
  return backup.disks.flatMap(({ name, full }) => {
    const reasons = new Map<string, number>();
    for (const { why } of full) {
      reasons.set(why, (reasons.get(why) ?? 0) + 1);
    }
    return [...reasons].map(([reason, value]) => ({ labels: { disk: name, reason }, value }));
  });
}

const DEFINITIONS: readonly MetricDefinition[] = [
  {
    type: 'gauge',
    name: 'stillblock_nbd_handshakes',
    help: 'Clients that have not chosen an export yet',
    labelNames: [],
    samples: ({ nbd }) => one(nbd.handshakes),
  },
  {
    type: 'gauge',
    name: 'stillblock_nbd_connections',
    help: 'Clients that are served',
    labelNames: [],
    samples: ({ nbd }) => one(nbd.connections),
  },
  {
    type: 'counter',
    name: 'stillblock_nbd_connections_total',
    help: 'Clients that have connected',
    labelNames: [],
    samples: ({ nbd }) => one(nbd.accepted),
  },
  {
    type: 'gauge',
    name: 'stillblock_nbd_in_flight_bytes',
    help: 'Data that is being read or sent',
    labelNames: [],
    samples: ({ nbd }) => one(nbd.bytesInFlight),
  },
  {
    type: 'counter',
    name: 'stillblock_nbd_read_bytes_total',
    help: 'Data in replies, without holes',
    labelNames: ['export'],
    samples: ({ nbd }) =>
      [...nbd.exports].map(([name, { readBytes }]) => ({
        labels: { export: name },
        value: readBytes,
      })),
  },
  {
    type: 'counter',
    name: 'stillblock_nbd_request_errors_total',
    help: 'Requests that were answered by an error',
    labelNames: ['export', 'command'],
    samples: (measured) => perRequest(measured, ({ requests }, kind) => requests[kind].errors),
  },
  {
    type: 'gauge',
    name: 'stillblock_history_began',
    help: 'One for why the change history of a disk began: older checkpoints need a full copy',
    labelNames: ['disk', 'reason'],
    samples: ({ devices = [] }) =>
      devices.map(({ name, began }) => ({ labels: { disk: name, reason: began }, value: 1 })),
  },
  {
    type: 'gauge',
    name: 'stillblock_history_kept',
    help: 'One if the change history of a disk will survive a clean reboot; if not, why',
    labelNames: ['disk', 'reason'],
    samples: ({ devices = [] }) =>
      devices.map(({ name, kept }) => ({
        labels: { disk: name, reason: kept },
        value: kept === 'OK' ? 1 : 0,
      })),
  },
  {
    type: 'gauge',
    name: 'stillblock_snapshot_state',
    help: 'One for the state that the backup is in, zero for the others',
    labelNames: ['backup', 'state'],
    samples: ({ backups = [] }) =>
      backups.flatMap((backup) =>
        SNAPSHOT_STATES.map((state) => ({
          labels: { backup: backup.checkpoint, state },
          value: state === backup.state ? 1 : 0,
        })),
      ),
  },
  {
    type: 'gauge',
    name: 'stillblock_snapshot_freeze_seconds',
    help: 'How long file systems were frozen',
    labelNames: ['backup'],
    samples: (measured) => perBackup(measured, ({ freezeMs }) => freezeMs && freezeMs / 1000),
  },
  {
    type: 'gauge',
    name: 'stillblock_snapshot_gate_seconds',
    help: 'How long writes were held for the switch',
    labelNames: ['backup'],
    samples: (measured) => perBackup(measured, ({ gateMs }) => gateMs && gateMs / 1000),
  },
  {
    type: 'counter',
    name: 'stillblock_held_writes_total',
    help: 'Writes that waited for copy-on-write',
    labelNames: ['backup'],
    samples: (measured) => perBackup(measured, ({ heldWrites }) => heldWrites),
  },
  {
    type: 'gauge',
    name: 'stillblock_store_used_bytes',
    help: 'Difference storage in use',
    labelNames: ['backup'],
    samples: (measured) => perBackup(measured, ({ store }) => store?.usedBytes),
  },
  {
    type: 'gauge',
    name: 'stillblock_store_limit_bytes',
    help: 'Difference storage that there is now; it may grow',
    labelNames: ['backup'],
    samples: (measured) => perBackup(measured, ({ store }) => store?.capacityBytes),
  },
  {
    type: 'gauge',
    name: 'stillblock_disk_size_bytes',
    help: 'Size of each disk of the snapshot',
    labelNames: ['disk'],
    samples: ({ backups = [] }) =>
      backups.flatMap(({ disks }) =>
        disks.map(({ name, sizeBytes }) => ({ labels: { disk: name }, value: sizeBytes })),
      ),
  },
  {
    type: 'gauge',
    name: 'stillblock_dirty_bytes',
    help: 'What changed on a disk since a checkpoint, in whole blocks',
    labelNames: ['disk', 'checkpoint'],
    samples: ({ backups = [] }) =>
      backups
        .flatMap(({ exports }) => exports)
        .flatMap(({ disk, checkpoint, dirtyBytes }) =>
          checkpoint === undefined || dirtyBytes === undefined
            ? []
            : [{ labels: { disk, checkpoint }, value: dirtyBytes }],
        ),
  },
  {
    type: 'gauge',
    name: 'stillblock_invalid_checkpoints',
    help: 'Checkpoints since which the changes of a disk are not known, by reason',
    labelNames: ['disk', 'reason'],
    samples: ({ backups = [] }) => backups.flatMap(invalidCheckpoints),
  },
  {
    type: 'gauge',
    name: 'stillblock_store_overflow_seconds',
    help: 'Forecast until the store is full, from its use in the last minutes',
    labelNames: ['backup'],
    samples: (measured) => perBackup(measured, ({ store }) => store?.overflowSeconds),
  },
];

/** A metric whose value is set anew each time. */
function addMetric(registry: Registry, of: () => Measured, definition: MetricDefinition): void {
  const { type, name, help, labelNames, samples } = definition;
  const configuration = { name, help, labelNames: [...labelNames], registers: [registry] };
  if (type === 'counter') {
    new Counter({
      ...configuration,
      collect() {
        this.reset();
        for (const { labels, value } of samples(of())) {
          this.inc({ ...labels }, value);
        }
      },
    });
  } else {
    new Gauge({
      ...configuration,
      collect() {
        this.reset();
        for (const { labels, value } of samples(of())) {
          this.set({ ...labels }, value);
        }
      },
    });
  }
}

/** A value of a histogram, as prom-client writes them out. */
interface HistogramValue {
  readonly metricName: string;
  readonly labels: Readonly<Record<string, string>>;
  readonly value: number;
}

const DURATION = 'stillblock_nbd_request_duration_seconds';
const DURATION_HELP = 'From a request to its whole reply being handed to the socket';

function durationValues({ nbd }: Measured): HistogramValue[] {
  const values: HistogramValue[] = [];
  for (const [name, { requests }] of nbd.exports) {
    for (const kind of REQUEST_KINDS) {
      const labels = { export: name, command: kind };
      const { durations, seconds } = requests[kind];
      let count = 0;
      for (const [index, inClass] of durations.entries()) {
        count += inClass;
        const bound = DURATION_BOUNDS_SECONDS[index];
        const le = bound === undefined ? '+Inf' : String(bound);
        values.push({ metricName: `${DURATION}_bucket`, labels: { ...labels, le }, value: count });
      }
      values.push({ metricName: `${DURATION}_sum`, labels, value: seconds });
      values.push({ metricName: `${DURATION}_count`, labels, value: count });
    }
  }
  return values;
}

/**
 * Durations that the engines have counted already: prom-client's own histogram can only
 * be told one observation at a time.
 */
class CountedDurations extends Histogram<string> {
  readonly #of: () => Measured;

  constructor(registry: Registry, of: () => Measured) {
    super({
      name: DURATION,
      help: DURATION_HELP,
      labelNames: ['export', 'command'],
      buckets: [...DURATION_BOUNDS_SECONDS],
      registers: [registry],
    });
    this.#of = of;
  }

  /** What the registry writes out, and what prom-client's own `get` is made of. */
  getForPromString(): Promise<object> {
    const values = durationValues(this.#of());
    return Promise.resolve({
      name: DURATION,
      help: DURATION_HELP,
      type: 'histogram',
      aggregator: 'sum',
      values,
    });
  }
}

/** The metrics as text, in Prometheus' format. */
export class Metrics {
  readonly #registry: Registry = new Registry();

  /** @param measure looks all figures up */
  constructor(measure: () => Measured) {
    // Asked for once per scrape, so that all metrics of it are of one moment.
    let measured: Measured | undefined;
    const of = (): Measured => {
      if (measured === undefined) {
        measured = measure();
        queueMicrotask(() => {
          measured = undefined;
        });
      }
      return measured;
    };
    for (const definition of DEFINITIONS) {
      addMetric(this.#registry, of, definition);
    }
    new CountedDurations(this.#registry, of);
  }

  get contentType(): string {
    return this.#registry.contentType;
  }

  text(): Promise<string> {
    return this.#registry.metrics();
  }
}
