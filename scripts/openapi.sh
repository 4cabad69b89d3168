#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Writes docs/openapi.json anew, the control API's description, from
# src/operations.ts; a test compares them.
. "$(dirname "$0")/common.sh"
cd "$checkout"
npm run --silent build
node --input-type=module -e "
import { openApiDocument } from './dist/src/openapi.js';
process.stdout.write(JSON.stringify(openApiDocument(), null, 2) + '\n');" >docs/openapi.json
node_modules/.bin/biome check --write docs/openapi.json >/dev/null
