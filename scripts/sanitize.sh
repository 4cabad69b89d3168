#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# The native engine's core in plain programs under clang's sanitizers and libFuzzer, and the addon
# under AddressSanitizer inside Node. Everything is built into build/sanitize.
#
#   scripts/sanitize.sh build [asan|tsan|fuzzer]...
#   scripts/sanitize.sh stress asan|tsan [MESSAGES [SEED]]
#   scripts/sanitize.sh fuzzer [SECONDS]
#   scripts/sanitize.sh node [AVA-ARGUMENT]...     (default: the engine's tests)
. "$(dirname "$0")/common.sh"
cd "$checkout"

output=build/sanitize
flags=(-std=c++20 -O1 -g -fno-omit-frame-pointer -fno-exceptions -fno-rtti -Wall -Wextra -Werror
    -D_FILE_OFFSET_BITS=64 -pthread)
address=(-fsanitize=address,undefined -fno-sanitize-recover=all)
export ASAN_OPTIONS=detect_stack_use_after_return=1:abort_on_error=1
export UBSAN_OPTIONS=print_stacktrace=1
export TSAN_OPTIONS=halt_on_error=1:second_deadlock_stack=1

command -v clang++ >/dev/null || die 'clang++ is missing: scripts/setup.sh installs it'

# newer FILE: whether a program is there and newer than all that it is made of.
newer() {
    [ -e "$1" ] && [ -z "$(find src/native/engine src/native/unique_fd.h test/native -newer "$1")" ]
}

# build_one NAME SOURCE FLAG...
build_one() {
    local name=$1 source=$2
    shift 2
    newer "$output/$name" && return
    mkdir -p "$output"
    clang++ "${flags[@]}" "$@" "$source" src/native/engine/*.cc -lssl -lcrypto -o "$output/$name.new" ||
        die "$name does not build"
    mv "$output/$name.new" "$output/$name"
}

build() {
    local what
    for what; do
        case $what in
        asan) build_one stress-asan test/native/stress.cc "${address[@]}" ;;
        tsan) build_one stress-tsan test/native/stress.cc -fsanitize=thread ;;
        fuzzer) build_one fuzz test/native/fuzz_target.cc "${address[@]}" -fsanitize=fuzzer ;;
        *) die "no such program: $what" ;;
        esac
    done
}

case ${1-} in
build)
    shift
    [ $# -gt 0 ] || set -- asan tsan fuzzer
    build "$@"
    ;;
stress)
    build "$2"
    exec "$output/stress-$2" "${@:3}"
    ;;
fuzzer)
    build fuzzer
    mkdir -p "$output/corpus"
    LSAN_OPTIONS=suppressions=$checkout/test/native/fuzzer.lsan:print_suppressions=0 \
        exec "$output/fuzz" "-max_total_time=${2:-60}" -max_len=4096 -timeout=30 -rss_limit_mb=2048 \
        -artifact_prefix="$output/" -print_final_stats=1 "$output/corpus"
    ;;
node)
    shift
    # Node itself is no instrumented program: its runtime must be there first.
    STILLBLOCK_SANITIZE=1 node_modules/.bin/cmake-js build --out build/native-asan >/dev/null ||
        die 'the addon does not build'
    [ $# -gt 0 ] || set -- dist/test/src/engine.test.js
    STILLBLOCK_ADDON=$checkout/build/native-asan/stillblock.node \
        LD_PRELOAD=$(gcc -print-file-name=libasan.so) ASAN_OPTIONS=detect_leaks=0 \
        exec node_modules/.bin/ava "$@"
    ;;
*)
    die 'usage: scripts/sanitize.sh build|stress|fuzzer|node [ARGUMENT]...'
    ;;
esac
