#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Fetches Debian's stock kernels with their headers into the cache, unpacked
# and never installed: $cache/kernels/NAME holds boot/, lib/ and usr/ of the
# packages and `release`, the kernel's release string.
#
#   scripts/kernels.sh [6.1|6.12]...      (default: all)
#
# A kernel that is there already needs no network. The archive's address and
# its keyring come from this machine's own apt configuration; package lists
# live in a private folder, so the machine's own apt state is left alone.
. "$(dirname "$0")/common.sh"

# machine_sources: the machine's enabled deb sources, one line per suite:
# URI SUITE KEYRING COMPONENT... (KEYRING is - when none is named as a file)
machine_sources() {
    local etc=/etc/apt
    shopt -s nullglob
    local lists=("$etc"/sources.list "$etc"/sources.list.d/*.list) deb822=("$etc"/sources.list.d/*.sources)
    shopt -u nullglob
    local f
    for f in "${lists[@]}"; do
        [ -r "$f" ] || continue
        awk '$1 == "deb" {
            keyring = "-"; i = 2
            if ($2 ~ /^\[/) {
                for (; i <= NF; i++) {
                    option = $i; gsub(/[][]/, "", option)
                    if (option ~ /^signed-by=\//) keyring = substr(option, 11)
                    if ($i ~ /\]$/) { i++; break }
                }
            }
            printf "%s %s %s", $i, $(i + 1), keyring
            for (i += 2; i <= NF && $i !~ /^#/; i++) printf " %s", $i
            print ""
        }' "$f"
    done
    for f in "${deb822[@]}"; do
        awk '
        function flush(   u, s, nu, ns, i, j) {
            if (tolower(field["enabled"]) != "no" && (" " field["types"] " ") ~ / deb /) {
                nu = split(field["uris"], u, " "); ns = split(field["suites"], s, " ")
                keyring = field["signed-by"] ~ /^\/[^ ]*$/ ? field["signed-by"] : "-"
                for (i = 1; i <= nu; i++) for (j = 1; j <= ns; j++)
                    print u[i], s[j], keyring, field["components"]
            }
            delete field; key = ""
        }
        /^#/ { next }
        /^[ \t]*$/ { flush(); next }
        /^[ \t]/ { if (key != "") field[key] = field[key] " " $0; next }
        {
            key = tolower($0); sub(/:.*/, "", key)
            value = $0; sub(/^[^:]*:[ \t]*/, "", value); sub(/[ \t]+$/, "", value)
            field[key] = value
        }
        END { flush() }' "$f"
    done
}

# source_for SUITE LIKE: a one-line source for SUITE, at the address and with
# the keyring from which this machine takes the suite LIKE.
source_for() {
    local uri suite keyring components
    while read -r uri suite keyring components; do
        case " $components " in *' main '*) ;; *) continue ;; esac
        [ "$suite" = "$2" ] || continue
        [ -r "$keyring" ] || keyring=/usr/share/keyrings/debian-archive-keyring.gpg
        echo "deb [arch=amd64 signed-by=$keyring] $uri $1 main"
        return
    done < <(machine_sources)
    return 1
}

# private_apt COMMAND...: apt with its lists, cache and sources in $apt.
private_apt() {
    local program=$1
    shift
    "$program" -qq -o Dir::State="$apt/state" -o Dir::State::status="$apt/status" -o Dir::Cache="$apt/cache" \
        -o Dir::Etc::sourcelist="$apt/sources.list" -o Dir::Etc::sourceparts=- -o Dir::Etc::preferences=- \
        -o Dir::Etc::preferencesparts=- -o APT::Architecture=amd64 -o APT::Architectures::=amd64 \
        -o APT::Sandbox::User=root -o Acquire::Languages=none -o Acquire::Retries=3 "$@"
}

# depends_on PACKAGE PATTERN: the dependency of PACKAGE's candidate that matches.
depends_on() {
    private_apt apt-cache show --no-all-versions "$1" 2>/dev/null |
        sed -n 's/^Depends: //p' | tr ',' '\n' | sed 's/^ *//; s/ .*//' | grep -Ex "$2" | head -n1
}

# fetch NAME SUITE...: downloads the kernel NAME and its headers from the
# first of the alternatives (each 'SUITE:LIKE ...') that has them.
fetch() {
    local name=$1 alternative pair image headers common kbuild
    shift
    for alternative in "$@"; do
        apt=$work/apt
        rm -rf "$apt"
        mkdir -p "$apt/state/lists/partial" "$apt/cache/archives/partial"
        : >"$apt/status"
        : >"$apt/sources.list"
        for pair in $alternative; do
            source_for "${pair%:*}" "${pair#*:}" >>"$apt/sources.list" || true
        done
        [ -s "$apt/sources.list" ] || continue
        private_apt apt-get update >"$work/log" 2>&1 || continue
        image=$(depends_on linux-image-amd64 "linux-image-${name//./\\.}\.[^ ]*-amd64") || continue
        headers=${image/image/headers}
        common=$(depends_on "$headers" 'linux-headers-[^ ]*-common') || continue
        kbuild=$(depends_on "$headers" 'linux-kbuild-[^ ]*') || continue
        (cd "$work" && private_apt apt-get download "$image" "$headers" "$common" "$kbuild") >"$work/log" 2>&1 || continue
        release=${image#linux-image-}
        return 0
    done
    return 1
}

# unpack DESTINATION: the downloaded packages as one tree, usable where it will
# lie: no path in it points at /usr/src or /lib of this machine.
unpack() {
    local tree=$1 deb headers file
    mkdir -p "$tree"
    for deb in "$work"/*.deb; do
        dpkg-deb -x "$deb" "$tree" || die "cannot unpack $(basename "$deb"): is the disk full? ($cache)"
    done
    headers=$tree/usr/src/linux-headers-$release
    for file in $(grep -rlIE '/usr/(src/linux-headers|lib/linux-kbuild)' "$tree"/usr/src/*/Makefile "$headers/.kernelvariables" 2>/dev/null); do
        sed -i -E "s#(^|[[:space:]=:])/usr/(src/linux-headers|lib/linux-kbuild)#\1$final/usr/\2#g" "$file"
    done
    ln -sfn "../../../usr/src/linux-headers-$release" "$tree/lib/modules/$release/build"
    ln -sfn "../../../usr/src/${release:+$(basename "$tree"/usr/src/*-common)}" "$tree/lib/modules/$release/source"
    depmod -b "$tree" "$release" || die "depmod failed: apt-get install kmod"
    cp "$tree/boot/vmlinuz-$release" "$tree/vmlinuz"
    printf '%s\n' "$release" >"$tree/release"
    printf '%s\n' "$final" >"$tree/location"
}

# one NAME: makes $cache/kernels/NAME exist.
one() {
    local name=$1 release='' apt='' codename
    need_kernel "$name"
    final=$cache/kernels/$name
    # Headers name their own place: a cache that was moved is unpacked anew.
    [ "$(cat "$final/location" 2>/dev/null)" != "$final" ] || return 0
    # shellcheck source=/dev/null
    codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
    say "kernel $name: fetching from Debian"
    work=$(mktemp -d "$cache/kernels/.fetch-XXXXXX")
    # shellcheck disable=SC2064  # this run's folder, even after `work` changes
    trap "rm -rf '$work'" EXIT
    case $name in
    6.1) fetch "$name" "bookworm:$codename bookworm-security:$codename-security" ;;
    6.12) fetch "$name" "bookworm-backports:$codename" "trixie:$codename trixie-security:$codename-security" ;;
    esac || die "cannot get Debian's kernel $name: $(tail -n1 "$work/log" 2>/dev/null || true) (needs a Debian archive in /etc/apt/sources.list* and the network; see scripts/kernels.sh)"
    unpack "$work/tree"
    rm -rf "$final"
    mv "$work/tree" "$final"
    rm -rf "$work"
    say "kernel $name: $release"
}

mkdir -p "$cache/kernels" || die "cannot create $cache (set STILLBLOCK_CACHE to a writable folder)"
command -v depmod >/dev/null || die 'depmod is missing: apt-get install kmod'
lock kernels
# shellcheck disable=SC2086  # a list
for kernel in ${*:-$kernels}; do one "$kernel"; done
