// SPDX-License-Identifier: Apache-2.0
/** Imported first: has serving.ts serve with the native engine. */
process.env['STILLBLOCK_TEST_ENGINE'] = 'native';
