#!/usr/bin/env bash
# A real Apptainer for the tests on Debian releases that have none: Debian's own package from sid, unpacked into a private
# folder together with the libraries that it needs. The machine's libc and packages stay as they are.
#
#   tests/containers/apptainer.sh PREFIX    afterwards PREFIX/tool/apptainer is the command
#
# Users take the Apptainer of their site or distribution. This copy is patched for the tests: its ELF files name the
# private loader, root is not given all capabilities (a root without CAP_SYS_RESOURCE cannot hand them on), and builds run
# in a user namespace that maps every id onto itself. Needs root, python3, patchelf, dpkg-deb, apt-get and squashfs-tools.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
[ "$(id -u)" = 0 ] || { echo "apptainer.sh: it needs root, which builds as other users" >&2; exit 2; }
for tool in patchelf dpkg-deb apt-get mksquashfs python3; do
    command -v "$tool" > /dev/null ||
        { echo "apptainer.sh: $tool is missing: apt-get install patchelf squashfs-tools" >&2; exit 2; }
done
[ "$(uname -m)" = x86_64 ] || { echo "apptainer.sh: it knows x86_64 only, this is $(uname -m)" >&2; exit 2; }
mkdir -p "$1"
P=$(cd "$1" && pwd)
exec 9> "$P/lock"
flock 9 # two test runs of one user share the folder
[ ! -x "$P/tool/apptainer" ] || exit 0
T=$P/apt
rm -rf "$T"
mkdir -p "$T"/{lists/partial,cache/archives/partial,deb}

# the mirror that this machine's apt uses already
mirror=$(grep -hoE '^(URIs:|deb) .*' /etc/apt/sources.list /etc/apt/sources.list.d/* 2> /dev/null | grep -oE 'https?://[^ ]+/debian/?( |$)' | head -n 1 || true)
keys=/usr/share/keyrings/debian-archive-keyring.gpg
echo "deb [signed-by=$keys] ${mirror:-http://deb.debian.org/debian} sid main" > "$T/sources.list"
options=(-o "Dir::Etc::sourcelist=$T/sources.list" -o Dir::Etc::sourceparts=/dev/null -o "Dir::State::lists=$T/lists"
    -o "Dir::Cache=$T/cache" -o APT::Sandbox::User=root -o Acquire::Check-Valid-Until=false)
apt-get "${options[@]}" -qq update
(cd "$T/deb" && apt-get "${options[@]}" -qq download apptainer libc6 libseccomp2 libsqlite3-0 zlib1g)
for package in "$T"/deb/*.deb; do dpkg-deb -x "$package" "$P"; done
libraries=$P/usr/lib/x86_64-linux-gnu
for binary in usr/bin/apptainer usr/lib/x86_64-linux-gnu/apptainer/bin/starter; do
    patchelf --set-interpreter "$libraries/ld-linux-x86-64.so.2" --force-rpath --set-rpath "$libraries" "$P/$binary"
done
# the build can be moved, but looks for etc/ and var/ beside bin/ and beside x86_64-linux-gnu/
ln -sfn ../etc "$P/usr/etc"
ln -sfn ../var "$P/usr/var"
ln -sfn ../../etc "$P/usr/lib/etc"
ln -sfn ../../var "$P/usr/lib/var"
mkdir -p "$P/var/lib/apptainer/mnt/session"
sed -i 's/^root default capabilities = .*/root default capabilities = no/' "$P/etc/apptainer/apptainer.conf"
rm -rf "$T"

# The prefix outlives this checkout, so it takes along what it needs of it.
mkdir -p "$P/tool.new"
cp "$here/identity_namespace.py" "$P/"
cat > "$P/tool.new/apptainer" << TOOL
#!/bin/sh
case \$1 in
build) exec /usr/bin/env python3 "$P/identity_namespace.py" "$P/usr/bin/apptainer" "\$@" ;;
*) exec "$P/usr/bin/apptainer" "\$@" ;;
esac
TOOL
chmod +x "$P/tool.new/apptainer"
"$P/tool.new/apptainer" --version
mv "$P/tool.new" "$P/tool"
