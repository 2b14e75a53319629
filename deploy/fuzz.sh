#!/usr/bin/env bash
# Fuzzes what reads bytes that nobody vouches for: a long run of the targets that the tests run shortly.
#
#   deploy/fuzz.sh [TARGET...] [--seconds N] [--engine auto|atheris|mutation] [--seed N] [--list]
#     TARGET      names of targets (--list prints them); without any, all
#     --seconds   time for each target, 60 by default
#
# By atheris (coverage-guided) where it can be installed, else by a mutation loop of our own; the first line says which.
# Findings are kept in tests/fuzz/findings/ and replayed by the tests. See docs/how-to/fuzz.md.

set -euo pipefail
# shellcheck source=deploy/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
exec </dev/null
cd "$ROOT"

case "${1:-}" in
-h | --help)
    sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 0
    ;;
esac

ensure_venv "$ROOT/.venv" dev
python="$ROOT/.venv/bin/python"
version="$(python_version "$python")"
atheris="$ROOT/.cache/fuzz/atheris-py${version%.*}"

# Beside the environment, not in it: there is a wheel for few platforms only, and nothing else needs it.
if [ ! -d "$atheris/atheris" ]; then
    rm -rf "$atheris"
    if ! "$python" -m pip install --quiet --target "$atheris" --no-deps --only-binary=:all: atheris >/dev/null 2>&1; then
        rm -rf "$atheris"
        warn "atheris cannot be installed for Python $version on $(uname -m): the built-in mutation loop is used"
    fi
fi
[ ! -d "$atheris" ] || export PYTHONPATH="$atheris${PYTHONPATH:+:$PYTHONPATH}"

"$python" -m tests.fuzz "$@"
