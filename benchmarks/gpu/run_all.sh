#!/usr/bin/env bash
# All that is to be known from a GPU, one part after the other, each with its own time limit and files of its own.
#
#   benchmarks/gpu/run_all.sh OUT [PART...]     parts: tests gather quantize probes check quick one-site four-sites all-tokens v2
#
# OUT gets a log and a JSON file of each part. PYTHON says which Python; FOLDER where captures are written, by default
# /dev/shm, so that a slow disk is not what is measured.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out=${1:?usage: benchmarks/gpu/run_all.sh OUT [PART...]}
shift
mkdir -p "$out"
python=${PYTHON:-python3}
folder=${FOLDER:-/dev/shm}
failed=()

part() { # NAME SECONDS COMMAND...
    local name=$1 seconds=$2
    shift 2
    echo "== $name, at most $seconds s"
    timeout --kill-after=30 "$seconds" "$@" >"$out/$name.log" 2>&1
    local code=$?
    tail -n 40 "$out/$name.log"
    [ $code -eq 0 ] || { failed+=("$name"); echo "== $name ended with $code"; }
}

capture() { # NAME SECONDS ARGUMENTS...
    local name=$1 seconds=$2
    shift 2
    part "$name" "$seconds" "$python" benchmarks/gpu/capture.py --folder "$folder" --json "$out/$name.json" "$@"
}

[ $# -gt 0 ] || set -- tests gather quantize probes check quick one-site four-sites all-tokens v2
for name in "$@"; do
    case $name in
        tests) part tests 300 "$python" -m pytest -q -p no:cacheprovider tests/gpu tests/kernels ;;
        gather) part gather 200 "$python" benchmarks/gpu/gather.py --json "$out/gather.json" ;;
        quantize) part quantize 200 "$python" benchmarks/gpu/quantize.py --json "$out/quantize.json" ;;
        probes) part probes 550 "$python" benchmarks/gpu/probes.py --json "$out/probes.json" ;;
        check) capture check 550 --check ;;
        quick) capture quick 300 --quick ;;
        v2) capture v2 300 --quick --runner v2 ;;
        one-site | four-sites | all-tokens) capture "$name" 590 --captures "$name" ;;
        *) echo "no part $name" >&2; exit 2 ;;
    esac
done
[ ${#failed[@]} -eq 0 ] || { echo "== failed: ${failed[*]}"; exit 1; }
