#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Has DKMS build the module of the package stillblock-dkms for a machine of
# scripts/machine.sh, in the tree of just that machine, with its dkms, compiler and headers,
# as root; its emulated processor would need half an hour:
#
#   scripts/machine-module.sh MACHINE PACKAGE.deb TARBALL
#
# TARBALL is for `dkms ldtarball` in the machine.
. "$(dirname "$0")/common.sh"
. "$(dirname "$0")/toolchain.sh"

[ $# = 3 ] || die "usage: $0 MACHINE PACKAGE.deb TARBALL"
tree=$cache/machines/$1/tree
[ -d "$tree" ] || die "there is no machine $1: run scripts/machine.sh $1"
work=$(mktemp -d)
trap 'rm -rf "$work"; rmdir "$tree$work" || true' EXIT
mkdir "$work/tree"
dpkg-deb -x "$2" "$work"
source=$(echo "$work"/usr/src/stillblock-*)
release=$(echo "$tree"/boot/vmlinuz-*)
release=${release##*/vmlinuz-}
dkms() {
    in_debian_tree "$tree" "$work" -- dkms "$1" -m stillblock -v "${source##*/stillblock-}" -k "$release" -a x86_64 \
        --sourcetree "$work/usr/src" --dkmstree "$work/tree" "${@:2}" >"$work/log" 2>&1 || {
        cat "$work/log" "$work"/tree/stillblock/*/build/make.log >&2 || true
        die "dkms $1 has failed"
    }
}
dkms build
dkms mktarball --binaries-only --archive "$work/tarball.tar.gz"
mv "$work/tarball.tar.gz" "$3"
