#!/usr/bin/env bash
# Installs the edge agent as a service: Debian 12 and 13, Raspberry Pi OS, Ubuntu 22.04 and 24.04 (JetPack 6).
#
#   deploy/install.sh [OPTIONS]             install or upgrade; a second run changes nothing
#   deploy/install.sh --uninstall           all but the state (models, keys, journal) and the configuration
#   deploy/install.sh --uninstall --purge   these too
#
#     --offline WHEELHOUSE   no network: everything from this folder of wheels, the agent's own among them.
#                            Made on a machine of the same kind: pip wheel -w WHEELHOUSE "CLONE[device]"
#     --runtime NAMES        onnx, tflite, onnx,tflite or none; by default onnx, on 32-bit ARM tflite
#     --root DIR             into the root folder of an image; nothing is started
#     --files-only           with --root: no users, nothing enabled; for packages, and needs no root
#     --no-start             enable, but leave what runs as it is
#     --dry-run              say what would be done, and do nothing
#
#   For edge-agent-update.service, which does the rest itself:
#     --stage                make the environment, and nothing else; its name is the last line
#     --units VERSION        put the units and accounts of that environment; --keep-updater: but not the updater's own
#
# What is where: /opt/edge-agent/VERSION (a virtual environment) with the link /opt/edge-agent/current, which is switched
# when the new one works; the version before stays for a way back, and "steady" is the last one that proved itself. /etc/systemd/system/edge-agent*, users, groups,
# /etc/edge-agent/config.toml only where there is none, /usr/local/bin/edge-agent. /var/lib/edge-agent is never touched
# but by --purge. A run that was cut off is finished by the next one.

set -euo pipefail
umask 022
unset PYTHONPATH PYTHONHOME # of whoever calls this: they would be seen as installed
export LC_ALL=C PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PYTHONDONTWRITEBYTECODE=1 ORT_DISABLE_TELEMETRY=1

HOME_DIR=/opt/edge-agent
UNIT_DIR=/etc/systemd/system
DROPIN=$UNIT_DIR/edge-agent-core.service.d/50-device.conf
HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"

say() { printf '%s\n' "$*"; }
warn() { printf 'warning: %s\n' "$*" >&2; }
die() {
    printf 'error: %s\n' "$1" >&2
    [ -z "${2:-}" ] || printf '  hint: %s\n' "$2" >&2
    exit 1
}
has() { command -v "$1" >/dev/null 2>&1; }
usage() {
    printf 'error: %s\n  hint: deploy/install.sh --help\n' "$1" >&2
    exit 2
}

action=install purge=no wheelhouse="" runtime=auto root="" start=yes dry=no files_only=no
units="" keep_updater=no
while [ $# -gt 0 ]; do
    case "$1" in
    --offline | --runtime | --root | --units) [ -n "${2:-}" ] || usage "$1 needs a value" ;;
    esac
    case "$1" in
    --uninstall) action=uninstall ;;
    --purge) purge=yes ;;
    --offline) wheelhouse="$2" && shift ;;
    --runtime) runtime="$2" && shift ;;
    --root) root="$2" && shift ;;
    --no-start) start=no ;;
    --files-only) files_only=yes ;;
    --dry-run) dry=yes ;;
    --stage) action=stage ;;
    --units) action=units units="$2" && shift ;;
    --keep-updater) keep_updater=yes ;;
    -h | --help)
        sed -n '2,24s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
        exit 0
        ;;
    *) usage "unknown option $1" ;;
    esac
    shift
done
[ "$purge" = no ] || [ "$action" = uninstall ] || usage "--purge goes with --uninstall"
case "$runtime" in auto | onnx | tflite | none | onnx,tflite | tflite,onnx) ;; *) usage "unknown runtime $runtime" ;; esac
if [ -n "$root" ]; then
    [ -d "$root" ] || die "cannot install into $root: no such folder"
    root="$(cd "$root" && pwd)"
    [ "$root" != / ] || root=""
fi
if [ "$files_only" = yes ]; then
    [ -n "$root" ] || usage "--files-only goes with --root"
    case "$(ls -A "$root")" in "" | opt | "DEBIAN") ;; *) die "cannot use $root: it is not empty" ;; esac
elif [ "$(id -u)" -ne 0 ]; then
    die "cannot install: that takes root" "sudo $0"
fi

live=no # whether this is the running machine, under systemd
[ -n "$root" ] || [ ! -d /run/systemd/system ] || live=yes

# Inside an image that has a Python of its own that one is used, else the machine's: it must then be of the same version.
inside() {
    if [ -n "$root" ] && [ -x "$root/usr/bin/python3" ]; then chroot "$root" "$@"; else "$@"; fi
}
has_own_python() { [ -n "$root" ] && [ -x "$root/usr/bin/python3" ]; }

work="$(mktemp -d)"
mounted=() wheels_inside=""
clean_up() {
    local path
    for path in ${mounted[@]+"${mounted[@]}"}; do umount "$path" || warn "cannot unmount $path"; done
    [ -z "$wheels_inside" ] || rmdir "$wheels_inside" || true
    rm -rf "$work"
}
# mount_inside OPTIONS... FOLDER: for as long as this run lasts.
mount_inside() {
    mkdir -p "${*: -1}"
    mount "$@"
    mounted=("${*: -1}" ${mounted[@]+"${mounted[@]}"})
}
trap clean_up EXIT

# -- steps: first all that would be done is said, then it is done ------------------------------------------------------

stage=plan changes=0
# step TEXT CHECK DO: DO unless CHECK holds.
step() {
    if "$2"; then return 0; fi
    changes=$((changes + 1))
    if [ "$stage" = plan ]; then
        say "  - $1"
    else
        say "doing: $1"
        "$3"
    fi
}

# one_at_a_time: two installs at once would undo each other's work.
one_at_a_time() {
    has flock || return 0
    exec 9<"${root:-/}"
    flock -n 9 || die "cannot install: another install is under way"
}

# same_file FROM TO
same_file() { [ -f "$2" ] && [ ! -L "$2" ] && cmp -s "$1" "$2"; }

# put FROM TO: atomic, so that a cut leaves the old or the new one.
put() {
    mkdir -p "$(dirname "$2")"
    install -m 644 "$1" "$2.new"
    sync "$2.new"
    mv -f "$2.new" "$2"
}

# point LINK TARGET: the same for a link.
point() {
    mkdir -p "$(dirname "$1")"
    ln -sfn "$2" "$1.new"
    mv -fT "$1.new" "$1"
    sync "$(dirname "$1")"
}

# -- uninstall ---------------------------------------------------------------------------------------------------------

uninstall() {
    local path left=() state=() users=()
    for path in "$root$UNIT_DIR"/edge-agent*.service "$root$UNIT_DIR"/edge-agent*.socket "$root$UNIT_DIR"/edge-agent*.path \
        "$root$UNIT_DIR"/edge-agent.target "$root$UNIT_DIR"/edgeagent.slice "$root$UNIT_DIR"/*.wants/edge-agent* "$root$DROPIN" \
        "$root"/usr/lib/sysusers.d/edge-agent.conf "$root"/usr/lib/tmpfiles.d/edge-agent.conf "$root$HOME_DIR" \
        "$root"/run/edge-agent; do
        if [ -e "$path" ] || [ -L "$path" ]; then left+=("$path"); fi
    done
    path="$root/usr/local/bin/edge-agent"
    if [ -L "$path" ]; then case "$(readlink "$path")" in "$HOME_DIR"/*) left+=("$path") ;; esac; fi
    for path in "$root"/var/lib/edge-agent "$root"/var/lib/edge-agent-link "$root"/etc/edge-agent \
        "$root"/etc/credstore.encrypted/device-secret* "$root"/etc/credstore.encrypted/lost-device-secret* \
        "$root$UNIT_DIR"/edge-agent*.d/*.conf; do
        [ "$path" != "$root$DROPIN" ] || continue
        if [ -e "$path" ]; then state+=("$path"); fi
    done
    if [ "$purge" = yes ]; then
        left+=(${state[@]+"${state[@]}"})
        state=()
        for path in edge-agent edge-agent-link; do
            if grep -qs "^$path:" "$root/etc/passwd"; then users+=("$path"); fi
        done
    fi
    if [ "${#left[@]}" -eq 0 ] && [ "${#users[@]}" -eq 0 ]; then
        say "nothing to do: the edge agent is not installed"
    else
        say "removing:"
        if [ "$live" = yes ]; then say "  - stop and disable edge-agent.target"; fi
        if [ "${#left[@]}" -gt 0 ]; then printf '  - %s\n' "${left[@]}"; fi
        if [ "${#users[@]}" -gt 0 ]; then say "  - users ${users[*]}, group edge-agent-apps"; fi
        [ "$dry" = no ] || return 0
        if [ "$live" = yes ]; then
            systemctl disable --now --quiet edge-agent.target 2>/dev/null || true
            systemctl stop edge-agent-core.service edge-agent-link.service edge-agent-reboot.path edge-agent-update.path \
                edge-agent-update.service edge-agent-infer.socket edge-agent-admin.socket 2>/dev/null || true
        fi
        # The program last: what was cut off before that is seen as installed, and removed by the next run.
        if [ "${#left[@]}" -gt 0 ]; then rm -rf -- "${left[@]}"; fi
        rmdir "$root$UNIT_DIR"/edge-agent*.d 2>/dev/null || true
        for path in ${users[@]+"${users[@]}"}; do remove_user "$path"; done
        if [ "$purge" = yes ] && grep -qs '^edge-agent-apps:' "$root/etc/group"; then
            groupdel ${root:+--prefix "$root"} edge-agent-apps || warn "cannot remove group edge-agent-apps"
        fi
        if [ "$live" = yes ]; then
            systemctl daemon-reload
            systemctl reset-failed 'edge-agent*' 2>/dev/null || true
        fi
        say "removed"
    fi
    if [ "${#state[@]}" -gt 0 ]; then
        say "kept (removed by --purge): ${state[*]}"
        say "users and groups stay too, since the state is theirs"
    fi
}

remove_user() {
    userdel ${root:+--prefix "$root"} "$1" 2>/dev/null || warn "cannot remove user $1"
}

if [ "$action" = uninstall ]; then
    one_at_a_time
    uninstall
    exit 0
fi

# -- what is here ------------------------------------------------------------------------------------------------------

# A package's files and ours would be over each other.
if has dpkg-query && dpkg-query ${root:+--admindir="$root/var/lib/dpkg"} -W -f '${db:Status-Status}' edge-agent 2>/dev/null |
    grep -qx installed; then
    die "cannot install beside the package edge-agent" "apt-get remove edge-agent, or upgrade the package"
fi

has_own_python || [ -z "$root" ] || warn "$root has no Python yet: it must get the one that is used here"
python=""
for name in /usr/bin/python3 python3.13 python3.12 python3.11 python3.10 python3; do
    path="$(inside sh -c "command -v $name" 2>/dev/null || true)"
    [ -n "$path" ] || continue
    if inside "$path" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
        python="$path"
        break
    fi
done
[ -n "$python" ] || die "cannot install: there is no Python 3.10 or newer" "apt-get install python3 python3-venv"
inside "$python" -c 'import ensurepip, venv' 2>/dev/null ||
    die "cannot install: $python has no venv module" "apt-get install python3-venv"
read -r arch bits python_version <<<"$(inside "$python" -c '
import platform, struct
print(platform.machine(), struct.calcsize("P") * 8, ".".join(platform.python_version_tuple()[:2]))')"
# A 64-bit kernel under a 32-bit system says aarch64: what counts is what Python was built for.
case "$arch:$bits" in
x86_64:64 | aarch64:64) ;;
armv7l:32 | armv8l:32 | aarch64:32) arch=armv7l ;;
*) die "cannot install on $arch ($bits-bit): the agent is for x86_64, aarch64 and armv7" ;;
esac

if [ "$runtime" = auto ]; then
    runtime=onnx
    [ "$arch" != armv7l ] || runtime=tflite
fi
[ "$arch:$runtime" = "${arch#armv7l}:$runtime" ] || case "$runtime" in *onnx*)
    die "cannot install ONNX Runtime on 32-bit ARM: it does not exist for it" "--runtime tflite" ;;
esac

# JetPack's ONNX Runtime knows the GPU and comes from nowhere else: it is used as it is, and none is put over it.
system_packages=no own_onnx=""
own_onnx="$(inside "$python" -I -c '
from importlib.metadata import distributions
for one in distributions():
    name = (one.metadata["Name"] or "").lower().replace("_", "-")
    if name == "onnxruntime" or name.startswith("onnxruntime-"):
        print(name, one.version)
        break' 2>/dev/null || true)"
extras=(fast delivery)
case "$runtime" in *onnx*) if [ -n "$own_onnx" ]; then system_packages=yes; else extras+=(onnx); fi ;; esac
case "$runtime" in *tflite*) if [ "$arch" = armv7l ]; then extras+=(tflite); else extras+=(litert); fi ;; esac
if [ "$arch" = armv7l ]; then
    # numpy and psutil have no wheels there, Debian packages them.
    extras=(delivery tflite)
    [ "$runtime" != none ] || extras=(delivery)
    system_packages=yes
    inside "$python" -I -c 'import numpy, psutil' 2>/dev/null ||
        die "cannot install on 32-bit ARM without the system's numpy and psutil" "apt-get install python3-numpy python3-psutil"
fi

# -- where the agent comes from ----------------------------------------------------------------------------------------

share="$work/share"
if [ "$action" = units ]; then
    share="$root$HOME_DIR/$units/share/edge-agent" version="$units" identity="" from="$share"
    [ -d "$share/systemd" ] || die "cannot put the units of $units: $share holds none"
elif [ -n "$wheelhouse" ]; then
    [ -d "$wheelhouse" ] || die "cannot use the wheelhouse $wheelhouse: no such folder"
    wheelhouse="$(cd "$wheelhouse" && pwd)"
    wheel="$(find "$wheelhouse" -maxdepth 1 -name 'edge_agent-*.whl' | sort -V | tail -n 1)"
    [ -n "$wheel" ] || die "cannot use the wheelhouse $wheelhouse: the agent's wheel is not in it" \
        "on a machine of this kind: pip wheel -w $wheelhouse \"CLONE[device]\""
    version="$(basename "$wheel" | cut -d- -f2)"
    identity="$(cd "$wheelhouse" && sha256sum -- *.whl | sha256sum | cut -c1-64)"
    "$(has_own_python && command -v python3 || echo "$python")" - "$wheel" "$share" <<'UNPACK' ||
import pathlib, sys, zipfile
prefix, count = ".data/data/share/edge-agent/", 0
try:
    with zipfile.ZipFile(sys.argv[1]) as wheel:
        for name in wheel.namelist():
            if prefix in name and not name.endswith("/"):
                target = pathlib.Path(sys.argv[2], name.split(prefix, 1)[1])
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(wheel.read(name))
                count += 1
except (OSError, ValueError, zipfile.BadZipFile) as error:
    sys.exit(f"{error}")
sys.exit(0 if count else "it holds no units")
UNPACK
        die "cannot read $wheel" "make the wheelhouse anew"
    from="$wheelhouse"
else
    clone="$(dirname "$HERE")"
    [ -f "$clone/agent/cli/device.py" ] ||
        die "cannot find the agent: $clone is no clone of it" "--offline WHEELHOUSE"
    version="$(sed -n 's/^version = "\(.*\)"$/\1/p' "$clone/pyproject.toml" | head -n 1)"
    identity="$(cd "$clone" && find agent/ hw_profiles systemd deploy/config.toml deploy/install.sh pyproject.toml -type f \
        ! -path '*/__pycache__/*' ! -path '*.egg-info/*' -print0 | sort -z | xargs -0 sha256sum | sha256sum | cut -c1-64)"
    mkdir -p "$share/systemd"
    cp "$clone"/systemd/* "$share/systemd/"
    cp "$clone/deploy/config.toml" "$clone/deploy/install.sh" "$share/"
    from="$clone"
fi
[[ "$version" =~ ^[0-9][0-9A-Za-z.+]*$ ]] || die "cannot install version '$version': that is no version"

# Written into the environment last: what has this text is whole, and is what this run would make.
stamp="$(printf 'version %s\nsource %s\npython %s %s %s\nextras %s\nsystem-site-packages %s %s\n' "$version" "$identity" \
    "$python" "$python_version" "$arch" "${extras[*]}" "$system_packages" "$own_onnx")"
complete() { [ "$(cat "$root$HOME_DIR/$1/.installed" 2>/dev/null || true)" = "$stamp" ]; }
name="$version"
if [ -e "$root$HOME_DIR/$name/.installed" ] && ! complete "$name"; then
    # The same version of other contents is put beside it, never over what runs.
    name="$version.$(printf '%s' "$stamp" | sha256sum | cut -c1-8)"
fi
target="$root$HOME_DIR/$name"

need_mb=150
case "$runtime" in *onnx*) need_mb=$((need_mb + 250)) ;; esac
case "$runtime" in *tflite*) need_mb=$((need_mb + 150)) ;; esac

# -- the steps ---------------------------------------------------------------------------------------------------------

environment_there() { complete "$name"; }
make_environment() {
    local free build="$HOME_DIR/$name" requirement
    mkdir -p "$root$HOME_DIR"
    free="$(df -Pm "$root$HOME_DIR" | awk 'NR == 2 { print $4 }')"
    [ "$free" -ge "$need_mb" ] ||
        die "cannot install: $free MB free at $root$HOME_DIR, $need_mb are needed" "free some space"
    rm -rf "$target"
    if ! has_own_python; then
        build="$target"
    else
        # What runs in there, the trial of a runtime above all, needs these.
        [ -e "$root/proc/self" ] || mount_inside -t proc proc "$root/proc"
        [ -c "$root/dev/urandom" ] || mount_inside --bind /dev "$root/dev"
    fi
    # Whatever ends this run, a part of an environment is never kept.
    trap 'rm -rf "$target"; clean_up' EXIT
    local options=()
    [ "$system_packages" = no ] || options=(--system-site-packages)
    inside "$python" -m venv ${options[@]+"${options[@]}"} "$build" >"$work/log" 2>&1 ||
        fail_with_log "cannot make a virtual environment in $build"
    requirement="edge-agent[$(
        IFS=,
        echo "${extras[*]}"
    )]"
    if [ -n "$wheelhouse" ]; then
        local place="$wheelhouse"
        if has_own_python; then
            wheels_inside="$(mktemp -d "$root/tmp/edge-agent-wheels.XXXXXX")"
            mount_inside --bind "$wheelhouse" "$wheels_inside"
            place="${wheels_inside#"$root"}"
        fi
        # Nothing of pip's configuration: another source in it would be the network again.
        inside env PIP_CONFIG_FILE=/dev/null PIP_FIND_LINKS= PIP_EXTRA_INDEX_URL= "$build/bin/python" -m pip install --quiet --no-cache-dir \
            --no-index --find-links "$place" --only-binary :all: "$requirement==$version" >"$work/log" 2>&1 ||
            fail_with_log "cannot install $requirement from $wheelhouse"
    else
        local source="$target/.source"
        mkdir -p "$source/deploy"
        # A copy without what builds left behind, so that nothing is written into the clone and nothing old comes along.
        (cd "$clone" && tar -ch --exclude=__pycache__ --exclude='*.egg-info' agent hw_profiles systemd README.md LICENSE \
            pyproject.toml deploy/config.toml deploy/install.sh) | tar -x -C "$source"
        inside "$build/bin/python" -m pip install --quiet --no-cache-dir --prefer-binary \
            "$requirement @ file://$build/.source" >"$work/log" 2>&1 ||
            fail_with_log "cannot install $requirement: see above; is there a network, or a mirror set for pip?"
        rm -rf "$source"
    fi
    # The installer is not part of what runs: the next environment brings its own.
    inside "$build/bin/python" -m pip uninstall --quiet --yes pip setuptools >/dev/null 2>&1 || true
    trim_environment "$target"/lib/python*/site-packages
    if [ "$build" != "$HOME_DIR/$name" ]; then
        # Made elsewhere than it will be: its own path is in scripts, and in what is compiled.
        grep -rlIF "$target" "$target/bin" "$target/pyvenv.cfg" "$target"/lib/*/site-packages/*.dist-info 2>/dev/null |
            xargs -r -d '\n' sed -i "s|$root$HOME_DIR|$HOME_DIR|g"
        # The scripts are no longer those that pip wrote down.
        sed -i 's/^\(\(\.\.\/\)*bin\/[^,]*\),sha256=.*/\1,,/' "$target"/lib/python*/site-packages/*.dist-info/RECORD
        "$python" -m compileall -q -f -j 0 -s "$root" -p / "$target/lib" >/dev/null 2>&1 || true
    fi
    try_environment "$build"
    sync -f "$target"
    printf '%s\n' "$stamp" >"$work/stamp"
    put "$work/stamp" "$target/.installed"
    sync "$target" "$root$HOME_DIR"
    trap clean_up EXIT
}
# trim_environment SITE_PACKAGES: what no device needs. Tests of libraries, tools of model makers, accelerators that the
# agent does not drive, and symbols for debuggers, from files that no tool has rewritten since they were linked.
trim_environment() {
    local file
    find "$1/numpy" -type d -name tests -prune -exec rm -rf {} + 2>/dev/null || true
    rm -rf "$1/numpy/f2py" "$1/numpy/distutils" "$1/securesystemslib/_vendor/ed25519/test_data" \
        "$1/onnxruntime/tools" "$1/onnxruntime/transformers" "$1/onnxruntime/quantization" \
        "$1/ai_edge_litert/tools" "$1/ai_edge_litert/vendors" "$1/ai_edge_litert/aot" \
        "$1/ai_edge_litert/libLiteRtWebGpuAccelerator.so"
    rm -f "$1"/numpy/_core/_simd.*.so "$1"/numpy/_core/*_tests.*.so
    # Of its second interface, which the agent does not use; only where the package itself can do without.
    if grep -qs 'isfile(_litert_so)' "$1/ai_edge_litert/__init__.py"; then rm -f "$1/ai_edge_litert/libLiteRt.so"; fi
    find "$1" -type f \( -name '*.pyi' -o -name '*.pyx' -o -name '*.pxd' -o -name '*.c' -o -name '*.h' -o -name '*.a' \) -delete
    if ! has strip; then
        say "the symbols of the libraries stay, some 20 MB: there is no strip (package binutils)"
        return 0
    fi
    for file in "$1"/uvloop/*.so "$1"/cryptography/hazmat/bindings/*.so "$1"/ai_edge_litert/libpywrap*.so; do
        [ ! -f "$file" ] || strip --strip-unneeded "$file" 2>/dev/null || true
    done
}
fail_with_log() {
    tail -n 15 "$work/log" >&2
    die "$@"
}
# try_environment FOLDER: what cannot even start must never become "current".
try_environment() {
    local wanted=()
    case "$runtime" in *onnx*) wanted+=(onnx) ;; esac
    case "$runtime" in *tflite*) wanted+=(tflite) ;; esac
    inside "$1/bin/python" -I -m agent.cli.device --version >"$work/log" 2>&1 ||
        fail_with_log "cannot install: the new environment does not run"
    inside "$1/bin/python" -I -c '
import importlib.util, sys
import agent.trust.envelope
if importlib.util.find_spec("uvloop"):
    import uvloop
from agent.infer.runtimes.probe import Runtimes
states = Runtimes().states()
broken = [f"{name}: {states[name].reason}" for name in sys.argv[1:] if not states[name].usable]
sys.exit("; ".join(broken) or None)' ${wanted[@]+"${wanted[@]}"} >"$work/log" 2>&1 ||
        fail_with_log "cannot install: the runtime does not work here"
}

users_there() {
    [ "$files_only" = no ] || return 0
    grep -qs '^edge-agent:' "$root/etc/passwd" && grep -qs '^edge-agent-link:' "$root/etc/passwd" &&
        grep -qs '^edge-agent-apps:' "$root/etc/group"
}
make_users() {
    if has systemd-sysusers; then
        mkdir -p "$root/etc"
        systemd-sysusers ${root:+--root="$root"} "$root/usr/lib/sysusers.d/edge-agent.conf" 2>"$work/log" && users_there && return
    fi
    local user shell=/usr/sbin/nologin
    for user in edge-agent edge-agent-link; do
        grep -qs "^$user:" "$root/etc/passwd" ||
            useradd ${root:+--prefix "$root"} --system --user-group --no-create-home --home-dir "/var/lib/$user" --shell $shell "$user"
    done
    grep -qs '^edge-agent-apps:' "$root/etc/group" || groupadd ${root:+--prefix "$root"} --system edge-agent-apps
}

folders_there() { [ -d "$root/etc/edge-agent/hw_profiles" ] && { [ "$live" = no ] || [ -d /run/edge-agent ]; }; }
make_folders() {
    install -d -m 755 "$root/etc/edge-agent" "$root/etc/edge-agent/hw_profiles"
    [ "$live" = no ] || systemd-tmpfiles --create edge-agent.conf
}

# During the probation of an update the updater is that of the version before: a release does not judge itself.
is_kept() { [ "$keep_updater" = yes ] && case "$1" in */edge-agent-update.* | */edge-agent-try.*) true ;; *) false ;; esac; }
units_there() {
    local unit
    for unit in "$share"/systemd/*; do
        is_kept "$unit" || same_file "$unit" "$root$(place_of "$unit")" || return 1
    done
}
place_of() {
    case "$1" in
    *.sysusers) echo /usr/lib/sysusers.d/edge-agent.conf ;;
    *.tmpfiles) echo /usr/lib/tmpfiles.d/edge-agent.conf ;;
    *) echo "$UNIT_DIR/$(basename "$1")" ;;
    esac
}
put_units() {
    local unit
    for unit in "$share"/systemd/*; do
        is_kept "$unit" || same_file "$unit" "$root$(place_of "$unit")" || put "$unit" "$root$(place_of "$unit")"
    done
}

config_there() { [ -e "$root/etc/edge-agent/config.toml" ]; }
put_config() { put "$share/config.toml" "$root/etc/edge-agent/config.toml"; }

# In an image nothing is known of the device: there its own first start writes the drop-in.
dropin_text() {
    local program="$HOME_DIR/$name/bin/edge-agent"
    [ -x "$program" ] || program="$HOME_DIR/current/bin/edge-agent" # in a plan the new one is still to be made
    [ -x "$program" ] && "$program" units >"$work/dropin" 2>/dev/null
}
dropin_there() { [ -n "$root" ] || { dropin_text && same_file "$work/dropin" "$DROPIN"; }; }
put_dropin() {
    dropin_text
    put "$work/dropin" "$DROPIN"
}

command_there() { [ "$(readlink "$root/usr/local/bin/edge-agent" 2>/dev/null || true)" = "$HOME_DIR/current/bin/edge-agent" ]; }
put_command() { point "$root/usr/local/bin/edge-agent" "$HOME_DIR/current/bin/edge-agent"; }

before="$(readlink "$root$HOME_DIR/current" 2>/dev/null || true)"
way_back="$(readlink "$root$HOME_DIR/previous" 2>/dev/null || true)"
current_there() { [ "$(readlink "$root$HOME_DIR/current" 2>/dev/null || true)" = "$name" ]; }
switch() {
    [ -z "$before" ] || point "$root$HOME_DIR/previous" "$before"
    point "$root$HOME_DIR/current" "$name"
}

steady_there() { [ "$(readlink "$root$HOME_DIR/steady" 2>/dev/null || true)" = "$name" ]; }
put_steady() { point "$root$HOME_DIR/steady" "$name"; }

enabled() { [ "$files_only" = yes ] || [ -L "$root$UNIT_DIR/multi-user.target.wants/edge-agent.target" ]; }
enable() {
    if [ "$live" = yes ]; then
        systemctl daemon-reload
        systemctl enable --quiet edge-agent.target
    else
        point "$root$UNIT_DIR/multi-user.target.wants/edge-agent.target" "$UNIT_DIR/edge-agent.target"
    fi
}

# Both have been started since the last of their files came: so a run that was cut off before that is finished.
running() {
    [ "$live" = yes ] && [ "$start" = yes ] || return 0
    [ "$(systemctl show -P NeedDaemonReload edge-agent-core.service)" = no ] &&
        systemctl is-active --quiet edge-agent-infer.socket edge-agent-admin.socket &&
        started_since edge-agent-core.service && started_since edge-agent-link.service
}
started_since() {
    local at last
    at="$(systemctl show -P ActiveEnterTimestamp "$1")"
    last="$(stat -c %Z "$HOME_DIR/current" "$UNIT_DIR"/edge-agent* "$DROPIN" 2>/dev/null | sort -n | tail -n 1)"
    [ -n "$at" ] && systemctl is-active --quiet "$1" && [ "$(date -d "$at" +%s)" -ge "$last" ]
}
start_all() {
    systemctl daemon-reload
    if systemctl start edge-agent.target && systemctl restart edge-agent-core.service edge-agent-link.service; then return; fi
    case "$before" in "" | "$name")
        die "cannot start the service" "journalctl -u edge-agent-core -u edge-agent-link" ;;
    esac
    point "$HOME_DIR/current" "$before"
    if [ -n "$way_back" ]; then point "$HOME_DIR/previous" "$way_back"; else rm -f "$HOME_DIR/previous"; fi
    systemctl reset-failed edge-agent-core.service edge-agent-link.service 2>/dev/null || true
    systemctl restart edge-agent-core.service edge-agent-link.service || true
    die "cannot start version $name: $before is back in its place" "journalctl -u edge-agent-core -u edge-agent-link"
}

# What runs and the one before it stay.
others() {
    local path keep
    keep=" $name $(readlink "$root$HOME_DIR/previous" 2>/dev/null || true) "
    for path in "$root$HOME_DIR"/*/; do
        path="${path%/}"
        if [ -L "$path" ] || [ ! -e "$path/pyvenv.cfg" ]; then continue; fi
        [[ "$keep" == *" ${path##*/} "* ]] || printf '%s\n' "$path"
    done
}
none_left() { [ "$stage" = plan ] || [ -z "$(others)" ]; }
remove_others() { others | xargs -r -d '\n' rm -rf --; }

steps() {
    if [ "$action" = units ]; then
        step "install units, sysusers and tmpfiles into $UNIT_DIR and /usr/lib" units_there put_units
        step "create the users edge-agent and edge-agent-link, and the group edge-agent-apps" users_there make_users
        step "create /etc/edge-agent" folders_there make_folders
        return
    fi
    step "make $HOME_DIR/$name from $from, with ${extras[*]}" environment_there make_environment
    [ "$action" = install ] || return 0
    step "install units, sysusers and tmpfiles into $UNIT_DIR and /usr/lib" units_there put_units
    step "create the users edge-agent and edge-agent-link, and the group edge-agent-apps" users_there make_users
    step "create /etc/edge-agent" folders_there make_folders
    step "write the default /etc/edge-agent/config.toml" config_there put_config
    step "write what this device has into $DROPIN" dropin_there put_dropin
    step "switch $HOME_DIR/current${before:+ from $before} to $name" current_there switch
    step "link /usr/local/bin/edge-agent" command_there put_command
    step "enable edge-agent.target" enabled enable
    step "start core and link, and wait until core is ready" running start_all
    step "note that $name has proved itself" steady_there put_steady
    step "remove environments that nothing needs" none_left remove_others
}

if [ "$dry" = no ]; then one_at_a_time; fi
say "edge agent $version for $arch, Python $python_version${root:+, into $root}: what is to be done"
if [ "$system_packages" = yes ] && [ -n "$own_onnx" ]; then
    say "the system's own $own_onnx is used, so the environment sees the system's packages"
fi
steps
if [ "$changes" -eq 0 ]; then
    say "nothing to do: it is installed like that"
    [ "$action" != stage ] || say "staged: $name"
    exit 0
fi
[ "$dry" = no ] || exit 0
stage=work
steps
case "$action" in
stage) say "staged: $name" && exit 0 ;;
units) exit 0 ;;
esac
say "installed: $(du -sm "$target" | cut -f1) MB in $HOME_DIR/$name"
if [ "$live" = no ] && [ -z "$root" ]; then say "systemd does not run here: nothing was started"; fi
if [ "$live" = yes ]; then say "next: edge-agent status; edge-agent doctor"; fi
