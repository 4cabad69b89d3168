#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Builds the kernel `debug` from Debian's sources of 6.1, with KASAN, lockdep,
# kmemleak and fault injection (debug-kernel.config), into the cache beside the
# stock kernels and laid out as they are: $cache/kernels/debug.
#
#   scripts/debug-kernel.sh        (or scripts/kernels.sh debug)
#
# It takes some eight minutes of two processors, once: it is built again when
# its configuration, this script or the compiler has changed. A newer source
# package alone is no reason; remove the folder for that.
. "$(dirname "$0")/common.sh"
. "$(dirname "$0")/archive.sh"

source_package=linux-source-6.1
compiler=gcc-12
config=$checkout/scripts/debug-kernel.config
final=$cache/kernels/debug

# The parts of the sources that no test guest is made of: unpacking is a good
# part of the time.
excluded=('Documentation/*.rst' 'Documentation/devicetree' 'samples/*.[ch]' tools/testing tools/perf 'drivers/gpu/drm/*/*.[ch]' 'drivers/media/*.[ch]'
    'drivers/net/ethernet/*.[ch]' 'drivers/net/wireless/*.[ch]' 'drivers/staging/*.[ch]' 'drivers/infiniband/*.[ch]'
    'sound/*.[ch]' 'arch/*/boot/dts')

# inputs: what the kernel is built from and by, as one line.
inputs() {
    echo "$(cat "$config" "$checkout/scripts/debug-kernel.sh" | sha256sum | cut -d' ' -f1) $("$compiler" -dumpfullversion) $final"
}

fetch() {
    local codename
    # shellcheck source=/dev/null
    codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
    open_apt "$work/apt" "bookworm:$codename" "bookworm-security:$codename-security" &&
        (cd "$work" && private_apt apt-get download "$source_package")
}

unpack() {
    local part options=()
    for part in "${excluded[@]}"; do options+=("--exclude=$source_package/$part"); done
    dpkg-deb --fsys-tarfile "$work"/*.deb | tar -xO "./usr/src/$source_package.tar.xz" | xz -dc |
        tar -x -C "$work" --wildcards "${options[@]}" || die "cannot unpack $source_package: is the disk full? ($cache)"
    rm -f "$work"/*.deb
    mv "$work/$source_package" "$work/source"
}

# kbuild TARGET...: make in the sources.
kbuild() { make -C "$work/source" -s -j"$(nproc)" CC="$compiler" LOCALVERSION=-debug "$@"; }

# configure: what the configuration asks for and does not get ends the script.
configure() {
    local line wanted missing=()
    kbuild KCONFIG_ALLCONFIG="$config" allnoconfig >"$work/log" 2>&1 || die "cannot configure the debug kernel: $(grep -v '^make' "$work/log" | tail -n1)"
    while read -r line; do
        case $line in
        CONFIG_* | '# CONFIG_'*' is not set') wanted=$line ;;
        *) continue ;;
        esac
        grep -qxF "$wanted" "$work/source/.config" || missing+=("$wanted")
    done <"$config"
    [ "${#missing[@]}" = 0 ] || die "debug-kernel.config: ${missing[*]} is not what $source_package makes of it"
}

# install_tree DESTINATION: image, modules, and what an external module is built with.
install_tree() {
    local tree=$1 release headers
    release=$(cat "$work/source/include/config/kernel.release")
    headers=$tree/usr/src/linux-headers-$release
    mkdir -p "$tree/usr/src"
    cp "$work/source/arch/x86/boot/bzImage" "$tree/vmlinuz"
    cp "$work/source/System.map" "$tree/System.map"
    kbuild INSTALL_MOD_PATH="$tree" modules_install >"$work/log" 2>&1 || die "cannot install the debug kernel's modules: $(tail -n1 "$work/log")"
    # An external build compiles no source of the kernel, but runs its tools.
    find "$work/source" -path "$work/source/scripts" -prune -o -path "$work/source/tools" -prune -o -type f \
        \( -name '*.[coSa]' -o -name '.*.cmd' -o -name '*.ko' -o -name '*.mod' -o -name '*.order' \) -exec rm -f {} +
    rm -f "$work/source"/{vmlinux,.tmp_*,.version} "$work/source"/arch/x86/boot/{bzImage,*.bin} "$work/source"/arch/x86/boot/compressed/vmlinux*
    mv "$work/source" "$headers"
    ln -sfn "$final/usr/src/linux-headers-$release" "$tree/lib/modules/$release/build"
    ln -sfn "$final/usr/src/linux-headers-$release" "$tree/lib/modules/$release/source"
    depmod -b "$tree" "$release" || die 'depmod failed: apt-get install kmod'
    printf '%s\n' "$release" >"$tree/release"
}

mkdir -p "$cache/kernels" || die "cannot create $cache (set STILLBLOCK_CACHE to a writable folder)"
lock debug-kernel
for tool in "$compiler" make bc bison flex xz depmod; do
    command -v "$tool" >/dev/null || die "$tool is missing: apt-get install gcc-12 make bc bison flex libelf-dev xz-utils kmod"
done
[ "$(cat "$final/inputs" 2>/dev/null)" != "$(inputs)" ] || exit 0
# The script may be edited while it runs.
inputs=$(inputs)
say 'kernel debug: fetching its sources from Debian'
work=$(mktemp -d "$cache/kernels/.debug-XXXXXX")
trap 'rm -rf "$work"' EXIT
fetch >"$work/log" 2>&1 ||
    die "cannot get $source_package: $(tail -n1 "$work/log") (needs a Debian archive in /etc/apt/sources.list* and the network; see scripts/debug-kernel.sh)"
unpack
configure
say 'kernel debug: building (some eight minutes of two processors)'
started=$SECONDS
kbuild bzImage modules >"$work/log" 2>&1 || {
    grep -m20 -E 'error|Error|\*\*\*' "$work/log" >&2
    die 'the debug kernel does not build'
}
install_tree "$work/tree"
printf '%s\n' "$inputs" >"$work/tree/inputs"
rm -rf "$final"
mv "$work/tree" "$final"
say "kernel debug: $(cat "$final/release") in $((SECONDS - started)) s"
