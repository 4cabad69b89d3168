# SPDX-License-Identifier: Apache-2.0
# Runs ava and counts, for the scripts that end with `N passed, N failed`:
# `. "$(dirname "$0")/ava.sh"` after common.sh.
# shellcheck shell=bash

# count_ava LOG ARGUMENT...: runs ava, its output also into LOG, and sets
# ava_passed and ava_failed.
count_ava() {
    local log=$1 status=0
    shift
    "$checkout/node_modules/.bin/ava" "$@" 2>&1 | tee "$log" || status=$?
    ava_passed=$(summary "$log" passed)
    # It does not say how many passed when one has failed.
    [ "$ava_passed" -gt 0 ] || ava_passed=$(grep -cE '^ *✔ ' "$log" || true)
    ava_failed=$(summary "$log" failed)
    # A crash, a time-out or a file without tests is not counted there, and must not look good.
    [ "$status" = 0 ] || [ "$ava_failed" -gt 0 ] || ava_failed=1
    [ "$ava_passed" -gt 0 ] || ava_failed=$((ava_failed + 1))
}

# summary LOG WORD: the number in ava's summary, such as `34 tests passed`, or 0.
summary() {
    local number
    number=$(sed -nE "s/^ *([0-9]+) tests? $2\$/\1/p" "$1" | tail -n1)
    echo "${number:-0}"
}

# forget_removed: what was compiled from sources that are gone must not be tested.
forget_removed() {
    local file source
    find dist -path dist/bundle -prune -o -name '*.js' -print 2>/dev/null | while read -r file; do
        source=${file#dist/}
        [ -e "${source%.js}.ts" ] || rm -f "$file" "${file%.js}.d.ts" "$file.map"
    done
}

# only_ava ARGUMENT...: runs ava, for a script that does nothing else; its last line, and whether
# all passed.
only_ava() {
    forget_removed
    results=$(mktemp)
    trap 'rm -f "$results"' EXIT
    count_ava "$results" "$@"
    echo "$ava_passed passed, $ava_failed failed"
    [ "$ava_failed" = 0 ]
}
