// SPDX-License-Identifier: Apache-2.0
// The numbered records of appender.ts and what an image may hold of them.

const digits = 12;

/** @returns the record's line. */
export const formatRecord = (number: number): string =>
  `record ${String(number).padStart(digits, '0')}\n`;

/**
 * @param text a file of records.
 * @returns the last record's number; 0 for an empty file.
 * @throws Error that names the first line which is not the record expected there.
 */
export function lastRecord(text: string): number {
  const lines = text.split('\n');
  if (lines.pop() !== '') throw new Error('the last record is cut off');
  lines.forEach((line, index) => {
    if (`${line}\n` !== formatRecord(index + 1)) {
      throw new Error(`record ${index + 1} is ${JSON.stringify(line.slice(0, 80))}`);
    }
  });
  return lines.length;
}
