# shellcheck shell=bash
# Set-up shared by deploy/demo.sh, deploy/test.sh and .ci/run. To be sourced by bash, from any folder.
#
# It finds a Python, makes virtual environments below the checkout, installs what pyproject.toml asks for, and brings
# system packages when it may. Everything is skipped when it is there already: a second run takes a second.

set -euo pipefail

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export ROOT
# ONNX Runtime 1.32 and newer would otherwise write to the home folder.
export ORT_DISABLE_TELEMETRY=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1

say() { printf '%s\n' "$*" >&2; }
warn() { printf 'warning: %s\n' "$*" >&2; }
die() {
    printf 'error: %s\n' "$1" >&2
    [ -z "${2:-}" ] || printf '  hint: %s\n' "$2" >&2
    exit 1
}

is_root() { [ "$(id -u)" -eq 0 ]; }
has() { command -v "$1" >/dev/null 2>&1; }

# -- system packages -------------------------------------------------------------------------------------------------

# apt_install PACKAGE...: quiet unless it fails. 1 when it cannot be done here (no root, no apt, no network).
apt_install() {
    is_root && has apt-get || return 1
    local log
    log="$(mktemp)"
    local options=(-y -qq --no-install-recommends -o DPkg::Lock::Timeout=120)
    if DEBIAN_FRONTEND=noninteractive apt-get install "${options[@]}" "$@" >"$log" 2>&1 </dev/null ||
        # The lists may be missing or stale: a fresh image has none.
        { apt-get update -qq >"$log" 2>&1 </dev/null &&
            DEBIAN_FRONTEND=noninteractive apt-get install "${options[@]}" "$@" >>"$log" 2>&1 </dev/null; }; then
        rm -f "$log"
        return 0
    fi
    tail -n 5 "$log" >&2
    rm -f "$log"
    return 1
}

# want_tool COMMAND PACKAGE WHAT_IS_MISSED: bring a tool that is useful but not needed.
want_tool() {
    has "$1" && return 0
    apt_install "$2" && has "$1" && return 0
    warn "no '$1' (package $2): $3"
}

# need_tool COMMAND PACKAGE: bring a tool that nothing works without.
need_tool() {
    has "$1" && return 0
    apt_install "$2" && has "$1" && return 0
    die "cannot go on: '$1' is missing" "as root: apt-get install $2"
}

# -- Pythons ---------------------------------------------------------------------------------------------------------

# python_version PYTHON: "3.11.7"; nothing when it does not run (an unselected pyenv shim) or is older than 3.10.
python_version() {
    "$1" -c 'import sys; v = sys.version_info; v >= (3, 10) and print("%d.%d.%d" % v[:3])' 2>/dev/null </dev/null || true
}

# python_can_venv PYTHON: Debian ships venv without what it needs to work.
python_can_venv() { "$1" -c 'import ensurepip, venv' >/dev/null 2>&1 </dev/null; }

# pythons: a path for each Python >= 3.10 of this machine, one a line, the default one first.
pythons() {
    local minor name path
    for name in python3 python3.13 python3.12 python3.11 python3.10; do
        path="$(command -v "$name" 2>/dev/null || true)"
        [ -n "$path" ] && [ -n "$(python_version "$path")" ] && printf '%s\n' "$path"
    done
    for minor in 13 12 11 10; do
        for path in "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3."$minor".*/bin/python3 \
            "/usr/bin/python3.$minor" "/usr/local/bin/python3.$minor"; do
            [ -x "$path" ] && [ -n "$(python_version "$path")" ] && printf '%s\n' "$path"
        done
    done
    return 0
}

# choose_python: the first that can make environments; where none can, the default one is given what it lacks.
choose_python() {
    local path first="" short
    while read -r path; do
        [ -n "$first" ] || first="$path"
        if python_can_venv "$path"; then
            printf '%s\n' "$path"
            return 0
        fi
    done < <(pythons)
    if [ -z "$first" ]; then
        apt_install python3 python3-venv || true
        first="$(command -v python3 || true)"
        if [ -z "$first" ] || [ -z "$(python_version "$first")" ]; then
            die "cannot find Python 3.10 or newer" "as root: apt-get install python3 python3-venv"
        fi
    fi
    if ! python_can_venv "$first"; then
        short="$(python_version "$first" | cut -d. -f1,2)"
        apt_install python3-venv "python$short-venv" || apt_install python3-venv || true
        python_can_venv "$first" ||
            die "cannot make a virtual environment: $first has no venv" "as root: apt-get install python3-venv"
    fi
    printf '%s\n' "$first"
}

# -- environments ----------------------------------------------------------------------------------------------------

# ensure_venv FOLDER EXTRAS [PYTHON]: an environment with this checkout, editable, and "EXTRAS" of pyproject.toml.
# Nothing is done while pyproject.toml, the extras and the Python are those of the last time.
ensure_venv() {
    local folder="$1" extras="$2" python="${3:-}" stamp wanted log
    mkdir -p "$ROOT/.cache"
    # One at a time: a demo and a test run started together would both install.
    if has flock; then
        exec 9>"$ROOT/.cache/venv.lock"
        flock 9
    fi
    if [ -z "$(python_version "$folder/bin/python")" ]; then
        [ -n "$python" ] || python="$(choose_python)"
        say "making ${folder#"$ROOT"/} with Python $(python_version "$python")"
        "$python" -m venv --clear "$folder" </dev/null
    fi
    stamp="$folder/.installed-${extras//,/+}"
    wanted="$(python_version "$folder/bin/python") $ROOT $(cksum <"$ROOT/pyproject.toml")"
    if [ "$(cat "$stamp" 2>/dev/null || true)" != "$wanted" ]; then
        say "installing [$extras] into ${folder#"$ROOT"/}"
        log="$(mktemp)"
        if ! "$folder/bin/python" -m pip install --quiet --editable "${ROOT}[$extras]" >"$log" 2>&1 </dev/null; then
            tail -n 15 "$log" >&2
            die "cannot install [$extras] into $folder" "see above; is there a network, or a mirror set for pip?"
        fi
        rm -f "$log"
        printf '%s\n' "$wanted" >"$stamp"
    fi
    if has flock; then exec 9>&-; fi
}

# -- tables ----------------------------------------------------------------------------------------------------------

# now: seconds with a fraction, to subtract. Locale and bash version make no difference.
now() { date +%s.%N; }
elapsed() { awk -v from="$1" -v to="$(now)" 'BEGIN { printf "%.1f", to - from }'; }
