// SPDX-License-Identifier: Apache-2.0
/** Which error number a client gets for which failure (section "Error values"). */

export const NBD_EPERM = 1;
export const NBD_EIO = 5;
export const NBD_ENOMEM = 12;
export const NBD_EINVAL = 22;
export const NBD_EOVERFLOW = 75;

/** An error number that the specification defines and this server sends. */
export type NbdError =
  | typeof NBD_EPERM
  | typeof NBD_EIO
  | typeof NBD_ENOMEM
  | typeof NBD_EINVAL
  | typeof NBD_EOVERFLOW;

/** The errno name of an error, such as `EIO`, if it carries one. */
export function errorCode(error: unknown): string | undefined {
  if (typeof error === 'object' && error !== null && 'code' in error) {
    return typeof error.code === 'string' ? error.code : undefined;
  }
  return undefined;
}

/**
 * Maps a failed read to what the client is told. Only a lack of memory may pass
 * by itself; anything else means that the data cannot be had.
 */
export function readErrorFor(error: unknown): NbdError {
  return errorCode(error) === 'ENOMEM' ? NBD_ENOMEM : NBD_EIO;
}
