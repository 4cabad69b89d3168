#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# The tree of a small Debian 12, in the cache: systemd, udev, initramfs-tools and dracut, but no
# kernel. Tests of what happens around a boot (test/vm/booted.ts) put a kernel, the module and our
# hooks into copies of it, and make a root disk and an initramfs there. The first time it needs
# root and the network.
. "$(dirname "$0")/common.sh"
. "$(dirname "$0")/archive.sh"
. "$(dirname "$0")/toolchain.sh"

# dracut-core is dracut without the packages that take the place of initramfs-tools.
packages=(
    systemd-sysv udev initramfs-tools kmod zstd cpio iproute2 procps util-linux
    e2fsprogs xfsprogs dmsetup python3-minimal dracut-core
)

list=$(
    IFS=,
    echo "${packages[*]}"
)
[ "$(cat "$cache/toolchains/boot-bookworm/complete" 2>/dev/null)" != "$list" ] || exit 0
lock boot-tree
toolchain boot-bookworm bookworm "$list"
