#!/usr/bin/env bash
# Runs the tests: all of them on the main Python but those that take minutes each, then on every other Python 3.10 - 3.13
# here all but the slow ones and most of those that drive whole processes, with fewer examples of each property.
#
#   deploy/test.sh [--quick | --full] [PYTEST OPTIONS]
#     --quick   the main Python only
#     --full    every test, and on every Python
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
        sed -n '2,10s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
        exit 0
        ;;
    *) options+=("$argument") ;;
    esac
done

[ -x /usr/sbin/mosquitto ] || want_tool mosquitto mosquitto "the tests of the link and the fleet are skipped"
want_tool age age "the tests that let another age implementation read our files are skipped"
want_tool curl curl "the tests that speak to the agent with curl are skipped"
want_tool faketime faketime "the tests with a clock that is wrong are skipped"
want_tool systemd-analyze systemd "the tests of the units are skipped"
want_tool systemd-nspawn systemd-container "the tests that boot the units are skipped"
want_tool swtpm swtpm "the test that seals with a TPM is skipped"
want_tool swtpm_ioctl swtpm-tools "the test that seals with a TPM is skipped"
want_tool tpm2_getcap tpm2-tools "the test that seals with a TPM is skipped" # brings what systemd loads of the TPM's libraries

table=() # "version|runtime|outcome|seconds", a row for each run
status=0
ran=no # whether any test was found at all

# The whole suite is shared out, file by file, among twice as many processes as there are cores: half of its time is
# waiting for processes and for fsync. Not when something of pytest's was asked for: a debugger and -s want one process,
# and a few tests start faster so.
parallel=()
calm=()
cores="$(nproc)"
if [ "${#options[@]}" -eq 0 ] && [ "$cores" -gt 1 ]; then
    parallel=(-n "$((cores < 4 ? cores * 2 : 8))" --dist loadfile)
    calm=(-n 2 --dist loadfile)
fi
forgiven=3 # that many failures of one run may be repeated
most=" and not long"
[ "$scope" != full ] || most=""

# run_pytest NAME PYTHON [OPTION...]: its output as it comes; sets outcome and returns pytest's status.
run_pytest() {
    local name="$1" python="$2" log code=0
    shift 2
    log="$(mktemp)"
    # The colour codes of a terminal would hide the counts; a cache of its own keeps one Python's failures apart.
    "$python" -m pytest --color=no -o "cache_dir=.cache/pytest-$name" "$@" ${options[@]+"${options[@]}"} 2>&1 |
        tee "$log" || code=${PIPESTATUS[0]}
    # "= 3 failed, 409 passed, 2 skipped in 61.20s (0:01:01) =", or without "=" when quiet.
    outcome="$(sed -nE 's/^=* ?(([0-9]+ [a-z]+(, )?)+) in [0-9.]+s.*$/\1/p' "$log" | tail -n 1)"
    [ -n "$outcome" ] || outcome="no result (pytest ended with $code)"
    rm -f "$log"
    return "$code"
}

# run_tests NAME PYTHON LABEL [OPTION...]: one row of the table.
run_tests() {
    local name="$1" python="$2" label="$3" from version runtime outcome="" first failed code=0
    shift 3
    version="$(python_version "$python")"
    runtime="$("$python" -c 'from importlib.metadata import version; print(version("onnxruntime"))' 2>/dev/null || echo none)"
    from="$(now)"
    say ""
    say "== Python $version, ONNX Runtime $runtime, $label"
    run_pytest "$name" "$python" "$@" || code=$?
    # Thousands of tests beside each other on a machine that others load as well: a few that failed are run once more,
    # alone. What fails again has failed; what does not is told by name above and counted below, for somebody to look at.
    failed="$(awk -v RS=', ' '$2 ~ /^(failed|errors?)$/ { sum += $1 } END { print sum + 0 }' <<<"$outcome")"
    if [ "$code" -eq 1 ] && [ "${#parallel[@]}" -gt 0 ] && [ "$failed" -gt 0 ] && [ "$failed" -le "$forgiven" ]; then
        first="$outcome"
        code=0
        say "-- once more, alone: those that failed"
        run_pytest "$name" "$python" --last-failed --last-failed-no-failures=none -p no:xdist "${@:1:2}" || code=$?
        if [ "$code" -eq 0 ]; then
            first="$(sed -E 's/[0-9]+ (failed|errors?)(, )?//g; s/, $//' <<<"$first")"
            outcome="$failed passed only alone, $first"
        else
            outcome="$first"
        fi
    fi
    # 5: nothing of what was asked for is in this part.
    [ "$code" -eq 5 ] || ran=yes
    [ "$code" -eq 0 ] || [ "$code" -eq 5 ] || status=1
    table+=("$version|$runtime|$label|$outcome|$(elapsed "$from")")
}

# run_suite NAME PYTHON quick|all
run_suite() {
    if [ "$3" = quick ]; then
        run_tests "$1" "$2" "quick" -m "not slow and not long and not main_only" ${parallel[@]+"${parallel[@]}"}
        return
    fi
    if [ "${#parallel[@]}" -eq 0 ]; then
        run_tests "$1" "$2" all ${most:+-m "not long"}
        return
    fi
    run_tests "$1" "$2" "not slow" -m "not slow$most" ${parallel[@]+"${parallel[@]}"}
    # The slow ones time and kill: few at a time.
    run_tests "$1" "$2" slow -m "slow$most" "${calm[@]}"
}

ensure_venv "$ROOT/.venv" dev
main="$(python_version .venv/bin/python)"
run_suite main .venv/bin/python all

if [ "$scope" != main ]; then
    part=quick
    [ "$scope" != full ] || part=all
    [ "$scope" = full ] || export EDGE_AGENT_TEST_EXAMPLES="${EDGE_AGENT_TEST_EXAMPLES:-25}"
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
            run_suite "py$short" ".cache/venvs/py$short/bin/python" "$part"
        else
            status=1
            table+=("$version|none|set-up|cannot be set up|0")
        fi
    done < <(pythons)
fi

if [ "$ran" = no ] && [ "$status" -eq 0 ]; then
    warn "no test was found"
    status=5
fi
say ""
printf '%-10s %-12s %-9s %9s  %s\n' Python runtime tests seconds result
for row in "${table[@]}"; do
    IFS='|' read -r version runtime label outcome seconds <<<"$row"
    printf '%-10s %-12s %-9s %9s  %s\n' "$version" "$runtime" "$label" "$seconds" "$outcome"
done
# All runs together, in pytest's words; the last line.
printf '%s\n' "${table[@]}" | awk -F'|' -v status="$status" '
    { seen[$1]; count = split($4, parts, ", ")
      for (i = 1; i <= count; i++) if (split(parts[i], part, " ") > 1 && part[1] + 0 > 0) sum[part[3] == "" ? part[2] : "alone"] += part[1] }
    END { printf "%d passed, %d failed", sum["passed"], sum["failed"] + sum["error"] + sum["errors"]
          if (sum["alone"]) printf ", %d passed only alone", sum["alone"]
          if (sum["skipped"]) printf ", %d skipped", sum["skipped"]
          for (python in seen) pythons++
          printf " (%d Python%s)%s\n", pythons, pythons == 1 ? "" : "s", status ? ": FAILED" : "" }'
exit "$status"
