#!/usr/bin/env bash
# Runs the tests: all of them on the main Python, then all but the slow ones on every other Python 3.10 - 3.13 here.
#
#   deploy/test.sh [--quick | --full] [PYTEST OPTIONS]
#     --quick   the main Python only
#     --full    the slow tests on every Python too
#     the rest goes to pytest: deploy/test.sh --quick tests/store -k power
#
# Sets up what it needs on a fresh machine (see deploy/lib.sh). The exit status is 0 only if every run passed.

set -euo pipefail
# shellcheck source=deploy/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
exec </dev/null
cd "$ROOT"

scope=others
options=()
for argument in "$@"; do
    case "$argument" in
    --quick) scope=main ;;
    --full) scope=full ;;
    -h | --help)
        sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
        exit 0
        ;;
    *) options+=("$argument") ;;
    esac
done

want_tool age age "the tests that let another age implementation read our files are skipped"
want_tool curl curl "the tests that speak to the agent with curl are skipped"
want_tool systemd-analyze systemd "the tests of the units are skipped"
want_tool systemd-nspawn systemd-container "the tests that boot the units are skipped"

table=() # "version|runtime|outcome|seconds", a row for each run
status=0

# run_tests NAME PYTHON [OPTION...]: one row of the table; pytest's output as it comes.
run_tests() {
    local name="$1" python="$2" log from runtime outcome code=0
    shift 2
    runtime="$("$python" -c 'from importlib.metadata import version; print(version("onnxruntime"))' 2>/dev/null || echo none)"
    log="$(mktemp)"
    from="$(now)"
    say ""
    say "== Python $(python_version "$python"), ONNX Runtime $runtime"
    # The colour codes of a terminal would hide the counts; a cache of its own keeps one Python's failures apart.
    "$python" -m pytest --color=no -o "cache_dir=.cache/pytest-$name" "$@" ${options[@]+"${options[@]}"} 2>&1 |
        tee "$log" || code=${PIPESTATUS[0]}
    # "= 3 failed, 409 passed, 2 skipped in 61.20s (0:01:01) =", or without "=" when quiet.
    outcome="$(sed -nE 's/^=* ?(([0-9]+ [a-z]+(, )?)+) in [0-9.]+s.*$/\1/p' "$log" | tail -n 1)"
    [ -n "$outcome" ] || outcome="no result (pytest ended with $code)"
    rm -f "$log"
    [ "$code" -eq 0 ] || status=1
    table+=("$(python_version "$python")|$runtime|$outcome|$(elapsed "$from")")
}

ensure_venv "$ROOT/.venv" dev
main="$(python_version .venv/bin/python)"
run_tests main .venv/bin/python

if [ "$scope" != main ]; then
    slow=(-m "not slow")
    [ "$scope" != full ] || slow=()
    seen=" ${main%.*} "
    while read -r python; do
        version="$(python_version "$python")"
        short="${version%.*}"
        case "$short" in 3.10 | 3.11 | 3.12 | 3.13) ;; *) continue ;; esac
        [[ "$seen" != *" $short "* ]] || continue
        if ! python_can_venv "$python"; then
            warn "Python $version at $python cannot make environments: not tested (package python$short-venv)"
            continue
        fi
        seen+="$short "
        # In a subshell: what ends the set-up of one Python must not end the run.
        if (ensure_venv "$ROOT/.cache/venvs/py$short" test "$python"); then
            run_tests "py$short" ".cache/venvs/py$short/bin/python" ${slow[@]+"${slow[@]}"}
        else
            status=1
            table+=("$version|none|cannot be set up|0")
        fi
    done < <(pythons)
fi

say ""
printf '%-10s %-12s %9s  %s\n' Python runtime seconds result
for row in "${table[@]}"; do
    IFS='|' read -r version runtime outcome seconds <<<"$row"
    printf '%-10s %-12s %9s  %s\n' "$version" "$runtime" "$seconds" "$outcome"
done
# All runs together, in pytest's words; the last line.
printf '%s\n' "${table[@]}" | awk -F'|' -v status="$status" '
    { count = split($3, parts, ", ")
      for (i = 1; i <= count; i++) if (split(parts[i], part, " ") == 2 && part[1] + 0 > 0) sum[part[2]] += part[1] }
    END { printf "%d passed, %d failed", sum["passed"], sum["failed"] + sum["error"] + sum["errors"]
          if (sum["skipped"]) printf ", %d skipped", sum["skipped"]
          printf " (%d Python%s)%s\n", NR, NR == 1 ? "" : "s", status ? ": FAILED" : "" }'
exit "$status"
