#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# The tests of test/machines, after scripts/setup.sh: whole Debians. The last line is
# `N passed, N failed`. Arguments go to ava.
. "$(dirname "$0")/common.sh"
. "$(dirname "$0")/ava.sh"
cd "$checkout"

scripts/machine.sh bookworm trixie
packages=(stillblock stillblock-dkms)
# The slowest to make, and of no source here.
compgen -G 'build/packages/stillblock-node_*.deb' >/dev/null || packages+=(stillblock-node)
scripts/package.sh "${packages[@]}"
only_ava --config ava.machines.config.mjs "$@"
