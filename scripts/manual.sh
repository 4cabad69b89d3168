#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Makes docs/man/stillblock.8 anew from the commands' help, after npm run build.
. "$(dirname "$0")/common.sh"
cd "$checkout"
node --input-type=module -e "
import { manual } from './dist/src/manual.js';
import { makeProgram } from './dist/src/program.js';
process.stdout.write(manual(await makeProgram()));" >docs/man/stillblock.8.new
mv docs/man/stillblock.8.new docs/man/stillblock.8
