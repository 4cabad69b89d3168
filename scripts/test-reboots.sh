#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# All that histories have to stand over reboots, with real boots by our hooks, after
# `scripts/setup.sh 6.1 6.12`:
#
#   scripts/test-reboots.sh [KERNEL]...      (default: 6.1 6.12)
#
# STILLBLOCK_TEST_SEED is the first of the twenty seeds of the power cuts (default: 1). The last
# line is `N passed, N failed`.
. "$(dirname "$0")/common.sh"
. "$(dirname "$0")/ava.sh"
cd "$checkout"

[ $# -gt 0 ] || set -- 6.1 6.12
for kernel; do need_kernel "$kernel"; done
forget_removed
results=$(mktemp)
trap 'rm -f "$results"' EXIT
passed=0
failed=0
for kernel; do
    say "kernel $kernel"
    STILLBLOCK_TEST_KERNEL=$kernel count_ava "$results" --config ava.reboots.config.mjs
    passed=$((passed + ava_passed))
    failed=$((failed + ava_failed))
done
echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
