#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Has DKMS build the module of the package stillblock-dkms for a machine of
# scripts/machine.sh outside of it, as root; its emulated processor would need many minutes:
#
#   scripts/machine-module.sh MACHINE PACKAGE.deb COMMANDS TARBALL
#
# COMMANDS are those of docs/module.md that make the file for `dkms ldtarball`, in /tmp and of
# TARBALL's name; KERNEL in them is the machine's. They run in what is for them a machine with
# that Debian, its headers, and the package's files: a layer above the machine's tree, which
# ends with them.
. "$(dirname "$0")/common.sh"

[ $# = 4 ] || die "usage: $0 MACHINE PACKAGE.deb COMMANDS TARBALL"
tree=$cache/machines/$1/tree
[ -d "$tree" ] || die "there is no machine $1: run scripts/machine.sh $1"
release=$(echo "$tree"/boot/vmlinuz-*)
release=${release##*/vmlinuz-}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
: >"$work/log"
# shellcheck disable=SC2016  # for the inner shell
unshare --mount --propagation private bash -c '
    set -e
    layer=$1/layer
    mkdir "$layer"
    mount -t tmpfs tmpfs "$layer"
    mkdir "$layer/upper" "$layer/work" "$layer/root"
    mount -t overlay -o "lowerdir=$2,upperdir=$layer/upper,workdir=$layer/work" overlay "$layer/root"
    mount -t proc proc "$layer/root/proc"
    dpkg-deb -x "$3" "$layer/root"
    chroot "$layer/root" bash -ec "$4" >"$1/log" 2>&1 || {
        cat "$layer"/root/var/lib/dkms/stillblock/*/build/make.log >>"$1/log" || true
        exit 1
    }
    cp "$layer/root/tmp/${5##*/}" "$5"' - "$work" "$tree" "$2" "${3//KERNEL/$release}" "$4" || {
    cat "$work/log" >&2
    die "DKMS has not built the module for the machine $1"
}
