#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# dracut module: the module, the plan and stillblock-early, so that devices are tracked
# before anything is mounted. Install the folder as
# /usr/lib/dracut/modules.d/90stillblock.

plan=${STILLBLOCK_STATE_DIR:-/var/lib/stillblock}/boot-plan

check() {
    # Nothing is tracked yet: the daemon writes the plan.
    [[ -r $dracutsysrootdir$plan ]]
}

depends() {
    echo udev-rules
}

installkernel() {
    hostonly='' instmods stillblock
}

install() {
    inst_binary /usr/lib/stillblock/stillblock-early /sbin/stillblock-early
    inst_simple "$plan" /etc/stillblock/boot-plan
    inst_hook pre-mount 05 "$moddir/stillblock-early.sh"
}
