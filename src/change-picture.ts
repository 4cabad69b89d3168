// SPDX-License-Identifier: Apache-2.0
/** A picture of what changed on a disk, for terminals. */
import type { DiskChanges } from './backup-report.ts';

/** From nothing to all; a cell with any change is never drawn as one without. */
const SHADES = ['·', '░', '▒', '▓', '█'] as const;
/** More rows than these are no picture any more. */
const MAX_ROWS = 16;

/** Rows of cells, and how much of the disk each cell stands for. */
export interface ChangePicture {
  readonly rows: readonly string[];
  readonly cellBytes: number;
}

function shadeOf(changedBytes: number, cellBytes: number): string {
  if (changedBytes === 0) {
    return SHADES[0];
  }
  if (changedBytes >= cellBytes) {
    return SHADES[4];
  }
  return SHADES[1 + Math.min(Math.floor((changedBytes / cellBytes) * 3), 2)] ?? SHADES[1];
}

/**
 * Draws what changed. Each cell stands for the same number of whole blocks, the last one
 * for what is left.
 *
 * @param columns width of the terminal
 */
export function drawMap(
  { sizeBytes, blockSizeBytes, extents }: DiskChanges,
  columns: number,
): ChangePicture {
  const width = Math.max(columns, 1);
  const blocks = Math.ceil(sizeBytes / blockSizeBytes);
  const blocksPerCell = Math.max(Math.ceil(blocks / (width * MAX_ROWS)), 1);
  const cellBytes = blocksPerCell * blockSizeBytes;
  const cells = new Array<number>(Math.ceil(sizeBytes / cellBytes)).fill(0);
  for (const { offset, length } of extents) {
    const end = offset + length;
    for (let at = offset; at < end; ) {
      const cell = Math.floor(at / cellBytes);
      const next = Math.min((cell + 1) * cellBytes, end);
      cells[cell] = (cells[cell] ?? 0) + next - at;
      at = next;
    }
  }
  const drawn = cells.map((changed, cell) =>
    shadeOf(changed, Math.min(cellBytes, sizeBytes - cell * cellBytes)),
  );
  const rows: string[] = [];
  for (let start = 0; start < drawn.length; start += width) {
    rows.push(drawn.slice(start, start + width).join(''));
  }
  return { rows, cellBytes };
}
