# SPDX-License-Identifier: Apache-2.0
# Shared by the scripts beside it: `. "$(dirname "$0")/common.sh"`. Sets the
# shell's strict mode, $checkout, $cache and $kernels, and the helpers below.
# shellcheck shell=bash
set -euo pipefail
export LC_ALL=C

checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# Everything that is fetched or expensive, shared by all checkouts of a user.
cache=${STILLBLOCK_CACHE:-${XDG_CACHE_HOME:-${HOME:-/root}/.cache}/stillblock}
# The kernels that the module is built for and tested on: stock ones, and one
# with checkers (scripts/debug-kernel.sh).
kernels='5.10 6.1 6.12 7.2 debug'
# shellcheck disable=SC2034  # read by the scripts that source this file
readonly checkout cache kernels

# say TEXT...: one line of progress.
say() { printf '%s\n' "$*" >&2; }

# die TEXT...: one line that says what is missing and how to get it; ends the script.
die() {
    printf 'stillblock: %s\n' "$*" >&2
    exit 1
}

# need_kernel NAME: refuses a kernel that is not one of $kernels.
need_kernel() {
    case " $kernels " in
    *" $1 "*) ;;
    *) die "no such kernel: '$1' (one of: $kernels)" ;;
    esac
}

# lock NAME: one process at a time holds NAME in the cache, until it ends.
# The descriptor stays open in this shell and its children.
lock() {
    mkdir -p "$cache" || die "cannot create the cache folder $cache (set STILLBLOCK_CACHE to a writable one)"
    exec {lock_fd}>"$cache/$1.lock"
    flock -n "$lock_fd" && return
    say "waiting for another run that holds $cache/$1.lock"
    flock "$lock_fd"
}
