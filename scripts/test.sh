#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Linter, compiler and all tests, after scripts/setup.sh. The last line is
# `N passed, N failed`; the exit code is 0 only if nothing failed and something
# passed. Arguments go to ava.
. "$(dirname "$0")/common.sh"
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

# Files that are gone from the sources must not be tested from an old build.
find dist -name '*.js' 2>/dev/null | while read -r file; do
    source=${file#dist/}
    [ -e "${source%.js}.ts" ] || rm -f "$file" "${file%.js}.d.ts" "$file.map"
done
check lint npm run --silent lint
check build npm run --silent build

results=$(mktemp)
trap 'rm -f "$results"' EXIT
status=0
node_modules/.bin/ava "$@" 2>&1 | tee "$results" || status=$?
# count WHAT: the number in ava's summary, such as `34 tests passed`.
count() { sed -nE "s/^ *([0-9]+) tests? $1\$/\1/p" "$results" | tail -n1; }
ava_passed=$(count passed)
ava_failed=$(count failed)
passed=$((passed + ${ava_passed:-0}))
failed=$((failed + ${ava_failed:-0}))
# A crash, a time-out or a file without tests is not counted there, and must not look good.
[ "$status" = 0 ] || [ "${ava_failed:-0}" -gt 0 ] || failed=$((failed + 1))
[ "${ava_passed:-0}" -gt 0 ] || failed=$((failed + 1))
echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
