#!/usr/bin/env bash
# Writes mosquitto's configuration for one tenant from the templates beside this script.
#
#   deploy/mosquitto/render.sh TENANT FOLDER [NAME=VALUE...]
#     FOLDER      where broker.conf, broker.acl, claims.conf and claims.acl go, and where certificates and keys are
#     PORT=8883 OPERATOR_PORT=8884 CLAIM_PORT=8885
#     HOST=localhost         the broker's name as the bridge of the claims broker reaches it: as in its certificate
#     DATA=/var/lib/mosquitto/TENANT CLAIM_DATA=/var/lib/mosquitto/TENANT-claims
#     AUTOSAVE=30            seconds between two saves to disk
#
# Certificates and keys are yours, or those of "edge-fleet init"; docs/how-to/broker.md names the files.

set -euo pipefail

fail() {
    printf 'error: cannot render: %s\n' "$1" >&2
    exit "${2:-1}"
}

[ $# -ge 2 ] || fail "a tenant and a folder are needed (see the head of $0)" 2
tenant="$1" folder="$2"
shift 2
[[ "$tenant" =~ ^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$ ]] || fail "'$tenant' is not the name of a tenant"
[ -d "$folder" ] || fail "there is no folder '$folder'"
folder="$(cd "$folder" && pwd)"

declare -A value=(
    [TENANT]="$tenant" [FOLDER]="$folder" [HOST]=localhost [PORT]=8883 [OPERATOR_PORT]=8884 [CLAIM_PORT]=8885
    [DATA]="/var/lib/mosquitto/$tenant" [CLAIM_DATA]="/var/lib/mosquitto/$tenant-claims" [AUTOSAVE]=30
)
for setting in "$@"; do
    name="${setting%%=*}"
    [[ "$setting" == *=* && -v value[$name] && "$name" != TENANT && "$name" != FOLDER ]] || fail "unknown: '$setting'" 2
    [[ "${setting#*=}" =~ ^[A-Za-z0-9_./:\ -]+$ ]] || fail "'$setting' has a character that mosquitto would misread"
    value[$name]="${setting#*=}"
done

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
program=()
for name in "${!value[@]}"; do
    program+=(-e "s|@$name@|${value[$name]}|g")
done
for template in "$here"/*.in; do
    target="$folder/$(basename "$template" .in)"
    sed "${program[@]}" "$template" >"$target.new"
    mv "$target.new" "$target"
    printf '%s\n' "$target"
done
