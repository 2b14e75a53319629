#!/usr/bin/env bash
# The agent's main job on real input, on this very machine, in about a minute: detect, pack, try, choose, encrypt, serve.
#
#   deploy/demo.sh [--keep]
#     --keep   leave the agent's folder behind and say where it is
#
# Sets up what it needs on a fresh machine (see deploy/lib.sh). Nothing outside this checkout and one folder of /tmp is
# written; the agent is stopped at the end, whatever happens.

set -euo pipefail
# shellcheck source=deploy/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
exec </dev/null
cd "$ROOT"

keep=no
for argument in "$@"; do
    case "$argument" in
    --keep) keep=yes ;;
    -h | --help)
        sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
        exit 0
        ;;
    *) die "unknown option $argument" "deploy/demo.sh --help" ;;
    esac
done

bold='' plain=''
if [ -t 1 ]; then bold=$'\033[1m' plain=$'\033[0m'; fi
chapter() { printf '\n%s%s%s\n' "$bold" "$*" "$plain"; }

need_tool curl curl
[ -x /usr/sbin/mosquitto ] || want_tool mosquitto mosquitto "the chapter on the fleet is left out"
ensure_venv "$ROOT/.venv" demo
bin="$ROOT/.venv/bin"

# A short path: a socket's has 107 bytes at most.
folder="$(mktemp -d /tmp/edge-agent-demo.XXXXXX)"
export EDGE_AGENT_STATE_DIR="$folder/state" EDGE_AGENT_RUN_DIR="$folder/run" EDGE_AGENT_CONFIG="$folder/etc/config.toml"
mkdir "$folder/etc"
: >"$EDGE_AGENT_CONFIG"
socket="$EDGE_AGENT_RUN_DIR/infer.sock"
core=""
others=() # link and the brokers

stop_core() {
    [ -n "$core" ] || return 0
    kill -TERM "$core" 2>/dev/null || true
    local code=0
    wait "$core" || code=$?
    core=""
    return "$code"
}
# shellcheck disable=SC2317  # called by the trap
clean_up() {
    local code=$?
    [ -z "$core" ] || { kill -KILL "$core" 2>/dev/null || true; }
    for process in ${others[@]+"${others[@]}"}; do kill -TERM "$process" 2>/dev/null || true; done
    # Before their folder goes; mosquitto 2.0.11 sometimes aborts when it is told to end, which the shell would tell.
    { wait ${others[@]+"${others[@]}"} || true; } 2>/dev/null
    if [ "$code" -ne 0 ] && [ -s "$folder/core.log" ]; then
        echo "the agent's log:" >&2
        tail -n 20 "$folder/core.log" >&2
    fi
    if [ "$keep" = yes ]; then echo "kept: $folder"; else rm -rf "$folder"; fi
}
trap clean_up EXIT

ready() { [ "$(curl -s -o /dev/null -w '%{http_code}' --unix-socket "$socket" http://edge/v2/health/ready)" = 200 ]; }
start_core() {
    "$bin/edge-agent" core 2>>"$folder/core.log" &
    core=$!
    for _ in $(seq 200); do
        ready && return 0
        kill -0 "$core" 2>/dev/null || die "the agent did not start"
        sleep 0.05
    done
    die "the agent did not become ready within 10 s"
}

chapter "1. What is this device?"
"$bin/edge-agent" detect

chapter "2. Six variants of one model for two runtimes, made and measured on the operator's side"
"$bin/edge-fleet" pack deploy/demo/digits.onnx --calibrate deploy/demo/digits-calibrate.npz \
    --golden deploy/demo/digits-golden.npz --metric cosine --threshold 0.99 \
    --add deploy/demo/digits-fp32.tflite --add deploy/demo/digits-int8.tflite \
    --labels deploy/demo/digits-labels.txt -o "$folder/digits.edgemodel"

chapter "3. The agent tries each of them here, and keeps them encrypted"
start_core
"$bin/edge-agent" models add "$folder/digits.edgemodel"

chapter "4. Real handwritten digits, never seen in training"
"$bin/python" deploy/demo/classify.py picture "$folder/request.json"
echo "the same by curl, over the Unix socket:"
curl -sS --fail-with-body --unix-socket "$socket" http://edge/v2/models/digits/infer -d "@$folder/request.json" |
    "$bin/python" deploy/demo/classify.py answer
"$bin/python" deploy/demo/classify.py all "$socket" "$folder/digits.edgemodel"

chapter "5. Power cut (SIGKILL), and back from the encrypted store"
kill -KILL "$core"
wait "$core" 2>/dev/null || true
core=""
start_core
curl -sS --fail-with-body --unix-socket "$socket" http://edge/v2/models/digits/infer -d "@$folder/request.json" |
    "$bin/python" deploy/demo/classify.py answer
"$bin/edge-agent" store verify

chapter "6. Does any of it lie in the clear?"
"$bin/python" deploy/demo/leaks.py "$folder/digits.edgemodel" "$EDGE_AGENT_STATE_DIR"

mosquitto="$(PATH="$PATH:/usr/sbin" command -v mosquitto || true)"
if [ -n "$mosquitto" ]; then
    chapter "7. A fleet: the device asks to join, an operator lets it in and commands it, by MQTT over TLS"
    # shellcheck source=deploy/demo/fleet.sh
    source deploy/demo/fleet.sh
fi

chapter "8. Stop"
stop_core
echo "the agent drained and stopped with status 0; $(du -sh "$EDGE_AGENT_STATE_DIR" | cut -f1) of encrypted state"
