// SPDX-License-Identifier: Apache-2.0

/**
 * mkfs.xfs for less than the 300 MiB that it asks for by itself. An emulated processor reads
 * some 10 MiB of an image a second, so a test's time goes with the size of its disks.
 */
export const smallXfs = 'mkfs.xfs -q --unsupported';
