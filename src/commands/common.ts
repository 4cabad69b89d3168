// SPDX-License-Identifier: Apache-2.0
/** What the commands' definitions share. */
import { resolve } from 'node:path';
import { Command, InvalidArgumentError, Option } from 'commander';
import { parseSize } from '../sizes.ts';

/** Options that every command has. */
export interface CommonOptions {
  readonly json?: boolean;
  readonly verbose?: number;
}

/** A command with the options that all have. */
export function newCommand(name: string, summary: string): Command {
  return new Command(name)
    .summary(summary)
    .description(`${summary.charAt(0).toUpperCase()}${summary.slice(1)}.`)
    .option('--json', 'print JSON for programs')
    .addOption(
      new Option('-v, --verbose', 'log what happens to stderr; twice: every request').argParser(
        (_value: string, before: number | undefined) => (before ?? 0) + 1,
      ),
    );
}

/** The end of a help text that is an example alone. */
export function example(line: string): string {
  return `\nExample:\n  ${line}`;
}

/** Collects an option that may be given several times. */
export function collect(value: string, before: readonly string[] | undefined): readonly string[] {
  return [...(before ?? []), value];
}

/** Reads the value of an option that is a size. */
export function sizeOption(text: string): number {
  const bytes = parseSize(text);
  if (bytes === undefined || bytes === 0) {
    throw new InvalidArgumentError('a size is a number and K, M, G or T, such as 512M.');
  }
  return bytes;
}

/** Reads the value of an option that is a whole number within bounds. */
export function countOption(least: number, most: number): (text: string) => number {
  return (text) => {
    const value = Number(text);
    if (!/^\d+$/.test(text) || value < least || value > most) {
      throw new InvalidArgumentError(`it is a number from ${least} to ${most}.`);
    }
    return value;
  };
}

/** A path for a daemon that works in another folder. */
export function absolutePath(path: string): string {
  return path === '' ? path : resolve(path);
}

/** A path made absolute, or a name as it is. */
export function pathOrName(text: string): string {
  return text.includes('/') ? absolutePath(text) : text;
}
