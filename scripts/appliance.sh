#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# libguestfs's own small machine, in the cache, with the stock kernel 6.1 and only those of
# its drivers that the tests need: this machine may have no kernel of its own, and an
# emulated processor loads all drivers for a minute. LIBGUESTFS_PATH=$cache/appliance has
# guestfish use it.
. "$(dirname "$0")/common.sh"

modules=(virtio_pci virtio_blk virtio_scsi sd_mod virtio_console virtio_rng ext4 xfs vfat nls_ascii nls_cp437 nls_utf8 dm-mod)
release=$(cat "$cache/kernels/6.1/release") || die 'the kernel 6.1 is missing: run scripts/kernels.sh 6.1'
recipe=$(
    sha256sum <"$0" | cut -d' ' -f1
    echo "$release"
    dpkg-query -W libguestfs0 supermin
)
appliance=$cache/appliance
[ "$(cat "$appliance/recipe" 2>/dev/null)" != "$recipe" ] || exit 0
lock appliance
# Supermin asks for it, though it takes the modules from elsewhere.
[ -d /lib/modules ] || {
    root=()
    [ "$(id -u)" = 0 ] || root=(sudo)
    "${root[@]}" mkdir -p /lib/modules || die 'cannot make the folder /lib/modules: run mkdir /lib/modules as root'
}
say 'appliance of libguestfs: making'
work=$(mktemp -d "$cache/.appliance-XXXXXX")
trap 'rm -rf "$work"' EXIT
from=$cache/kernels/6.1/lib/modules/$release
to=$work/root/lib/modules/$release
mkdir -p "$to"
for module in "${modules[@]}"; do
    /sbin/modprobe -d "$cache/kernels/6.1" -S "$release" --show-depends "$module" | sed -n "s#^insmod $from/##p"
done | sort -u | while read -r file; do
    install -D -m 644 "$from/$file" "$to/$file"
done
cp "$from"/modules.{builtin,builtin.modinfo,order} "$to"
/sbin/depmod -b "$work/root" "$release"
SUPERMIN_KERNEL=$cache/kernels/6.1/vmlinuz SUPERMIN_KERNEL_VERSION=$release SUPERMIN_MODULES=$to \
    supermin --build --copy-kernel -f ext2 --host-cpu x86_64 /usr/lib/x86_64-linux-gnu/guestfs/supermin.d \
    -o "$work/appliance" >"$work/log" 2>&1 || die "supermin: $(tail -n1 "$work/log")"
# Without this file libguestfs takes it for none.
: >"$work/appliance/README.fixed"
echo "$recipe" >"$work/appliance/recipe"
rm -rf "$appliance"
mv "$work/appliance" "$appliance"
