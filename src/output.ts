// SPDX-License-Identifier: Apache-2.0
/** What commands print on stdout: tables for people, JSON for programs. */
import { stdout } from 'node:process';
import Table from 'cli-table3';
import type { StillblockError } from './errors.ts';

/** The line on stderr that a failure is. */
export function errorLine({ message, advice }: StillblockError): string {
  return `stillblock: ${message}: ${advice}\n`;
}

/** Prints a line. */
export function printLine(text: string): void {
  stdout.write(`${text}\n`);
}

function toJson(_key: string, value: unknown): unknown {
  // Ids are 64 bits wide; a program that reads JSON would round them.
  return typeof value === 'bigint' ? value.toString() : value;
}

/** Prints a value as JSON on one line. */
export function printJson(value: unknown): void {
  printLine(JSON.stringify(value, toJson));
}

const BARE = {
  top: '',
  'top-mid': '',
  'top-left': '',
  'top-right': '',
  bottom: '',
  'bottom-mid': '',
  'bottom-left': '',
  'bottom-right': '',
  left: '',
  'left-mid': '',
  mid: '',
  'mid-mid': '',
  right: '',
  'right-mid': '',
  middle: '  ',
} as const;

/** Lays rows out in columns under a heading, without frames, as ls and lsblk do. */
export function formatTable(head: readonly string[], rows: readonly (readonly string[])[]): string {
  const table = new Table({
    chars: BARE,
    style: { head: [], border: [], 'padding-left': 0, 'padding-right': 0 },
  });
  table.push([...head], ...rows.map((row) => [...row]));
  return table
    .toString()
    .split('\n')
    .map((line) => line.trimEnd())
    .join('\n');
}

/** Prints a table, or a word where it would be empty. */
export function printTable(
  head: readonly string[],
  rows: readonly (readonly string[])[],
  empty: string,
): void {
  printLine(rows.length === 0 ? empty : formatTable(head, rows));
}
