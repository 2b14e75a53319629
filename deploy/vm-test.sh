#!/usr/bin/env bash
# Boots a real Debian under QEMU, without a network, installs what was built from this checkout, and lets happen to it
# what happens to devices: see docs/how-to/machine-tests.md.
#
#   deploy/vm-test.sh [--short] [--arch amd64|arm64] [--only NAME] [--cuts N] [--seed N] [--json] [--list]
#     --short      what CI runs: a boot, an activation, a hang, three power cuts; some four minutes
#     --arch       the machine's architecture, by default this machine's own
#     --only NAME  scenarios with NAME in their name (--list prints them); "a or b" for several
#     --cuts N     power cuts, 50 by default; a quarter of them in updates of the agent
#     --seed N     of the moments at which the power goes, 1 by default
#     --json       the results as JSON on stdout, everything else on stderr
#     --prepare    only bring the tools and make the image; what cannot be had is said on stdout, and the end is 1
#
# Needs root, Debian, and to fetch packages once: the image is kept in .cache/vm. Ends 0 only if every scenario passed.

set -euo pipefail
# shellcheck source=deploy/lib.sh
source "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
exec </dev/null
cd "$ROOT"

arch="" only="" cuts="" seed="" json=no short=no list=no prepare=no
while [ $# -gt 0 ]; do
    case "$1" in
    --arch | --only | --cuts | --seed) [ -n "${2:-}" ] || die "$1 needs a value" "deploy/vm-test.sh --help" ;;
    esac
    case "$1" in
    --arch) arch="$2" && shift ;;
    --only) only="$2" && shift ;;
    --cuts) cuts="$2" && shift ;;
    --seed) seed="$2" && shift ;;
    --short) short=yes ;;
    --json) json=yes ;;
    --list) list=yes ;;
    --prepare) prepare=yes ;;
    -h | --help)
        sed -n '2,15s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
        exit 0
        ;;
    *) die "unknown option $1" "deploy/vm-test.sh --help" ;;
    esac
    shift
done
for number in "$cuts" "$seed"; do
    case "$number" in *[!0-9]*) die "$number is no number" "deploy/vm-test.sh --help" ;; esac
done
if [ "$short" = yes ]; then
    cuts="${cuts:-3}"
    only="${only:-boot_offline or socket_activation or core_hung or power_cuts}"
fi
[ -n "$arch" ] || arch="$(dpkg --print-architecture 2>/dev/null || uname -m)"

missed="machines are not booted"
case "$arch" in
arm64) want_tool qemu-system-aarch64 qemu-system-arm "$missed" ;;
*) want_tool qemu-system-x86_64 qemu-system-x86 "$missed" ;;
esac
want_tool mmdebstrap mmdebstrap "$missed"
# The image of another architecture is made by running its own programs, which the kernel hands to QEMU.
if [ "$arch" != "$(dpkg --print-architecture 2>/dev/null)" ]; then
    case "$arch" in arm64) emulator=qemu-aarch64 ;; amd64) emulator=qemu-x86_64 ;; *) emulator="qemu-$arch" ;; esac
    formats=/proc/sys/fs/binfmt_misc
    if [ ! -e "$formats/$emulator" ]; then
        apt_install qemu-user-static binfmt-support || warn "no programs for $arch can be run here (package qemu-user-static)"
        [ -e "$formats/status" ] || mount -t binfmt_misc binfmt_misc "$formats" || warn "$formats cannot be mounted"
        [ -e "$formats/$emulator" ] || update-binfmts --enable "$emulator" || warn "no programs for $arch can be run here"
    fi
fi
[ "$short" = yes ] || want_tool swtpm swtpm "the scenario with a TPM is skipped"

ensure_venv "$ROOT/.venv" dev >&2
export EDGE_AGENT_VM_ARCH="$arch" EDGE_AGENT_VM_CUTS="$cuts" EDGE_AGENT_VM_SEED="$seed"
python="$ROOT/.venv/bin/python"
files=(tests/vm/test_vm.py tests/vm/test_vm_cuts.py tests/vm/test_vm_update.py)
reason="$("$python" -m tests.vm.image "$arch")"
if [ "$prepare" = yes ]; then
    [ -n "$reason" ] || exit 0
    printf '%s\n' "$reason"
    exit 1
fi
[ -z "$reason" ] || die "cannot boot machines: $reason"
if [ "$list" = yes ]; then
    "$python" -m pytest -q --collect-only "${files[@]}" | sed -n 's/^.*::test_//p'
    exit 0
fi

EDGE_AGENT_VM_ROWS="$(mktemp)"
export EDGE_AGENT_VM_ROWS
trap 'rm -f "$EDGE_AGENT_VM_ROWS"' EXIT
code=0
"$python" -m pytest -o cache_dir=.cache/pytest-vm -p no:xdist ${only:+-k "$only"} \
    "${files[@]}" >&2 || code=$?
[ "$json" = no ] || cat "$EDGE_AGENT_VM_ROWS"
exit "$code"
