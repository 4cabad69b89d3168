#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# In a guest: makes every kind of device that the stress test writes to from
# the data disks that its variables name, and the stores beside them. Prints
# the test's arguments, one a line, devices top down. A kind whose disk has no
# name is left out.
#
# Variables: whole parted both under files ext4 nvme store storedisk, and where
# wanted lvm1 and lvm2, crypt, md, xfs, btrfs, scsi, each a device node.
set -e
export PATH=$PATH:/usr/sbin:/sbin
exec 3>&1 >&2
sectors() { blockdev --getsz "$1"; }

modprobe -a nvme virtio_scsi sd_mod dm-mod dm-thin-pool dm-crypt raid0 raid1 raid456 loop xfs btrfs

# A partition beside swap in use, and one that begins at an odd sector.
printf 'start=1MiB, size=16MiB\nstart=18MiB, type=82\n' | sfdisk --quiet --label dos "$parted"
mkswap -q "${parted}2"
swapon "${parted}2"
echo 'start=2049, size=28001' | sfdisk --quiet --label dos "$both"

dmsetup create --noudevsync upper --table "0 $(($(sectors "$under") - 8192)) linear $under 8192"
if [ -n "$lvm1" ]; then
    pvcreate -q "$lvm1" "$lvm2"
    vgcreate -q vg0 "$lvm1" "$lvm2"
    lvcreate -q -y -Wn -L 16M -n linear vg0 "$lvm1"
    lvcreate -q -y -Wn -L 16M -i 2 -I 16k -n striped vg0
    lvcreate -q -y -L 24M --poolmetadatasize 4M -Zy --thinpool pool vg0
    lvcreate -q -y -Wn -V 16M --thin -n thin vg0/pool
fi
if [ -n "$crypt" ]; then
    echo secret | cryptsetup open --disable-keyring --type plain --cipher aes-xts-plain64 --key-size 256 "$crypt" secret
fi
if [ -n "$md" ]; then
    printf 'start=%sMiB, size=12MiB\n' 1 14 27 40 53 66 79 | sfdisk --quiet --label gpt "$md"
    new() { mdadm --create --quiet --run --assume-clean --metadata=1.2 --homehost=any "$@"; }
    new /dev/md0 --level=0 --raid-devices=2 "${md}1" "${md}2"
    new /dev/md1 --level=1 --raid-devices=2 "${md}3" "${md}4"
    new /dev/md5 --level=5 --raid-devices=3 "${md}5" "${md}6" "${md}7"
fi
dmsetup mknodes

# Stores on the origins themselves have to be there before the take.
mkdir -p /srv/files /srv/ext4 /srv/xfs /srv/btrfs /srv/store
mkfs.ext4 -q -F "$files"
mount "$files" /srv/files
fallocate -l 16M /srv/files/loop
losetup /dev/loop0 /srv/files/loop
mkfs.ext4 -q -F "$ext4"
mount "$ext4" /srv/ext4
fallocate -l 24M /srv/ext4/store
if [ -n "$xfs" ]; then
    # Smaller than mkfs.xfs likes: every image of it is read.
    mkfs.xfs -q --unsupported -f "$xfs"
    mount "$xfs" /srv/xfs
    fallocate -l 40M /srv/xfs/store
fi
if [ -n "$btrfs" ]; then
    mkfs.btrfs -q -f "$btrfs"
    mount "$btrfs" /srv/btrfs
fi

# Stores: files in one piece and in many, a disk and a partition.
mkfs.ext4 -q -F -E nodiscard "$store"
mount "$store" /srv/store
# As one process: to start one costs an emulated processor as much as 50 of these files.
python3 -IS - <<'END'
import os
for piece in range(240):
    file = os.open(f'/srv/store/piece{piece}', os.O_WRONLY | os.O_CREAT)
    os.posix_fallocate(file, 0, 65536)
    os.close(file)
os.sync()
for piece in range(0, 240, 2):
    os.unlink(f'/srv/store/piece{piece}')
END
fallocate -l 12M /srv/store/one
# What is left free lies in the gaps first.
fallocate -l "$(($(stat -f -c '%a * %S' /srv/store) - 12 * 1024 * 1024))" /srv/store/fill
fallocate -l 8M /srv/store/pieces
sync -f /srv/store
printf 'start=1MiB, size=24MiB\nstart=26MiB\n' | sfdisk --quiet --label dos "$storedisk"

# Requests that have to wait for a tag keep their submitters in between.
for disk in "$both" "$whole" "$parted"; do echo 4 >"/sys/block/${disk#/dev/}/queue/nr_requests"; done

# argument DISK OPTION VALUE: unless its disk has no name.
argument() { [ -z "$1" ] || echo "--$2 $3" >&3; }
argument "$lvm1" device "path=/dev/mapper/vg0-linear"
argument "$lvm1" device "path=/dev/mapper/vg0-striped"
argument "$lvm1" device "path=/dev/mapper/vg0-thin"
argument "$crypt" device "path=/dev/mapper/secret"
argument "$under" device "path=/dev/mapper/upper,on=$under,at=8192"
argument "$md" device "path=/dev/md0"
argument "$md" device "path=/dev/md1"
argument "$md" device "path=/dev/md5"
argument "$files" device "path=/dev/loop0"
argument "$ext4" device "path=$ext4,mount=/srv/ext4,fs=ext4,file=stamped"
argument "$xfs" device "path=$xfs,mount=/srv/xfs,fs=xfs,file=stamped"
argument "$btrfs" device "path=$btrfs,mount=/srv/btrfs,fs=btrfs,file=stamped"
argument "$both" device "path=${both}1,on=$both,at=2049"
argument "$parted" device "path=${parted}1"
argument "$whole" device "path=$whole"
argument "$nvme" device "path=$nvme"
argument "$scsi" device "path=$scsi"
argument "$both" device "path=$both"
argument "$under" device "path=$under,written=8192"
argument "$parted" device "path=$parted,opaque"
argument "$lvm1" device "path=$lvm1,opaque"
argument "$crypt" device "path=$crypt,opaque"
argument "$store" store-file "/srv/store/one"
argument "$store" store-file "/srv/store/pieces"
argument "$ext4" store-file "/srv/ext4/store,origin=$ext4"
argument "$xfs" store-file "/srv/xfs/store,origin=$xfs"
argument "$storedisk" store-device "${storedisk}1"
argument "$storedisk" store-device "${storedisk}2"
