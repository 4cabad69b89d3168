#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# The tests of test/kernels, and the scenario, each on the kernels that have
# anything to say of it, after `scripts/setup.sh KERNEL...`; three guests side by
# side, of which one mostly waits.
#
#   scripts/test-kernels.sh [KERNEL]...      (default: all)
#
# STILLBLOCK_TEST_FILES names test files, such as `devices faults`, or `all` of
# them, on each of the kernels; STILLBLOCK_TEST_LANES another number of guests.
# The output of a file that fails is shown, that of others is one line. The last
# line is `N passed, N failed`.
. "$(dirname "$0")/common.sh"
. "$(dirname "$0")/ava.sh"
cd "$checkout"

# one RESULTS KERNEL FILE: runs one file on one kernel and adds `PASSED FAILED`
# to RESULTS. It is this script again, since xargs starts it.
one() {
    local results=$1 kernel=$2 file=$3 log started=$SECONDS
    log=$(mktemp "$results-XXXXXX")
    export STILLBLOCK_TEST_KERNEL=$kernel
    local TIMEFORMAT='%U %S'
    { time count_ava "$log" --config ava.kernels.config.mjs "$file" >/dev/null; } 2>"$log.time"
    {
        [ "$ava_failed" = 0 ] || cat "$log"
        echo "$kernel: $(basename "$file" .test.js): $ava_passed passed, $ava_failed failed in $((SECONDS - started)) s, $(awk '{ print int($1 + $2 + 0.5) }' <(tail -n1 "$log.time")) s of a processor"
    } >"$log.told"
    # In one write, so that two of them do not mix.
    cat "$log.told"
    echo "$ava_passed $ava_failed" >>"$results"
}

if [ "${1:-}" = --one ]; then
    shift
    one "$@"
    exit
fi
# shellcheck disable=SC2086  # a list
[ $# -gt 0 ] || set -- $kernels
for kernel; do need_kernel "$kernel"; done

forget_removed

# chosen KERNEL: the names of the files that run on it when none are named.
chosen() {
    # What the module meets in a kernel, and what it does when that fails.
    local common='devices faults owner stores stress'
    case $1 in
    # Histories are handed to another kernel, and come back; the oldest is the one that has
    # least of what they need.
    5.10) echo "scenario $common uses module reboot" ;;
    # `npm test` has the scenario and reboots on it.
    6.1) echo "$common uses module" ;;
    6.12) echo "scenario $common uses module" ;;
    # What is done to files is the same on all kernels; the file systems are the newest here.
    7.2) echo "scenario $common uses module filesystems" ;;
    # The product around the module would take ten minutes there.
    debug) echo "memory $common filesystems" ;;
    esac
}

# runs: for each run its kernel and file. The slowest kernel first, so that all lanes end together.
runs() {
    local kernel name file
    for kernel in $(printf '%s\n' "$@" | sort -r); do
        for file in dist/test/vm/scenario.test.js dist/test/kernels/*.test.js; do
            name=$(basename "$file" .test.js)
            # Allocations can be made to fail on that one alone.
            [[ $kernel = debug || $name != memory ]] || continue
            case " ${STILLBLOCK_TEST_FILES:-$(chosen "$kernel")} " in
            *" $name "* | ' all ') printf '%s %s %s\n' "$results" "$kernel" "$file" ;;
            esac
        done
    done
}

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
results=$folder/results
: >"$results"
runs "$@" >"$folder/runs"
[ -s "$folder/runs" ] || die "no such test: ${STILLBLOCK_TEST_FILES:-}"
xargs -a "$folder/runs" -P"${STILLBLOCK_TEST_LANES:-3}" -L1 "$checkout/scripts/test-kernels.sh" --one || say 'a test run ended without a result'

passed=0
failed=0
while read -r p f; do
    passed=$((passed + p))
    failed=$((failed + f))
done <"$results"
# What ended without a result has failed.
failed=$((failed + $(wc -l <"$folder/runs") - $(wc -l <"$results")))
echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
