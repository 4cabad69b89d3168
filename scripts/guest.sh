#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Tries something by hand in a guest with a stock kernel:
#
#   scripts/guest.sh --kernel 6.12 --disk a=256M --disk b=1G --module -- 'mkfs.ext4 -q $a && ...'
#
# Builds the module (with --module) and the harness first; see --help.
. "$(dirname "$0")/common.sh"

kernel=6.1
module=no
previous=
for argument; do
    [ "$previous" = --kernel ] && kernel=$argument
    case $argument in
    --kernel=*) kernel=${argument#*=} ;;
    --module) module=yes ;;
    --) break ;;
    esac
    previous=$argument
done
"$checkout/scripts/kernels.sh" "$kernel"
[ "$module" = no ] || "$checkout/scripts/build-module.sh" "$kernel"
cd "$checkout"
# The harness alone has to compile: another part may be half written.
if errors=$(node_modules/.bin/tsc -p tsconfig.json | grep '^test/vm/'); then
    die "the harness does not compile: $errors"
fi
node scripts/bundle.mjs || say 'guest: stillblock is as it was: the sources do not compile'
cd - >/dev/null
exec node "$checkout/dist/test/vm/shell.js" "$@"
