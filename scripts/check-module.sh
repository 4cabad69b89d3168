#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# The kernel's own checkers over module/: checkpatch --strict, kernel-doc, and
# for each kernel the compiler with W=1 and sparse. One line per finding.
#
#   scripts/check-module.sh [--build] [KERNEL]...      (default: all stock kernels)
#
# --build: only what depends on the kernel, W=1 and sparse. checkpatch is that of
# Debian's sources of 6.1, from the kernel `debug` or fetched into the cache;
# kernel-doc that of 6.12's headers.
. "$(dirname "$0")/common.sh"
. "$(dirname "$0")/archive.sh"
cd "$checkout"
readonly tools=$cache/checkpatch source_package=linux-source-6.1

# What checkpatch may say, as FILE:TYPE.
exceptions=(
    # The one file that tests versions, so that no other has to.
    compat.h:LINUX_VERSION_CODE
    # The layout of TRACE_EVENT() everywhere in include/trace/events.
    trace.h:OPEN_ENDED_LINE
    trace.h:PARENTHESIS_ALIGNMENT
)

# fetch_checkpatch: takes it out of the sources; nothing else of Debian has it.
fetch_checkpatch() {
    local work codename
    lock checkpatch
    [ ! -e "$tools/checkpatch.pl" ] || return 0
    local built=("$cache"/kernels/debug/usr/src/*/scripts/)
    if [ -e "${built[0]}checkpatch.pl" ]; then
        mkdir -p "$tools" && cp "${built[0]}"{spelling.txt,const_structs.checkpatch,checkpatch.pl} "$tools"
        return
    fi
    say "checkpatch: fetching $source_package from Debian"
    work=$(mktemp -d "$cache/.checkpatch-XXXXXX")
    # shellcheck disable=SC2064  # this run's folder
    trap "rm -rf '$work'" EXIT
    # shellcheck source=/dev/null
    codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
    mkdir "$work/tools"
    if ! {
        open_apt "$work/apt" "bookworm:$codename" "bookworm-security:$codename-security" &&
            (cd "$work" && private_apt apt-get download "$source_package") &&
            dpkg-deb --fsys-tarfile "$work"/*.deb | tar -xO "./usr/src/$source_package.tar.xz" | xz -dc |
            tar -x -C "$work/tools" --strip-components=2 "$source_package"/scripts/{checkpatch.pl,spelling.txt,const_structs.checkpatch}
    } >"$work/log" 2>&1; then
        die "cannot get checkpatch: $(tail -n1 "$work/log") (needs a Debian archive in /etc/apt/sources.list* and the network)"
    fi
    mv "$work/tools" "$tools"
}

# checkpatch_findings: those that are no exceptions, and exceptions that nothing needs.
checkpatch_findings() {
    local path text type exception seen=' '
    while IFS= read -r text; do
        path=${text%%:*}
        type=$(sed -E 's/^[^ ]* [A-Z]+:([A-Z_]+): .*/\1/' <<<"$text")
        exception=$(basename "$path"):$type
        case " ${exceptions[*]} " in
        *" $exception "*) seen+="$exception " ;;
        *) printf '%s\n' "$text" ;;
        esac
    done < <(perl "$tools/checkpatch.pl" --strict --no-tree --terse --show-types --no-summary -f "${sources[@]}")
    for exception in "${exceptions[@]}"; do
        case $seen in
        *" $exception "*) ;;
        *) echo "scripts/check-module.sh: nothing needs the exception $exception" ;;
        esac
    done
}

# undocumented: functions, structures and enumerations in headers that no kernel-doc describes.
undocumented() {
    local header name
    for header in module/*.h; do
        while read -r name; do
            grep -qF " * $name - " module/*.[ch] || echo "$header: no kernel-doc: $name"
        done < <(sed -nE 's/^((struct|enum) stb_[a-z0-9_]+) \{$/\1/p; /^[#\t ]/!s/^(.*[ *])?([a-z][a-z0-9_]+)\(.*/\2()/p' "$header" | sort -u)
    done
}

# style: what depends on no kernel.
style() {
    local kernel_doc
    checkpatch_findings
    kernel_doc=$(echo "$cache"/kernels/6.12/usr/lib/linux-kbuild-*/scripts/kernel-doc)
    perl "$kernel_doc" -none -Wall "${sources[@]}" 2>&1
    undocumented
}

only_build=
if [ "${1:-}" = --build ]; then
    only_build=yes
    shift
fi
# shellcheck disable=SC2086  # a list
[ $# -gt 0 ] || set -- ${kernels/debug/}
for kernel; do need_kernel "$kernel"; done
sources=(module/*.[ch] module/uapi/linux/*.h)
findings=
if [ -z "$only_build" ]; then
    command -v perl >/dev/null || die 'perl is missing: apt-get install perl'
    "$checkout/scripts/kernels.sh" 6.12
    (fetch_checkpatch)
    findings=$(style)
fi
[ -z "$findings" ] || printf '%s\n' "$findings" >&2
for kernel; do
    STILLBLOCK_MODULE_OUTPUT=$checkout/build/check-$kernel "$checkout/scripts/build-module.sh" "$kernel" W=1 C=2 ||
        findings+=" $kernel"
done
[ -z "$findings" ] || die 'module/ is not clean: see above'
