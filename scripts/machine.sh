#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Makes whole Debian machines for tests, from Debian's packages alone:
#
#   scripts/machine.sh [bookworm|trixie]...      (default: bookworm)
#
# $cache/machines/NAME/disk.qcow2 is a disk of 2 GiB, GPT, that boots by itself with BIOS
# (grub-pc in a partition of its own) and UEFI (its removable path): Debian's kernel with
# an initrd of initramfs-tools, systemd, ext4, a login as root without a password on the
# serial line, and the tests' agent (test/vm/agent.py) as a service. test/vm/machine.ts
# boots copies of it. tree/ beside it is its root as it was before its first boot, for what
# an emulated processor is too slow for. A machine that is there already needs no network;
# one that is made needs root and some minutes, one of them for a boot under QEMU.
. "$(dirname "$0")/common.sh"
. "$(dirname "$0")/archive.sh"
. "$(dirname "$0")/toolchain.sh"

packages=(
    # what a small server has
    systemd-sysv udev initramfs-tools zstd linux-image-amd64 kmod iproute2 procps login
    e2fsprogs xfsprogs fdisk lvm2 dosfstools
    # its boot loaders
    grub-pc-bin grub-efi-amd64-bin grub2-common
    # what DKMS builds modules with, and what signs them
    dkms linux-headers-amd64 openssl mokutil
    # what the agent runs in
    python3-minimal
)
disk_mib=2048
# Partitions, in MiB: GRUB's own, the EFI system partition, the root.
efi_start_mib=2
efi_mib=48
root_start_mib=50
boot_limit_s=600
# What is dear or slow for an emulated processor is off: see test/vm/guest.ts.
cmdline='console=ttyS0 loglevel=5 quiet net.ifnames=0 panic=-1 oops=panic nokaslr mitigations=off no5lvl clearcpuid=112,297'

# recipe NAME: what a machine is made of; another recipe makes another machine.
recipe() {
    cat "$checkout/scripts/machine.sh" "$checkout/test/vm/agent.py" | sha256sum | cut -d' ' -f1
    echo "$1"
}

# in_tree COMMAND...: in the tree of the new machine.
in_tree() { chroot "$tree" env DEBIAN_FRONTEND=noninteractive "$@"; }

bootstrap() {
    local suite=$1 list
    # Debian 13 has a Node that is new enough; and boots by a signed boot loader, for Secure Boot.
    [ "$suite" = bookworm ] || packages+=(nodejs shim-signed grub-efi-amd64-signed)
    list=$(IFS=,; echo "${packages[*]}")
    debian_tree "a Debian $suite" "$suite" "$list" "$tree"
    # What gets old, and what nobody reads there.
    rm -rf "$tree"/var/lib/apt/lists/* "$tree"/usr/share/{doc,info,locale,man}/* "$tree/etc/machine-id"
    # Filled at the first boot.
    : >"$tree/etc/machine-id"
}

configure() {
    echo machine >"$tree/etc/hostname"
    printf '127.0.0.1 localhost machine\n' >"$tree/etc/hosts"
    printf 'LABEL=root / ext4 errors=remount-ro,x-systemd.device-timeout=15min 0 1\nLABEL=EFI /boot/efi vfat umask=0077,x-systemd.device-timeout=15min 0 2\n' >"$tree/etc/fstab"
    mkdir -p "$tree/boot/efi"
    in_tree passwd -q -d root
    cat >>"$tree/etc/default/grub" <<GRUB
GRUB_TIMEOUT=0
GRUB_TERMINAL="serial console"
GRUB_DISABLE_OS_PROBER=true
GRUB_CMDLINE_LINUX="$cmdline \\\$more"
GRUB
    # What QEMU is told by -smbios type=1,family=... is added to the command line.
    cat >"$tree/etc/grub.d/01_more" <<'GRUB'
#!/bin/sh
echo 'insmod smbios; smbios --type 1 --get-string 26 --set more; export more'
GRUB
    chmod +x "$tree/etc/grub.d/01_more"
    sed -i 's/^GRUB_CMDLINE_LINUX_DEFAULT=.*/GRUB_CMDLINE_LINUX_DEFAULT=""/' "$tree/etc/default/grub"
    cp "$checkout/test/vm/agent.py" "$tree/usr/local/lib/agent.py"
    cat >"$tree/usr/local/lib/agent.sh" <<'AGENT'
# Waits for the network card, whatever it is called, and becomes the agent.
until set -- /sys/class/net/e* && [ -e "$1" ]; do sleep 0.1; done
ip link set lo up
ip address replace 10.0.2.15/24 dev "${1##*/}"
ip link set "${1##*/}" up
# Unlike the line itself, the console is not hung up when a login begins on it.
exec python3 -ISu /usr/local/lib/agent.py 1009 >/dev/console
AGENT
    in_tree python3 -IS -c 'import os, select, signal, socket, struct'
    # An emulated processor unpacks all of Debian's drivers for half a minute.
    printf 'MODULES=list\n' >"$tree/etc/initramfs-tools/conf.d/machine"
    printf '%s\n' virtio_pci virtio_blk virtio_scsi sd_mod ext4 >>"$tree/etc/initramfs-tools/modules"
    in_tree update-initramfs -u >"$work/log" 2>&1 || die "update-initramfs: $(tail -n1 "$work/log")"
    printf 'blacklist %s\n' kvm kvm_amd kvm_intel powernow_k8 floppy parport_pc psmouse pcspkr i2c_piix4 \
        >"$tree/etc/modprobe.d/machine.conf"
    cat >"$tree/etc/systemd/system/agent.service" <<'UNIT'
[Unit]
Description=Agent of the tests
[Service]
ExecStart=/bin/sh /usr/local/lib/agent.sh
Environment=HOME=/root LC_ALL=C.UTF-8
TasksMax=infinity
[Install]
WantedBy=multi-user.target
UNIT
    cat >"$tree/etc/systemd/system/finish.service" <<'UNIT'
[Unit]
Description=Makes the machine bootable, once
ConditionPathExists=/etc/unfinished
RequiresMountsFor=/boot/efi
[Service]
Type=oneshot
StandardOutput=tty
StandardError=inherit
TTYPath=/dev/console
ExecStart=grub-install --target=i386-pc /dev/vda
ExecStart=grub-install --target=x86_64-efi --efi-directory=/boot/efi --removable --no-nvram
ExecStart=update-grub
ExecStart=rm /etc/unfinished
ExecStart=echo machine: finished
ExecStopPost=systemctl --no-block poweroff
[Install]
WantedBy=multi-user.target
UNIT
    : >"$tree/etc/unfinished"
    in_tree systemctl -q enable agent.service finish.service
    # Nothing that begins by itself at some time of the day.
    in_tree systemctl -q mask apt-daily.timer apt-daily-upgrade.timer \
        e2scrub_all.timer e2scrub_reap.service fstrim.timer dpkg-db-backup.timer systemd-tmpfiles-clean.timer \
        getty@.service getty-static.service systemd-binfmt.service proc-sys-fs-binfmt_misc.automount
}

# disk: the tree as a disk.
disk() {
    local raw=$work/disk.raw
    truncate -s "${disk_mib}M" "$raw"
    sfdisk -q "$raw" <<TABLE
label: gpt
start=1MiB, size=1MiB, type=21686148-6449-6E6F-744E-656564454649
start=${efi_start_mib}MiB, size=${efi_mib}MiB, type=uefi
start=${root_start_mib}MiB, size=$((disk_mib - root_start_mib - 1))MiB, type=linux
TABLE
    mke2fs -q -t ext4 -L root -d "$tree" -E "offset=$((root_start_mib << 20))" "$raw" \
        "$((disk_mib - root_start_mib - 1))M" 2>"$work/log" || die "mke2fs: $(tail -n1 "$work/log")"
    mkfs.vfat -F 16 -n EFI --offset "$((efi_start_mib << 11))" "$raw" "$((efi_mib << 10))" >"$work/log" 2>&1 ||
        die "mkfs.vfat: $(tail -n1 "$work/log")"
}

# finish: a first boot, which installs the boot loaders and powers off.
finish() {
    local kernel
    kernel=$(echo "$tree"/boot/vmlinuz-*)
    timeout "$boot_limit_s" qemu-system-x86_64 -accel tcg,thread=single -machine pc -cpu max -smp 1 -m 1024 -nodefaults -no-user-config \
        -display none -no-reboot -serial "file:$work/console" -netdev user,id=net,restrict=on \
        -device virtio-net-pci,netdev=net,romfile= -device virtio-rng-pci \
        -drive "file=$work/disk.raw,format=raw,if=virtio,cache=unsafe,discard=unmap" \
        -kernel "$kernel" -initrd "${kernel/vmlinuz/initrd.img}" \
        -append "root=LABEL=root $cmdline" >"$work/log" 2>&1 || true
    grep -q '^machine: finished' "$work/console" || {
        tail -n 40 "$work/console" "$work/log" >&2
        die 'the new machine did not finish its first boot'
    }
    qemu-img convert -O qcow2 "$work/disk.raw" "$work/disk.qcow2"
}

# one NAME: makes $cache/machines/NAME exist.
one() {
    local name=$1 machine=$cache/machines/$1
    [ "$(cat "$machine/recipe" 2>/dev/null)" != "$(recipe "$name")" ] || return 0
    [ "$(id -u)" = 0 ] || die "a machine is made by root: run $0 with sudo and the same STILLBLOCK_CACHE"
    for tool in debootstrap qemu-system-x86_64 qemu-img mkfs.vfat sfdisk mke2fs; do
        PATH=$PATH:/sbin:/usr/sbin command -v "$tool" >/dev/null || die "$tool is missing: run scripts/setup.sh"
    done
    say "machine $name: making a Debian"
    work=$(mktemp -d "$cache/machines/.new-XXXXXX")
    # shellcheck disable=SC2064  # this run's folder
    trap "rm -rf '$work'" EXIT
    tree=$work/tree
    bootstrap "$name"
    configure
    disk
    finish
    recipe "$name" >"$work/recipe"
    rm -rf "$machine"
    mkdir "$machine"
    mv "$work/disk.qcow2" "$work/console" "$tree" "$machine"
    mv "$work/recipe" "$machine"
    say "machine $name: $(du -h "$machine/disk.qcow2" | cut -f1)"
}

mkdir -p "$cache/machines" || die "cannot create $cache (set STILLBLOCK_CACHE to a writable folder)"
[ $# -gt 0 ] || set -- bookworm
for name; do
    case $name in bookworm | trixie) ;; *) die "no such machine: '$name' (one of: bookworm trixie)" ;; esac
done
for name; do
    (
        lock "machine-$name"
        one "$name"
    )
done
