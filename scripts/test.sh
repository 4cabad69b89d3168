#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Linter, compiler and all tests but those of every kernel (test-kernels.sh),
# after scripts/setup.sh. The last line is `N passed, N failed`; the exit code
# is 0 only if nothing failed and something passed. Arguments go to ava.
. "$(dirname "$0")/common.sh"
. "$(dirname "$0")/ava.sh"
cd "$checkout"

passed=0
failed=0
check() {
    local name=$1
    shift
    if "$@"; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        say "failed: $name"
    fi
}

forget_removed
check lint npm run --silent lint
check build npm run --silent build

results=$(mktemp)
trap 'rm -f "$results"' EXIT
count_ava "$results" "$@"
passed=$((passed + ava_passed))
failed=$((failed + ava_failed))
echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
