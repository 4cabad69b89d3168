#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Builds the module by DKMS for each stock kernel in the Debian release that the
# kernel is of, with that release's dkms and compiler, and checks the result:
#
#   scripts/test-dkms.sh [KERNEL]...      (default: all stock kernels)
#
# The releases are small Debians in the cache; that needs root. The last line
# is `N passed, N failed`.
. "$(dirname "$0")/common.sh"
. "$(dirname "$0")/archive.sh"
. "$(dirname "$0")/toolchain.sh"

# one KERNEL SUITE COMPILER LIBELF: what DKMS makes of module/ for the kernel.
one() {
    local kernel=$1 suite=$2 release tree=$cache/kernels/$1 built version
    "$checkout/scripts/kernels.sh" "$kernel"
    (
        lock "toolchain-dkms-$suite"
        toolchain "dkms-$suite" "$suite" "dkms,make,libc6-dev,$3,$4"
    )
    release=$(cat "$tree/release")
    version=$(sed -n 's/^PACKAGE_VERSION="\(.*\)"/\1/p' "$checkout/module/dkms.conf")
    mkdir -p "$work/$kernel/tree" "$work/$kernel/src"
    cp -r "$checkout/module" "$work/$kernel/src/stillblock-$version"
    # Where dkms looks for the headers by itself: those that it is told of it may "prepare", and spoil.
    mkdir -p "$cache/toolchains/dkms-$suite/lib/modules/$release"
    ln -sfn "$tree/usr/src/linux-headers-$release" "$cache/toolchains/dkms-$suite/lib/modules/$release/build"
    in_toolchain "dkms-$suite" "$cache/kernels:ro" "$work" -- dkms build -m stillblock -v "$version" -k "$release" -a x86_64 \
        --sourcetree "$work/$kernel/src" --dkmstree "$work/$kernel/tree" >"$work/$kernel/log" 2>&1 || {
        cat "$work/$kernel/log" "$work/$kernel"/tree/stillblock/*/build/make.log >&2
        return 1
    }
    built=$(find "$work/$kernel/tree/stillblock/$version/$release" -name 'stillblock.ko*')
    [ "$(modinfo -F vermagic "$built" | cut -d' ' -f1)" = "$release" ] || return 1
    say "$kernel: $(in_toolchain "dkms-$suite" -- dkms --version) of $suite built $(basename "$built") for $release"
}

[ $# -gt 0 ] || set -- 5.10 6.1 6.12 7.2
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
passed=0
failed=0
for kernel; do
    case $kernel in
    5.10) release=(bullseye gcc-10 libelf1) ;;
    6.1 | 6.12) release=(bookworm gcc-12 libelf1) ;;
    7.2) release=(sid gcc libelf1t64) ;;
    *) die "no such stock kernel: '$kernel'" ;;
    esac
    if (one "$kernel" "${release[@]}"); then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        say "failed: DKMS for $kernel"
    fi
done
echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
