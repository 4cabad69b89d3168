// SPDX-License-Identifier: Apache-2.0
/** Where the files are that come with the program. */
import { fileURLToPath } from 'node:url';

/**
 * @param path as in the checkout, which a package keeps
 * @returns its place; the bundle lies as deep below the root as a compiled module does
 */
export function installed(path: string): string {
  return fileURLToPath(new URL(`../../${path}`, import.meta.url));
}
