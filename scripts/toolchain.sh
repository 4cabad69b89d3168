# SPDX-License-Identifier: Apache-2.0
# Small Debians of other releases, for compilers that this machine's release
# does not have: `. "$(dirname "$0")/toolchain.sh"` after common.sh and
# archive.sh. They are made by debootstrap, and used by chroot, as root.
# shellcheck shell=bash

# debian_tree WHAT SUITE PACKAGES ROOT: a Debian of a suite with the packages (a list with
# commas) in the empty folder ROOT. What debootstrap says is in ROOT.log if it fails.
debian_tree() {
    local what=$1 suite=$2 included=$3 root=$4 line uri keyring codename
    command -v debootstrap >/dev/null || die 'debootstrap is missing: apt-get install debootstrap'
    # shellcheck source=/dev/null
    codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
    line=$(source_for "$suite" "$codename") || die "no Debian archive in /etc/apt/sources.list* to take $suite from"
    keyring=$(sed -n 's/.*signed-by=\([^] ]*\).*/\1/p' <<<"$line")
    uri=$(sed 's/^deb \[[^]]*\] \([^ ]*\) .*/\1/' <<<"$line")
    debootstrap --variant=minbase --keyring="$keyring" --include="$included" "$suite" "$root" "$uri" >"$root.log" 2>&1 ||
        die "cannot get $what: $(tail -n1 "$root.log")"
    rm -rf "$root"/var/cache/apt/archives/*.deb "$root.log"
}

# toolchain NAME SUITE PACKAGES: makes $cache/toolchains/NAME exist, with the
# packages (a list with commas) of the suite.
toolchain() {
    local root=$cache/toolchains/$1 suite=$2 included=$3
    [ "$(cat "$root/complete" 2>/dev/null)" != "$included" ] || return 0
    [ "$(id -u)" = 0 ] || die "the toolchain of $suite needs root: run $0 with sudo and the same STILLBLOCK_CACHE"
    say "toolchain of $suite: fetching from Debian"
    rm -rf "$root"
    mkdir -p "$root"
    debian_tree "the toolchain of $suite" "$suite" "$included" "$root"
    echo "$included" >"$root/complete"
}

# in_toolchain NAME FOLDER[:ro]... -- COMMAND...: runs the command in a
# toolchain, with these folders at their own places. The mounts end with it.
in_toolchain() {
    local name=$1
    shift
    in_debian_tree "$cache/toolchains/$name" "$@"
}

# in_debian_tree ROOT FOLDER[:ro]... -- COMMAND...: the same in the Debian in ROOT.
in_debian_tree() {
    local root=$1
    shift
    # shellcheck disable=SC2016  # for the inner shell
    unshare --mount --propagation private bash -c '
        set -e
        root=$1
        shift
        while [ "$1" != -- ]; do
            folder=${1%:ro}
            mkdir -p "$root$folder"
            mount --bind "$folder" "$root$folder"
            [ "$folder" = "$1" ] || mount -o remount,bind,ro "$root$folder"
            shift
        done
        shift
        mount -t proc proc "$root/proc"
        exec chroot "$root" "$@"' - "$root" "$@"
}
