#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# In a root made by boot-tree.ts: what stands between the initramfs and the tests. As process 1
# (init=…) it does as little as that can be: udev, the network, and then it is the agent. As a
# service of systemd (with an argument) it does the last two.
# /etc/stillblock-tests, written by boot-tree.ts, sets: agent, agent_port, path.
. /etc/stillblock-tests
if [ $# = 0 ]; then
    mount -o remount,rw /
    /lib/systemd/systemd-udevd --daemon
    udevadm trigger --type=subsystems --action=add
    udevadm trigger --type=devices --action=add
    udevadm settle
    mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000,cache=loose,ro hostroot /host
fi
mkdir -p /srv/data
ip link set lo up
ip address replace 10.0.2.15/24 dev eth0
ip link set eth0 up
echo 180 >/proc/sys/kernel/hung_task_timeout_secs
echo 1 >/proc/sys/kernel/panic_on_oops
export PATH="$path" HOME=/root TERM=dumb LC_ALL=C.UTF-8
exec python3 -ISu "$agent" "$agent_port" >/dev/console
