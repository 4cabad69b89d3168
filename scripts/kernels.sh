#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Fetches Debian's stock kernels with their headers into the cache, unpacked
# and never installed: $cache/kernels/NAME holds boot/, lib/ and usr/ of the
# packages and `release`, the kernel's release string.
#
#   scripts/kernels.sh [5.10|6.1|6.12|7.2|debug]...      (default: all)
#
# `debug` is built rather than fetched: see scripts/debug-kernel.sh.
#
# A kernel that is there already needs no network. One that this machine's
# compiler cannot build modules for brings a toolchain with it, a small Debian
# of its release in $cache/toolchains; that needs root.
. "$(dirname "$0")/common.sh"
. "$(dirname "$0")/archive.sh"
. "$(dirname "$0")/toolchain.sh"

# depends_on PACKAGE PATTERN: the dependency of PACKAGE's candidate that matches.
depends_on() {
    private_apt apt-cache show --no-all-versions "$1" 2>/dev/null |
        sed -n 's/^Depends: //p' | tr ',' '\n' | sed 's/^ *//; s/ .*//' | grep -Ex "$2" | head -n1
}

# fetch NAME SUITE...: downloads the kernel NAME and its headers from the
# first of the alternatives (each 'SUITE:LIKE ...') that has them.
fetch() {
    local name=$1 alternative image headers common kbuild part package packages
    shift
    for alternative in "$@"; do
        # shellcheck disable=SC2086  # a list
        open_apt "$work/apt" $alternative >"$work/log" 2>&1 || continue
        image=$(depends_on linux-image-amd64 "linux-image-${name//./\\.}\.[^ ]*-amd64") || continue
        headers=${image/image/headers}
        common=$(depends_on "$headers" 'linux-headers-[^ ]*-common') || continue
        kbuild=$(depends_on "$headers" 'linux-kbuild-[^ ]*') || continue
        packages=("$image" "$headers" "$common" "$kbuild")
        # Newer kernels come in several packages.
        for part in binary modules base; do
            package=$(depends_on "$image" "linux-$part-[^ ]*") && [ -n "$package" ] && packages+=("$package")
        done
        (cd "$work" && private_apt apt-get download "${packages[@]}") >"$work/log" 2>&1 || continue
        release=${image#linux-image-}
        return 0
    done
    return 1
}

# unpack DESTINATION: the downloaded packages as one tree, usable where it will
# lie: no path in it points at /usr/src or /lib of this machine.
unpack() {
    local tree=$1 deb headers file
    mkdir -p "$tree"
    for deb in "$work"/*.deb; do
        dpkg-deb -x "$deb" "$tree" || die "cannot unpack $(basename "$deb"): is the disk full? ($cache)"
    done
    # Where /lib is /usr/lib, packages say so.
    [ -e "$tree/lib" ] || ln -s usr/lib "$tree/lib"
    headers=$tree/usr/src/linux-headers-$release
    for file in $(grep -rlIE '/usr/(src/linux-headers|lib/linux-kbuild)' "$tree"/usr/src/*/Makefile "$headers/.kernelvariables" 2>/dev/null); do
        sed -i -E "s#(^|[[:space:]=:])/usr/(src/linux-headers|lib/linux-kbuild)#\1$final/usr/\2#g" "$file"
    done
    ln -sfn "$final/usr/src/linux-headers-$release" "$tree/lib/modules/$release/build"
    ln -sfn "$final/usr/src/$(basename "$tree"/usr/src/*-common)" "$tree/lib/modules/$release/source"
    depmod -b "$tree" "$release" || die "depmod failed: apt-get install kmod"
    cp "$tree/boot/vmlinuz-$release" "$tree/vmlinuz" 2>/dev/null ||
        cp "$tree/lib/modules/$release/vmlinuz" "$tree/vmlinuz" || die "kernel $release: its packages hold no image"
    printf '%s\n' "$release" >"$tree/release"
    printf '%s\n' "$final" >"$tree/location"
}

# one NAME: makes $cache/kernels/NAME exist.
one() {
    local name=$1 release='' codename
    final=$cache/kernels/$name
    case $name in 7.2) toolchain sid sid gcc,make,libc6-dev,libelf1t64,binutils,bc,sparse ;; esac
    # Headers name their own place: a cache that was moved is unpacked anew.
    [ "$(cat "$final/location" 2>/dev/null)" != "$final" ] || return 0
    # shellcheck source=/dev/null
    codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
    say "kernel $name: fetching from Debian"
    work=$(mktemp -d "$cache/kernels/.fetch-XXXXXX")
    # shellcheck disable=SC2064  # this run's folder, even after `work` changes
    trap "rm -rf '$work'" EXIT
    case $name in
    5.10) fetch "$name" "bullseye:$codename bullseye-security:$codename-security" ;;
    6.1) fetch "$name" "bookworm:$codename bookworm-security:$codename-security" ;;
    6.12) fetch "$name" "bookworm-backports:$codename" "trixie:$codename trixie-security:$codename-security" ;;
    7.2) fetch "$name" "sid:$codename" ;;
    esac || die "cannot get Debian's kernel $name: $(tail -n1 "$work/log" 2>/dev/null || true) (needs a Debian archive in /etc/apt/sources.list* and the network; see scripts/kernels.sh)"
    unpack "$work/tree"
    rm -rf "$final"
    mv "$work/tree" "$final"
    rm -rf "$work"
    say "kernel $name: $release"
}

mkdir -p "$cache/kernels" || die "cannot create $cache (set STILLBLOCK_CACHE to a writable folder)"
command -v depmod >/dev/null || die 'depmod is missing: apt-get install kmod'
# shellcheck disable=SC2086  # a list
[ $# -gt 0 ] || set -- $kernels
for kernel; do need_kernel "$kernel"; done
# Nobody waits for a kernel that another run is fetching or building, but for the same one.
for kernel; do
    case $kernel in
    debug) "$checkout/scripts/debug-kernel.sh" ;;
    *) (
        lock "kernel-$kernel"
        one "$kernel"
    ) ;;
    esac
done
