#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# In a root made by boot-tree.ts: what stands between the initramfs and the tests. As process 1
# (init=…) it does as little as that can be: the network, udev for disks if the command line has
# the word with_udev, which the kernel makes an argument, too, and then it is the agent. As a
# service of systemd (with the argument `service`) it leaves both alone.
# /etc/stillblock-tests, written by boot-tree.ts, sets: agent, agent_port, path.
. /etc/stillblock-tests
if [ "${1-}" != service ]; then
    mount -o remount,rw /
    read -r line </proc/cmdline
    case " $line " in
    *' with_udev '*)
        /lib/systemd/systemd-udevd --daemon
        udevadm trigger --type=devices --subsystem-match=block --action=add
        udevadm settle
        ;;
    esac
fi
mkdir -p /srv/data
ip link set lo up
ip address replace 10.0.2.15/24 dev eth0
ip link set eth0 up
echo 180 >/proc/sys/kernel/hung_task_timeout_secs
echo 1 >/proc/sys/kernel/panic_on_oops
export PATH="$path" HOME=/root TERM=dumb LC_ALL=C.UTF-8
exec python3 -ISu "$agent" "$agent_port" >/dev/console
