#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# In an initramfs of dracut: tracks the devices of the plan that are there.
modprobe -q stillblock && /sbin/stillblock-early /etc/stillblock/boot-plan
