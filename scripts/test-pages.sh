#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# The tests of test/long, after `scripts/setup.sh 5.10 6.1 6.12 7.2`: commands of the pages that
# measure, or boot guests for minutes; root alone can measure block devices. The last line is
# `N passed, N failed`. Arguments go to ava.
. "$(dirname "$0")/common.sh"
. "$(dirname "$0")/ava.sh"
cd "$checkout"

only_ava --config ava.pages.config.mjs "$@"
