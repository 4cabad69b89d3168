#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Everything that `npm test` and `npm run demo` need, on a Debian 12 machine
# with Node and this checkout: Debian packages, npm packages, stock kernels in
# the cache, the kernel module for each, the addon, the compiled TypeScript.
#
#   scripts/setup.sh [KERNEL]...      (default: those of `npm test`)
#
# What is there already is not done again; then it takes a few seconds and no
# network. Nothing but Debian's archives and the npm registry is contacted.
. "$(dirname "$0")/common.sh"
cd "$checkout"

# By what needs them.
packages=(
    # building the module (objtool is linked with libelf1), addon and kernels' trees
    gcc-12 gcc g++ make cmake sparse libelf1 kmod perl xz-utils zstd
    # the sanitizers and the fuzzer of the native engine
    clang-14 clang libclang-rt-14-dev
    # guests
    qemu-system-x86 busybox-static util-linux python3
    # what runs inside the guests, whose root is this machine's
    e2fsprogs xfsprogs btrfs-progs lvm2 dmsetup fdisk fio xxhash mount procps psmisc iproute2
    mdadm cryptsetup-bin thin-provisioning-tools strace stress-ng
    # the toolchain of kernels that are newer than this Debian; the debug kernel
    debootstrap bc bison flex libelf-dev
    # other people's NBD clients and servers, and checkers of formats
    qemu-utils qemu-system-common libnbd-bin python3-libnbd nbd-client nbdkit nbd-server socat curl libxml2-utils
    # OpenSSL's headers, where Node comes without; certificates and keys for TLS
    libssl-dev
    gnutls-bin openssl
    # socket activation by its own tool; tunnels
    systemd openssh-client openssh-server
    # machines: who converts, inspects and runs them, and what they are made of
    virt-v2v guestfish libvirt-daemon-driver-qemu dosfstools ovmf
    # Debian packages of our own, and what judges them
    debhelper dh-dkms dpkg-dev lintian
    # databases that hooks make ready, what reads manual pages, another shell
    postgresql-15 mariadb-server mandoc man-db zsh
)

missing_packages() {
    local package
    for package in "${packages[@]}"; do
        [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || echo "$package"
    done
}

debian_packages() {
    local missing root=() log
    command -v dpkg-query >/dev/null || die 'this is not Debian: install by hand what scripts/setup.sh lists'
    mapfile -t missing < <(missing_packages)
    [ "${#missing[@]}" -gt 0 ] || return 0
    say "setup: Debian packages: ${missing[*]}"
    if [ "$(id -u)" != 0 ]; then
        command -v sudo >/dev/null && sudo -n true 2>/dev/null ||
            die "run as root: apt-get install --no-install-recommends ${missing[*]}"
        root=(sudo)
    fi
    # Tests start sshd themselves; it is not to open this machine because of them.
    if [[ " ${missing[*]} " = *' openssh-server '* ]]; then
        say 'setup: /etc/ssh/sshd_not_to_be_run keeps the service of openssh-server from starting'
        "${root[@]}" mkdir -p /etc/ssh
        "${root[@]}" touch /etc/ssh/sshd_not_to_be_run
    fi
    log=$(mktemp)
    local install=("${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -y -q -o DPkg::Lock::Timeout=300
        -o Acquire::Retries=3 install --no-install-recommends "${missing[@]}")
    # The machine's package lists may be absent or too old: then they are fetched.
    if ! "${install[@]}" >"$log" 2>&1; then
        "${root[@]}" apt-get -q -o DPkg::Lock::Timeout=300 -o Acquire::Retries=3 update >"$log" 2>&1 ||
            die "apt-get update failed: $(grep -m1 '^E:' "$log" || tail -n1 "$log")"
        "${install[@]}" >"$log" 2>&1 ||
            die "cannot install Debian packages (${missing[*]}): $(grep -m1 '^E:' "$log" || tail -n1 "$log")"
    fi
    rm -f "$log"
}

npm_packages() {
    local installed=node_modules/.package-lock.json log
    [ ! -e "$installed" ] || [ package-lock.json -nt "$installed" ] || return 0
    say 'setup: npm packages'
    log=$(mktemp)
    npm ci --no-audit --no-fund >"$log" 2>&1 ||
        die "npm ci failed (needs the npm registry): $(grep -m1 'npm error' "$log" || tail -n1 "$log")"
    touch "$installed"
    rm -f "$log"
}

# What needs root is made once.
boot_tree() {
    local root=()
    [ "$(id -u)" = 0 ] || ! sudo -n true 2>/dev/null || root=(sudo "STILLBLOCK_CACHE=$cache")
    "${root[@]}" "$checkout/scripts/boot-tree.sh"
}

# The sources' newest time against the addon's says whether to ask CMake at all.
addon() {
    local output=build/native log
    [ -z "$(find CMakeLists.txt src/native module/uapi package.json -newer "$output/.built" 2>&1 | head -n1)" ] && return
    say 'setup: addon'
    mkdir -p "$output"
    touch "$output/.building"
    log=$(mktemp)
    node_modules/.bin/cmake-js build --out "$output" >"$log" 2>&1 || {
        cat "$log" >&2
        die 'the addon does not build'
    }
    mv "$output/.building" "$output/.built"
    rm -f "$log"
}

typescript() {
    node_modules/.bin/tsc -p tsconfig.json || die 'TypeScript does not compile'
    node scripts/bundle.mjs || die 'the command cannot be bundled'
}

node_major=$(node -p 'process.versions.node.split(".")[0]' 2>/dev/null) || die 'Node is missing: install Node 20 or newer'
[ "$node_major" -ge 20 ] || die "Node $node_major is too old: install Node 20 or newer"
lock setup
debian_packages
npm_packages
[ $# -gt 0 ] || set -- 6.1
"$checkout/scripts/kernels.sh" "$@"
"$checkout/scripts/clients.sh"
"$checkout/scripts/appliance.sh"
boot_tree
for kernel; do "$checkout/scripts/build-module.sh" "$kernel"; done
addon
typescript
