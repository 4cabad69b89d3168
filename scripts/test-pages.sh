#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# The tests of test/long, after `scripts/setup.sh 5.10 6.1 6.12 7.2`: commands of the pages that
# measure, or boot guests for minutes; root alone can measure block devices. The last line is
# `N passed, N failed`. Arguments go to ava.
. "$(dirname "$0")/common.sh"
. "$(dirname "$0")/ava.sh"
cd "$checkout"

forget_removed
results=$(mktemp)
trap 'rm -f "$results"' EXIT
count_ava "$results" --config ava.pages.config.mjs "$@"
echo "$ava_passed passed, $ava_failed failed"
[ "$ava_failed" = 0 ]
