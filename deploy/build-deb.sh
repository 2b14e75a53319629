#!/usr/bin/env bash
# Builds a Debian package of the edge agent for this machine's own architecture and Python, with its environment inside.
#
#   deploy/build-deb.sh [--runtime onnx|tflite|none|onnx,tflite] [--offline WHEELHOUSE] [--out DIR]
#
#     --out DIR    where the package goes; by default dist/ of the clone
#     the rest is as for deploy/install.sh, which makes what is inside
#
# Needs dpkg-deb and no root. SOURCE_DATE_EPOCH sets the time of every file; without it the time of the last commit is
# taken, so that the same wheels make the same package.

set -euo pipefail
umask 022
unset PYTHONPATH PYTHONHOME
# shellcheck source=deploy/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
exec </dev/null

runtime=auto out="$ROOT/dist" options=()
while [ $# -gt 0 ]; do
    case "$1" in
    --runtime | --offline | --out) [ -n "${2:-}" ] || die "$1 needs a value" "deploy/build-deb.sh --help" ;;
    esac
    case "$1" in
    --runtime) runtime="$2" && shift ;;
    --offline) options+=(--offline "$2") && shift ;;
    --out) out="$2" && shift ;;
    -h | --help)
        sed -n '2,11s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
        exit 0
        ;;
    *) die "unknown option $1" "deploy/build-deb.sh --help" ;;
    esac
    shift
done
has dpkg-deb || die "cannot build a package: there is no dpkg-deb" "this takes a Debian, Raspberry Pi OS or Ubuntu"

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
stage="$work/stage"
mkdir -p "$stage"
if [ -z "${SOURCE_DATE_EPOCH:-}" ]; then
    SOURCE_DATE_EPOCH="$(git -C "$ROOT" log -1 --format=%ct 2>/dev/null || date +%s)"
fi
export SOURCE_DATE_EPOCH

bash "$ROOT/deploy/install.sh" --root "$stage" --files-only --runtime "$runtime" ${options[@]+"${options[@]}"} 2>"$work/log" >&2 ||
    {
        cat "$work/log" >&2
        die "cannot make the environment"
    }

name="$(readlink "$stage/opt/edge-agent/current")"
version="${name%.[0-9a-f][0-9a-f][0-9a-f][0-9a-f][0-9a-f][0-9a-f][0-9a-f][0-9a-f]}"
python="$(sed -n 's/^python [^ ]* \([0-9.]*\) .*$/\1/p' "$stage/opt/edge-agent/$name/.installed")"
next="${python%.*}.$((${python#*.} + 1))"
architecture="$(dpkg --print-architecture)"
runtime="$(sed -n 's/^extras //p' "$stage/opt/edge-agent/$name/.installed")"

# Packages have their units below /usr/lib; /etc is the administrator's, with the configuration as a conffile.
mkdir -p "$stage/usr/lib/systemd" "$stage/usr/bin"
mv "$stage/etc/systemd/system" "$stage/usr/lib/systemd/system"
rm -rf "$stage/etc/systemd"
mv "$stage/usr/local/bin/edge-agent" "$stage/usr/bin/edge-agent"
rm -rf "${stage:?}/usr/local"
mkdir -p "$stage/usr/share/doc/edge-agent"
cp "$ROOT/LICENSE" "$stage/usr/share/doc/edge-agent/copyright"

mkdir "$stage/DEBIAN"
installed="$(du -sk --exclude=DEBIAN "$stage" | cut -f1)"
cat >"$stage/DEBIAN/control" <<CONTROL
Package: edge-agent
Version: $version
Section: misc
Priority: optional
Architecture: $architecture
Depends: python3 (>= $python), python3 (<< $next), python3-minimal, systemd (>= 249) | systemd-standalone-sysusers, adduser
Installed-Size: $installed
Maintainer: edge-agent <root@localhost>
Description: runtime agent for AI on small Linux devices
 Detects what the device can do, chooses the variant of a model by measuring,
 keeps models encrypted and serves them on a Unix socket. With: $runtime.
CONTROL
echo /etc/edge-agent/config.toml >"$stage/DEBIAN/conffiles"

cat >"$stage/DEBIAN/preinst" <<'SCRIPT'
#!/bin/sh
set -e
# Units of deploy/install.sh would hide those of the package.
if [ "$1" = install ] && [ -e /etc/systemd/system/edge-agent-core.service ]; then
    echo "error: cannot install beside deploy/install.sh: its units are in /etc/systemd/system" >&2
    echo "  hint: deploy/install.sh --uninstall first; models and configuration stay" >&2
    exit 1
fi
# Not an upgrade, though dpkg names a version to postinst where the configuration of an earlier one has stayed.
if [ "$1" = install ]; then
    mkdir -p /var/lib/misc
    touch /var/lib/misc/edge-agent.install
fi
SCRIPT

cat >"$stage/DEBIAN/postinst" <<'SCRIPT'
#!/bin/sh
set -e
[ "$1" = configure ] || exit 0
if command -v systemd-sysusers >/dev/null; then
    systemd-sysusers edge-agent.conf
else
    for user in edge-agent edge-agent-link; do
        adduser --system --group --no-create-home --home "/var/lib/$user" --quiet "$user"
    done
    addgroup --system --quiet edge-agent-apps
fi
dropin=/etc/systemd/system/edge-agent-core.service.d/50-device.conf
# Where systemd does not run an image is being made: there the first start writes it, on the device.
if [ -d /run/systemd/system ]; then
    systemd-tmpfiles --create edge-agent.conf
    mkdir -p "$(dirname $dropin)"
    edge-agent units >$dropin.new
    mv $dropin.new $dropin
    systemctl daemon-reload
fi
# Once: who has disabled it since wants it so.
if [ -e /var/lib/misc/edge-agent.install ]; then
    mkdir -p /etc/systemd/system/multi-user.target.wants
    ln -sfn /usr/lib/systemd/system/edge-agent.target /etc/systemd/system/multi-user.target.wants/edge-agent.target
    rm -f /var/lib/misc/edge-agent.install
    [ ! -d /run/systemd/system ] || systemctl daemon-reload
fi
if [ -d /run/systemd/system ] && [ -L /etc/systemd/system/multi-user.target.wants/edge-agent.target ]; then
    systemctl start edge-agent.target
    # The sockets stay: connections wait until core is back.
    systemctl restart edge-agent-core.service edge-agent-link.service
fi
SCRIPT

cat >"$stage/DEBIAN/prerm" <<'SCRIPT'
#!/bin/sh
set -e
[ "$1" = remove ] || exit 0
if [ -d /run/systemd/system ]; then
    systemctl stop edge-agent.target edge-agent-core.service edge-agent-link.service edge-agent-reboot.path \
        edge-agent-update.path edge-agent-update.service \
        edge-agent-infer.socket edge-agent-admin.socket || true
fi
SCRIPT

cat >"$stage/DEBIAN/postrm" <<'SCRIPT'
#!/bin/sh
set -e
case "$1" in
remove | purge | abort-install)
    rm -f /var/lib/misc/edge-agent.install
    ;;
esac
case "$1" in
remove | purge)
    rm -f /etc/systemd/system/multi-user.target.wants/edge-agent.target
    rm -f /etc/systemd/system/edge-agent-core.service.d/50-device.conf
    rmdir /etc/systemd/system/edge-agent-core.service.d 2>/dev/null || true
    rm -rf /run/edge-agent /opt/edge-agent
    [ ! -d /run/systemd/system ] || systemctl daemon-reload
    ;;
esac
# Models, keys and accounts go with purge only.
if [ "$1" = purge ]; then
    rm -rf /var/lib/edge-agent /var/lib/edge-agent-link /etc/edge-agent
    rm -f /etc/credstore.encrypted/device-secret* /etc/credstore.encrypted/lost-device-secret*
    for user in edge-agent edge-agent-link; do
        userdel $user 2>/dev/null || true
    done
    groupdel edge-agent-apps 2>/dev/null || true
fi
SCRIPT
chmod 755 "$stage"/DEBIAN/*inst "$stage"/DEBIAN/*rm

# Compiled files by their source's contents and not its time, as that becomes the same for all.
"$stage/opt/edge-agent/$name/bin/python" -m compileall -q -f --invalidation-mode unchecked-hash -s "$stage" -p / \
    "$stage/opt/edge-agent/$name/lib" >/dev/null 2>&1 || true
find "$stage" -newermt "@$SOURCE_DATE_EPOCH" -exec touch --no-dereference --date="@$SOURCE_DATE_EPOCH" {} +
mkdir -p "$out"
package="$out/edge-agent_${version}_$architecture.deb"
DPKG_DEB_COMPRESSOR_TYPE="${DPKG_DEB_COMPRESSOR_TYPE:-xz}" dpkg-deb --root-owner-group --build "$stage" "$package.new" >/dev/null
mv "$package.new" "$package"
printf '%s\n' "$package"
say "package $(du -m "$package" | cut -f1) MB, installed $((installed / 1024)) MB, with $runtime, for Python $python on $architecture"
