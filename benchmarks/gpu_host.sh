#!/usr/bin/env bash
# Load-tests resnet50 and bert on Triton on the GPU of a bare host: no network, no docker, only Python and a folder of wheels.
# Python must be 3.11 or 3.12 (of numpy below 2, which Triton needs, there are no wheels for later ones), glibc 2.35 or newer.
#
#   benchmarks/gpu_host.sh WHEELS [OUT]        (OUT: gpu-results)
#
# Fill WHEELS on a machine with network, the same Python version, x86-64 or the host's architecture (some 4 GB):
#   pip download -d wheels --extra-index-url https://download.pytorch.org/whl/cu126 setuptools 'torch==2.9.1+cu126' '.[grpc,triton]'
#
# Environment: PYTHON (python3), PROFILES ("resnet50-mlperf bert-mlperf"), TARGET_QPS (the profiles' own), DURATION_S (60).
# OUT receives a virtual environment, a run directory for each profile, doctor.json and summary.md. Exit code 0 when
# all profiles ran, whatever their verdicts; 1 with one line that says what is wrong.
set -euo pipefail

die() {
    echo "gpu_host: $*" >&2
    exit 1
}

wheels=${1:-}
out=${2:-gpu-results}
python=${PYTHON:-python3}
duration_s=${DURATION_S:-60}
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
read -r -a profiles <<<"${PROFILES:-resnet50-mlperf bert-mlperf}"

[ -n "$wheels" ] || die "which folder has the wheels? usage: benchmarks/gpu_host.sh WHEELS [OUT]"
[ -d "$wheels" ] || die "$wheels: no such folder"
[ -n "$(find "$wheels" -maxdepth 1 -name '*.whl' -print -quit)" ] || die "$wheels: no wheels in it; the head of this script says how to fill it"
"$python" -c 'import sys; sys.exit(sys.version_info[:2] not in {(3, 11), (3, 12)})' || die "$python: Python 3.11 or 3.12 is needed; set PYTHON"
"$python" -c 'import platform, sys; name, version = platform.libc_ver(); sys.exit(name != "glibc" or [*map(int, version.split("."))] < [2, 35])' \
    || die "this host's C library is not glibc 2.35 or newer, which Triton's wheel needs"
gpus=$(nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader) || die "nvidia-smi does not work: install or repair the NVIDIA driver"
for profile in "${profiles[@]}"; do
    [ ! -e "$out/$profile" ] || die "$out/$profile is there already; choose another OUT"
done
mkdir -p "$out"
out=$(cd "$out" && pwd)
wheels=$(cd "$wheels" && pwd)
venv=$out/venv

echo "gpu_host: installing from $wheels"
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv" || die "no virtual environment could be made (package python3-venv)"
pip=("$venv/bin/python" -m pip --disable-pip-version-check install --quiet --no-index --find-links "$wheels")
"${pip[@]}" setuptools || die "$wheels lacks setuptools"
# Without isolation: the build would look for setuptools in an index again.
"${pip[@]}" --no-build-isolation "${repository}[grpc,triton]" || die "$wheels lacks what pip names above, for this Python and architecture"

"$venv/bin/python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' \
    || die "torch sees no GPU: WHEELS has a torch for the CPU, or for a newer CUDA than the driver's"
"$venv/bin/servebench" doctor --json >"$out/doctor.json" || die "this host cannot launch Triton; see: $venv/bin/servebench doctor"

for profile in "${profiles[@]}"; do
    echo "gpu_host: $profile"
    settings=(--set server.options.device=cuda --set "load.min_duration_s=$duration_s")
    [ -z "${TARGET_QPS:-}" ] || settings+=(--set "load.target_qps=$TARGET_QPS")
    code=0
    "$venv/bin/servebench" run "$profile" "${settings[@]}" --out "$out/$profile" || code=$?
    case $code in
        0 | 3 | 4 | 5) ;; # verdicts
        *) die "$profile could not be run (exit code $code); its log is in $out/$profile/server" ;;
    esac
done

GPUS=$gpus "$venv/bin/python" - "$out" "${profiles[@]}" <<'PYTHON' | tee "$out/summary.md"
import json, os, sys
from pathlib import Path

out, *profiles = sys.argv[1:]
documents = [json.loads(Path(out, profile, "run.json").read_text()) for profile in profiles]
for number, gpu in enumerate(os.environ["GPUS"].splitlines()):
    name, driver, memory = (word.strip() for word in gpu.split(","))
    print(f"- GPU {number}: {name}, {memory}, driver {driver}")
server, environment = documents[0]["server"], documents[0]["environment"]
print(f"- Triton {server['version']} ({server['distribution']}), torch {server['torch']}, numpy {server['numpy']}")
print(f"- servebench {documents[0]['version']}, Python {environment['python']}, {environment['cpu_model']}, {environment['cpus']} CPUs")
print()
print("| profile | device | verdict | target/s | completed/s | goodput/s | p50 ms | p99 ms | p99.9 ms | errors |")
print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
for document in documents:
    rates, counts, times = document["rates"], document["counts"], document["response_time"]["percentiles"]
    milliseconds = [f"{times[p] / 1e6:.2f}" if times.get(p) is not None else "-" for p in ("50", "99", "99.9")]
    speeds = [f"{rates[key]:.1f}" if rates.get(key) is not None else "-" for key in ("target_qps", "completed_qps", "goodput_qps")]
    failed = counts["issued"] - counts["ok"]
    row = [document["profile"]["name"], document["server"]["device"], document["verdict"], *speeds, *milliseconds, str(failed)]
    print(f"| {' | '.join(row)} |")
PYTHON
