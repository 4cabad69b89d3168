#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# NBD clients of the next Debian release, whose libnbd and QEMU know what this
# machine's do not (extended headers). Their packages are unpacked, never
# installed, with all libraries that they need, into $cache/clients/trixie:
#
#   scripts/clients.sh        fetches them unless they are there already
#   $cache/clients/trixie/bin/nbdinfo nbd://localhost
#
# bin/ holds a wrapper for each tool, and `python3` with libnbd's binding. They
# run through their own dynamic linker in this machine's own file system, so
# that sockets and paths mean the same as outside, and nobody needs to be root.
. "$(dirname "$0")/common.sh"
. "$(dirname "$0")/archive.sh"

suite=trixie
packages=(libnbd-bin python3-libnbd qemu-utils qemu-system-common)
tools=(nbdinfo nbdcopy nbddump qemu-img qemu-io qemu-nbd qemu-storage-daemon)
# Of this script's own making, unpacked anew when it changes.
layout=1

tree=$cache/clients/$suite

# wrap NAME PROGRAM [VARIABLE=VALUE]...: bin/NAME runs PROGRAM of the tree.
wrap() {
    local name=$1 program=$2
    shift 2
    cat >"$work/tree/bin/$name" <<WRAPPER
#!/bin/sh
# Runs $suite's $name in this machine's own file system.
root=\$(dirname "\$(dirname "\$(readlink -f "\$0")")")
lib=\$root/usr/lib/x86_64-linux-gnu
exec env $* "\$lib/ld-linux-x86-64.so.2" --argv0 "$name" --library-path "\$lib" "\$root/usr/bin/$program" "\$@"
WRAPPER
    chmod +x "$work/tree/bin/$name"
}

fetch() {
    local codename
    # shellcheck source=/dev/null
    codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
    open_apt "$work/apt" "$suite:$codename" "$suite-security:$codename-security" &&
        # With nothing installed in the private state, all that they need comes along.
        private_apt apt-get -y --no-install-recommends -o Debug::NoLocking=1 --download-only install "${packages[@]}"
}

unpack() {
    local deb tool python
    mkdir -p "$work/tree/bin"
    for deb in "$work"/apt/cache/archives/*.deb; do
        # A manual is read elsewhere.
        dpkg-deb --fsys-tarfile "$deb" | tar -x -C "$work/tree" --no-same-owner \
            --exclude='./usr/share/doc' --exclude='./usr/share/man' --exclude='./usr/share/locale' \
            --exclude='./dev' --exclude='./var' || die "cannot unpack $(basename "$deb"): is the disk full? ($cache)"
    done
    for tool in "${tools[@]}"; do
        [ -x "$work/tree/usr/bin/$tool" ] || die "$suite's packages have no $tool"
        wrap "$tool" "$tool"
    done
    python=$(basename "$(readlink "$work/tree/usr/bin/python3")")
    # shellcheck disable=SC2016  # for the wrapper to expand
    wrap python3 "$python" 'PYTHONHOME="$root/usr"' 'PYTHONPATH="$root/usr/lib/python3/dist-packages"' \
        PYTHONDONTWRITEBYTECODE=1
    echo "$layout ${packages[*]}" >"$work/tree/packages"
}

mkdir -p "$cache/clients" || die "cannot create $cache (set STILLBLOCK_CACHE to a writable folder)"
lock clients
[ "$(cat "$tree/packages" 2>/dev/null)" != "$layout ${packages[*]}" ] || exit 0
say "clients of $suite: fetching from Debian"
work=$(mktemp -d "$cache/clients/.fetch-XXXXXX")
trap 'rm -rf "$work"' EXIT
fetch >"$work/log" 2>&1 ||
    die "cannot get $suite's clients: $(tail -n1 "$work/log") (needs a Debian archive in /etc/apt/sources.list* and the network; see scripts/clients.sh)"
unpack
rm -rf "$tree"
mv "$work/tree" "$tree"
