#!/usr/bin/env node
// SPDX-License-Identifier: Apache-2.0
/** The command `stillblock`. */
import { run } from './main.ts';

run();
