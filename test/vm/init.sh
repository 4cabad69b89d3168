#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Process 1 of a test guest's initrd (busybox): mounts the host's root read-only
# under an overlay in memory, brings the network up and becomes the agent.
# /settings, written by the harness, sets: modules, kernel_modules, agent_port,
# agent, path.
fail() {
    echo "stillblock-init: $1 failed"
    poweroff -f
}
mount -t proc proc /proc && mount -t sysfs sys /sys && mount -t devtmpfs dev /dev || fail mount
. /settings
# Tests look for the kernel's warnings on the console, where level 4 has none of them.
read -r level _ </proc/sys/kernel/printk
[ "$level" -ge 5 ] || fail 'console level'
# Here a boot is saved: nothing has touched a disk or the host's root. Whoever goes on
# from there gives the time, in seconds since 1970, and what tells its boot from others.
boot_id=
case " $(cat /proc/cmdline) " in
*' stillblock.saved '*)
    echo 'stillblock-init: waits'
    read -r now boot_id
    date -s "@$now" >/dev/null || fail date
    ;;
esac
for module in $modules; do insmod "/modules/$module" || fail "insmod $module"; done
mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000,cache=loose,ro hostroot /host || fail '9p mount'
mount -t tmpfs tmpfs /rw && mkdir /rw/upper /rw/work || fail tmpfs
mount -t overlay -o lowerdir=/host,upperdir=/rw/upper,workdir=/rw/work root /newroot || fail overlay
mount --move /dev /newroot/dev
mkdir -p /newroot/dev/pts /newroot/dev/shm /newroot/usr/lib/modules /newroot/run /newroot/proc /newroot/sys
mount -t devpts devpts /newroot/dev/pts
mount -t tmpfs tmpfs /newroot/dev/shm
mount -t proc proc /newroot/proc
mount -t sysfs sys /newroot/sys
mount -t debugfs debugfs /newroot/sys/kernel/debug
mount -t tracefs tracefs /newroot/sys/kernel/tracing
mount -t tmpfs tmpfs /newroot/run
if [ -n "$boot_id" ]; then
    echo "$boot_id" >/newroot/run/boot_id
    mount --bind /newroot/run/boot_id /newroot/proc/sys/kernel/random/boot_id || fail 'bind of the boot id'
fi
mount --bind "/host$kernel_modules" /newroot/usr/lib/modules || fail 'bind of the kernel modules'
# There is no udevd: device nodes come from devtmpfs, and LVM makes its own.
mkdir -p /newroot/etc/lvm /newroot/run/lock
cat >/newroot/etc/lvm/lvmlocal.conf <<'END'
activation { udev_sync=0 udev_rules=0 verify_udev_operations=0 monitoring=0 }
devices { obtain_device_list_from_udev=0 external_device_info_source="none" multipath_component_detection=0 }
END
hostname guest
echo '127.0.0.1 localhost guest' >/newroot/etc/hosts
ip link set lo up
ip addr add 10.0.2.15/24 dev eth0 && ip link set eth0 up && ip route add default via 10.0.2.2 || fail network
# A stuck task is reported within a test's time, but not one that waits for the
# 30 seconds that the module gives a device, on a slow machine; soft lockups get
# more room, since an emulated processor shares its core with the test itself.
echo 180 >/proc/sys/kernel/hung_task_timeout_secs
echo 1 >/proc/sys/kernel/panic_on_oops
echo 30 >/proc/sys/kernel/watchdog_thresh
export PATH="$path" HOME=/root TERM=dumb LC_ALL=C.UTF-8
exec switch_root -c /dev/console /newroot /usr/bin/python3 -ISu "$agent" "$agent_port"
