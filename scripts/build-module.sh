#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Builds module/ out of tree for one kernel in the cache, warnings as
# errors: build/module-KERNEL/stillblock.ko. Silent unless it fails; does
# nothing when no source is newer.
#
#   scripts/build-module.sh KERNEL [make arguments, e.g. W=1 C=2]
#
# STILLBLOCK_MODULE_SOURCES and STILLBLOCK_MODULE_OUTPUT name another source
# and output folder (default: module/ and build/module-KERNEL/).
. "$(dirname "$0")/common.sh"
. "$(dirname "$0")/toolchain.sh"

[ $# -ge 1 ] || die "usage: scripts/build-module.sh KERNEL [make arguments]"
kernel=$1
shift
need_kernel "$kernel"
sources=${STILLBLOCK_MODULE_SOURCES:-$checkout/module}
[ -r "$sources/Kbuild" ] || die "no $sources/Kbuild: nothing to build"
tree=$cache/kernels/$kernel
[ -r "$tree/release" ] || "$checkout/scripts/kernels.sh" "$kernel"
release=$(cat "$tree/release")
headers=$tree/usr/src/linux-headers-$release
output=${STILLBLOCK_MODULE_OUTPUT:-$checkout/build/module-$kernel}
mkdir -p "$output"

exec {build_fd}>"$output/.lock"
flock "$build_fd"

# What the module was built from and how; another answer means a new build.
inputs="$release $(cat "$tree/inputs" 2>/dev/null || true) $* $sources"
object=$(sed -n 's/^obj-m *[:+]*= *\([a-z_]*\)\.o.*/\1.ko/p' "$sources/Kbuild" | head -n1)
if [ "$(cat "$output/.inputs" 2>/dev/null)" = "$inputs" ] && [ -e "$output/$object" ] &&
    [ -z "$(find "$sources" -newer "$output/.built" -print -quit 2>/dev/null || echo missing)" ]; then
    exit 0
fi
touch "$output/.building"

# Kbuild writes beside its sources: it gets a folder of links, so that module/
# stays clean and two kernels never share an object file. `make` sees through
# the links to the sources' times.
find "$output" -type l -delete
(cd "$sources" && find . -name '.*' ! -name . -prune -o -type d -print) | while read -r folder; do
    mkdir -p "$output/$folder"
done
(cd "$sources" && find . -name '.*' ! -name . -prune -o \( -name '*.[chS]' -o -name Kbuild -o -name 'Kbuild.*' \) -print) | while read -r file; do
    ln -s "$sources/${file#./}" "$output/$file"
done

arguments=(-C "$headers" "M=$output" KCFLAGS=-Werror)
case $kernel in
7.2) build=(in_toolchain sid "$cache/kernels:ro" "$sources:ro" "$output" -- make) ;;
*) build=(make CC=gcc-12) ;;
esac
# Nobody needs types for BPF in it, whose making needs pahole.
arguments+=(CONFIG_DEBUG_INFO_BTF_MODULES=)
# Another set of checks has to look at every file again.
[ "$(cat "$output/.inputs" 2>/dev/null)" = "$inputs" ] || find "$output" -name '*.o' -delete
if ! "${build[@]}" "${arguments[@]}" "$@" modules >"$output/.log" 2>&1; then
    rm -f "$output/.built"
    cat "$output/.log" >&2
    die "the module does not build for $kernel ($release)"
fi
# Checkers such as sparse print findings without failing the build.
# (What pahole a kernel was built with matters to BTF alone, which is not made.)
if grep -v 'warning: pahole version differs' "$output/.log" | grep -E '(warning|error):' >&2; then
    rm -f "$output/.built"
    die "the module builds for $kernel ($release) with the findings above"
fi
printf '%s\n' "$inputs" >"$output/.inputs"
mv "$output/.building" "$output/.built"
