# SPDX-License-Identifier: Apache-2.0
# Packages of other Debian releases than this machine's, for scripts that
# unpack them and install nothing: `. "$(dirname "$0")/archive.sh"` after
# common.sh. The archive's address and its keyring come from this machine's own
# apt configuration, and lists live in a private folder, so that the machine's
# own apt state is left alone.
# shellcheck shell=bash

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

# open_apt FOLDER SUITE:LIKE...: makes FOLDER the private state of apt, with the
# lists of the suites that this machine has an archive for. Fails if it has none.
open_apt() {
    local pair
    apt=$1
    shift
    rm -rf "$apt"
    mkdir -p "$apt/state/lists/partial" "$apt/cache/archives/partial"
    : >"$apt/status"
    : >"$apt/sources.list"
    for pair; do
        source_for "${pair%:*}" "${pair#*:}" >>"$apt/sources.list" || true
    done
    [ -s "$apt/sources.list" ] && private_apt apt-get update
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
