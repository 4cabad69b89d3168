// SPDX-License-Identifier: Apache-2.0
/** Tables, aims and a picture of what was measured. */
import type { Figures } from './workloads.ts';

/** Medians by workload, then by server. */
export type Medians = Readonly<Record<string, Readonly<Record<string, Figures>>>>;

export interface ServerName {
  readonly id: string;
  readonly label: string;
  readonly ours: boolean;
}

export interface Report {
  /** When, on what, with which versions: for the reader to judge. */
  readonly machine: Readonly<Record<string, string>>;
  readonly repetitions: number;
  readonly servers: readonly ServerName[];
  readonly medians: Medians;
  /** All single values, in the order of the repetitions. */
  readonly values: Readonly<Record<string, Readonly<Record<string, readonly Figures[]>>>>;
}

/** Three digits that count. */
export function digits(value: number | undefined): string {
  if (value === undefined || !Number.isFinite(value)) {
    return '–';
  }
  const magnitude = Math.abs(value);
  if (magnitude >= 10_000) {
    return `${Math.round(value / 1000)}K`;
  }
  return magnitude >= 100
    ? value.toFixed(0)
    : magnitude >= 10
      ? value.toFixed(1)
      : value.toFixed(2);
}

type Cell = (figures: Figures) => string;
interface Table {
  readonly title: string;
  readonly columns: readonly (readonly [workload: string, header: string])[];
  readonly cell: Cell;
}

const pair =
  (first: string, second: string): Cell =>
  (figures) =>
    `${digits(figures[first])} (${digits(figures[second])})`;

const TABLES: readonly Table[] = [
  {
    title: 'Sequential: GiB/s (server CPU s/GiB)',
    columns: [
      ['sequential-unix-1', 'unix, 1'],
      ['sequential-unix-4', 'unix, 4'],
      ['sequential-tcp-1', 'TCP, 1'],
      ['sequential-tcp-4', 'TCP, 4'],
      ['tls-1', 'TLS, 1'],
      ['tls-4', 'TLS, 4'],
    ],
    cell: pair('gibPerSecond', 'cpuPerGib'),
  },
  {
    title: '4 KiB random: IOPS (server CPU µs per request)',
    columns: [
      ['random-unix-q1', 'unix q1'],
      ['random-unix-q16', 'unix q16'],
      ['random-unix-q64', 'unix q64'],
      ['random-tcp-q64', 'TCP q64'],
      ['cold-random-q64', 'cold device q64'],
    ],
    cell: pair('iops', 'cpuMicroseconds'),
  },
  {
    title: 'Cold block device, sequential: GiB/s (server CPU s/GiB), page cache left, MiB',
    columns: [['cold-sequential', 'unix, 1']],
    cell: (figures) =>
      `${pair('gibPerSecond', 'cpuPerGib')(figures)}, ${digits(figures['cacheLeftMib'])}`,
  },
  {
    title: 'Small reader beside a 32 MiB streamer: p99 in ms (IOPS), the streamer in GiB/s',
    columns: [['fairness', 'unix q1']],
    cell: (figures) =>
      `${pair('p99Ms', 'iops')(figures)}, ${digits(figures['streamerGibPerSecond'])}`,
  },
  {
    title: '500 idle connections: KiB each (MiB in all)',
    columns: [['idle', 'unix']],
    cell: pair('kibPerConnection', 'memoryMib'),
  },
  {
    title: 'Block status: seconds for the whole map (ms for the first answer)',
    columns: [
      ['status-scattered', '64 GiB, 1 % data'],
      ['status-huge', '16 TiB, 1 % changed'],
    ],
    cell: pair('mapSeconds', 'firstMs'),
  },
];

function markdownTable({ title, columns, cell }: Table, { servers, medians }: Report): string {
  const header = `| ${title} | ${columns.map(([, name]) => name).join(' | ')} |`;
  const rule = `|---|${columns.map(() => '---').join('|')}|`;
  const rows = servers.map(({ id, label }) => {
    const cells = columns.map(([workload]) => {
      const figures = medians[workload]?.[id];
      return figures === undefined || Object.keys(figures).length === 0 ? '–' : cell(figures);
    });
    return `| ${label} | ${cells.join(' | ')} |`;
  });
  return [header, rule, ...rows].join('\n');
}

/** What is aimed at, as a ratio to peers in the same run, or as a number. */
interface Aim {
  readonly what: string;
  readonly workloads: readonly string[];
  readonly figure: string;
  /** Peers; the better one counts. Without them the figure itself is compared. */
  readonly against: readonly string[];
  readonly atLeast?: number;
  readonly atMost?: number;
}

const BOTH = ['nbdkit', 'qemu-nbd'] as const;
const UNIX = ['sequential-unix-1', 'sequential-unix-4'] as const;
const TCP = ['sequential-tcp-1', 'sequential-tcp-4'] as const;

const AIMS: readonly Aim[] = [
  {
    what: 'CPU per GiB, unix, of nbdkit',
    workloads: UNIX,
    figure: 'cpuPerGib',
    against: ['nbdkit'],
    atMost: 0.3,
  },
  {
    what: 'CPU per GiB, unix, of qemu-nbd',
    workloads: UNIX,
    figure: 'cpuPerGib',
    against: ['qemu-nbd'],
    atMost: 0.2,
  },
  {
    what: 'CPU per GiB, TCP, of nbdkit',
    workloads: TCP,
    figure: 'cpuPerGib',
    against: ['nbdkit'],
    atMost: 0.5,
  },
  {
    what: 'CPU per GiB, TCP, of qemu-nbd',
    workloads: TCP,
    figure: 'cpuPerGib',
    against: ['qemu-nbd'],
    atMost: 0.35,
  },
  {
    what: 'throughput, unix, of the better peer',
    workloads: UNIX,
    figure: 'gibPerSecond',
    against: BOTH,
    atLeast: 1.5,
  },
  {
    what: 'throughput, TCP, of the better peer',
    workloads: TCP,
    figure: 'gibPerSecond',
    against: BOTH,
    atLeast: 1.1,
  },
  {
    what: '4 KiB q64 IOPS, of nbdkit',
    workloads: ['random-unix-q64'],
    figure: 'iops',
    against: ['nbdkit'],
    atLeast: 1.5,
  },
  {
    what: '4 KiB q64 IOPS, of qemu-nbd',
    workloads: ['random-unix-q64'],
    figure: 'iops',
    against: ['qemu-nbd'],
    atLeast: 2.5,
  },
  {
    what: '4 KiB q64 CPU per request, of nbdkit',
    workloads: ['random-unix-q64'],
    figure: 'cpuMicroseconds',
    against: ['nbdkit'],
    atMost: 0.5,
  },
  {
    what: '4 KiB q1 IOPS, of the better peer',
    workloads: ['random-unix-q1'],
    figure: 'iops',
    against: BOTH,
    atLeast: 1.2,
  },
  {
    what: 'cold device, sequential, of the better peer',
    workloads: ['cold-sequential'],
    figure: 'gibPerSecond',
    against: BOTH,
    atLeast: 1.1,
  },
  {
    what: 'cold device, 4 KiB q64, of the better peer',
    workloads: ['cold-random-q64'],
    figure: 'iops',
    against: BOTH,
    atLeast: 1.1,
  },
  {
    what: 'TLS CPU per GiB, of nbdkit',
    workloads: ['tls-1', 'tls-4'],
    figure: 'cpuPerGib',
    against: ['nbdkit'],
    atMost: 1,
  },
  {
    what: 'TLS CPU per GiB, of qemu-nbd',
    workloads: ['tls-1', 'tls-4'],
    figure: 'cpuPerGib',
    against: ['qemu-nbd'],
    atMost: 0.5,
  },
  {
    what: 'idle connection, KiB',
    workloads: ['idle'],
    figure: 'kibPerConnection',
    against: [],
    atMost: 20,
  },
  {
    what: 'p99 beside a streamer, of nbdkit',
    workloads: ['fairness'],
    figure: 'p99Ms',
    against: ['nbdkit'],
    atMost: 0.5,
  },
  {
    what: 'page cache left behind, MiB',
    workloads: ['cold-sequential'],
    figure: 'cacheLeftMib',
    against: [],
    atMost: 16,
  },
  {
    what: 'first answer about 16 TiB, ms',
    workloads: ['status-huge'],
    figure: 'firstMs',
    against: [],
    atMost: 100,
  },
];

/** A ratio or a number, and whether it reaches its aim. */
function judge(aim: Aim, server: string, { medians }: Report): string {
  const better = aim.atLeast !== undefined ? Math.max : Math.min;
  const values = aim.workloads.map((workload) => {
    const own = medians[workload]?.[server]?.[aim.figure];
    const peers = aim.against
      .map((peer) => medians[workload]?.[peer]?.[aim.figure])
      .filter((value) => value !== undefined);
    return aim.against.length === 0 ? own : own === undefined ? own : own / better(...peers);
  });
  if (values.some((value) => value === undefined || !Number.isFinite(value))) {
    return '–';
  }
  const reached = values.every(
    (value = Number.NaN) => value >= (aim.atLeast ?? 0) && value <= (aim.atMost ?? Infinity),
  );
  return `${values.map(digits).join(', ')}${reached ? '' : ' **missed**'}`;
}

function aimsTable(report: Report): string {
  const own = report.servers.filter(({ ours }) => ours);
  const rows = AIMS.map((aim) => {
    const bound = aim.atLeast !== undefined ? `≥ ${aim.atLeast}` : `≤ ${aim.atMost}`;
    return `| ${aim.what} | ${bound} | ${own.map(({ id }) => judge(aim, id, report)).join(' | ')} |`;
  });
  const header = `| figure | aim | ${own.map(({ label }) => label).join(' | ')} |`;
  return [header, `|---|---|${own.map(() => '---').join('|')}|`, ...rows].join('\n');
}

/** The whole report as Markdown, without headings. */
export function markdown(report: Report): string {
  const { machine, repetitions } = report;
  const facts = Object.entries(machine).map(([name, value]) => `${name} ${value}`);
  return [
    `Medians of ${repetitions}. ${facts.join('; ')}.`,
    ...TABLES.map((table) => markdownTable(table, report)),
    aimsTable(report),
  ].join('\n\n');
}

// ---- the picture

interface Panel {
  readonly title: string;
  readonly workload: string;
  readonly figure: string;
  readonly more: boolean;
}

const PANELS: readonly Panel[] = [
  {
    title: 'Sequential, unix, GiB/s',
    workload: 'sequential-unix-1',
    figure: 'gibPerSecond',
    more: true,
  },
  {
    title: 'Sequential, unix, CPU s/GiB',
    workload: 'sequential-unix-1',
    figure: 'cpuPerGib',
    more: false,
  },
  {
    title: 'Sequential, TCP, GiB/s',
    workload: 'sequential-tcp-1',
    figure: 'gibPerSecond',
    more: true,
  },
  {
    title: 'Sequential, TCP, CPU s/GiB',
    workload: 'sequential-tcp-1',
    figure: 'cpuPerGib',
    more: false,
  },
  { title: '4 KiB random, queue 1, IOPS', workload: 'random-unix-q1', figure: 'iops', more: true },
  {
    title: '4 KiB random, queue 64, IOPS',
    workload: 'random-unix-q64',
    figure: 'iops',
    more: true,
  },
  {
    title: '4 KiB random, queue 64, CPU µs',
    workload: 'random-unix-q64',
    figure: 'cpuMicroseconds',
    more: false,
  },
  { title: 'TLS, CPU s/GiB', workload: 'tls-1', figure: 'cpuPerGib', more: false },
  { title: 'Beside a streamer, p99 ms', workload: 'fairness', figure: 'p99Ms', more: false },
];

const PANEL_WIDTH = 324;
const PER_ROW = 3;
const BAR = 18;
const LABEL_WIDTH = 138;
const VALUE_WIDTH = 48;
const COLOURS = { ours: '#1f6f4a', peer: '#9aa5ad', text: '#1b1f23', faint: '#57606a' } as const;

function escapeXml(text: string): string {
  return text.replaceAll('&', '&amp;').replaceAll('<', '&lt;').replaceAll('>', '&gt;');
}

function panelSvg(panel: Panel, report: Report, x: number, y: number): string {
  const bars = report.servers.map((server) => ({
    ...server,
    value: report.medians[panel.workload]?.[server.id]?.[panel.figure],
  }));
  const most = Math.max(...bars.map(({ value }) => value ?? 0), Number.MIN_VALUE);
  const width = PANEL_WIDTH - LABEL_WIDTH - VALUE_WIDTH - 16;
  const lines = bars.map(({ label, ours, value }, index) => {
    const top = y + 26 + index * (BAR + 4);
    const length = value === undefined ? 0 : Math.max((value / most) * width, 1);
    const colour = ours ? COLOURS.ours : COLOURS.peer;
    const weight = ours ? ' font-weight="600"' : '';
    return (
      `<text x="${x + LABEL_WIDTH - 6}" y="${top + 13}" text-anchor="end"${weight}>${escapeXml(label)}</text>` +
      `<rect x="${x + LABEL_WIDTH}" y="${top}" width="${length.toFixed(1)}" height="${BAR}" rx="2" fill="${colour}"/>` +
      `<text x="${(x + LABEL_WIDTH + length + 5).toFixed(1)}" y="${top + 13}" fill="${COLOURS.faint}">${digits(value)}</text>`
    );
  });
  const hint = panel.more ? 'more is better' : 'less is better';
  const title =
    `<text x="${x}" y="${y + 14}" font-size="13" font-weight="600">${escapeXml(panel.title)}` +
    `<tspan dx="6" font-size="10" font-weight="400" fill="${COLOURS.faint}">${hint}</tspan></text>`;
  return [title, ...lines].join('\n');
}

/** A picture of the figures that matter most. */
export function svg(report: Report): string {
  const panelHeight = 26 + report.servers.length * (BAR + 4) + 22;
  const height = Math.ceil(PANELS.length / PER_ROW) * panelHeight + 20;
  const width = PER_ROW * (PANEL_WIDTH + 16) + 16;
  const panels = PANELS.map((panel, index) =>
    panelSvg(
      panel,
      report,
      16 + (index % PER_ROW) * (PANEL_WIDTH + 16),
      14 + Math.floor(index / PER_ROW) * panelHeight,
    ),
  );
  return [
    `<svg xmlns="http://www.w3.org/2000/svg" width="${width}" height="${height}" viewBox="0 0 ${width} ${height}"`,
    ` font-family="system-ui, 'DejaVu Sans', sans-serif" font-size="11" fill="${COLOURS.text}">`,
    `<rect width="${width}" height="${height}" fill="#ffffff"/>`,
    ...panels,
    '</svg>',
    '',
  ].join('\n');
}
