"""perf_analyzer: Triton's own load generator, in C++. The last wheel whose binary runs on an older glibc carries it.

Two libraries that the binary misses are NVIDIA's CUDA runtime and libb64; both come inside the
nvidia-pytriton wheel of our own environment, under names that its packaging made unique.
"""

from __future__ import annotations

import csv
import json
import shutil
import sysconfig
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.peers.base import Arrivals, Load, PeerProtocol, PeerResult, Progress, Target, last_words, run_bounded
from benchmarks.peers.environment import CACHE, environment_python, make_environment
from benchmarks.peers.numbers import of_times
from servebench.errors import RunError

_WHEEL = "tritonclient==2.46.0"
_BINARY = "tritonclient-2.46.0.data/data/bin/perf_analyzer"
_LIBRARIES = {"libcudart.so.12": "libcudart-*.so.12*", "libb64.so.0d": "libb64-*.so.0d"}
#: It repeats windows until three agree. They are made to agree: three windows, whatever they show.
_WINDOWS = 3
_ANY_SPREAD_PERCENT = 1_000_000
#: What a server that does not echo request ids makes of its asynchronous client, over HTTP and over gRPC.
_NEEDS_IDS = ("model id was not returned", "No valid requests recorded")
#: Of the synchronous client, which has a thread a connection, and of closed loops: as many as the other peers have
#: (`benchmarks.contest.CONNECTIONS`). On a busy machine, in eight rounds, closed loops of 4 and of 16 could not be told apart,
#: but of an open loop of 4,000/s 16 delivered 99.5 % seven times, 4 three times.
_MAX_THREADS = 16
#: Over HTTP closed loops have fewer: of 16, two in three had not ended after a minute instead of two seconds (the thread that
#: ends its windows seems not to get to run), and the third was no faster than those of 4.
_MAX_CLOSED_HTTP = 4


@dataclass(frozen=True, slots=True)
class PerfAnalyzer:
    """Open loops run its asynchronous client; a server that echoes no ids needs the synchronous one, where queries wait."""

    name: str = "perf_analyzer"
    protocols: frozenset[PeerProtocol] = frozenset({"kserve-http", "kserve-grpc"})
    arrivals: frozenset[Arrivals] = frozenset({"closed", "poisson", "constant"})
    folder: Path = CACHE / "perf_analyzer"

    def absent(self) -> str | None:
        if any(not self._library(pattern) for pattern in _LIBRARIES.values()):
            return "libcudart and libb64 are missing (pip install '.[triton]')"
        return None

    def set_up(self, progress: Progress) -> None:
        if (self.folder / "perf_analyzer").exists():
            return
        # The environment is for its pip alone; the wheel is unpacked, not installed.
        make_environment("perf_analyzer-pip", ("pip",), progress)
        progress(f"unpacking perf_analyzer from {_WHEEL} (once)")
        with tempfile.TemporaryDirectory(prefix="perf-analyzer-", dir=CACHE) as scratch:
            pip = [str(environment_python("perf_analyzer-pip")), "-m", "pip", "download", "--quiet", "--no-deps"]
            run_bounded("pip", [*pip, "--dest", scratch, _WHEEL], timeout_s=300)
            (wheel,) = Path(scratch).glob("*.whl")
            made = Path(scratch) / "made"
            (made / "lib").mkdir(parents=True)
            with zipfile.ZipFile(wheel) as archive, archive.open(_BINARY) as source, (made / "perf_analyzer").open("wb") as out:
                shutil.copyfileobj(source, out)
            (made / "perf_analyzer").chmod(0o755)
            for name, pattern in _LIBRARIES.items():
                (made / "lib" / name).symlink_to(self._library(pattern)[0])
            shutil.rmtree(self.folder, ignore_errors=True)
            made.rename(self.folder)

    def run(self, target: Target, load: Load) -> PeerResult:
        argv = [str(self.folder / "perf_analyzer"), "-m", target.binary_model or target.model, "-u", target.address]
        protocol = "grpc" if target.url.startswith("grpc://") else "http"
        argv += ["-i", protocol, "--input-data", "zero", "--shape", "INPUT:4"]
        argv += ["-p", str(round(load.duration_s / _WINDOWS * 1000)), "-r", str(_WINDOWS), "-s", str(_ANY_SPREAD_PERCENT)]
        threads = min(load.connections, _MAX_THREADS)
        if load.rate_qps is None:
            at_once = threads if protocol == "grpc" else min(threads, _MAX_CLOSED_HTTP)
            return self._run([*argv, "--concurrency-range", str(at_once)], load, percentiles=False)
        argv += ["--request-rate-range", str(load.rate_qps), "--request-distribution", load.arrivals]
        try:
            return self._run([*argv, "-a"], load, percentiles=True)
        except RunError as error:
            if not any(words in str(error) for words in _NEEDS_IDS):
                raise
        return self._run([*argv, "--sync", "--max-threads", str(threads)], load, percentiles=True)

    def _run(self, argv: list[str], load: Load, *, percentiles: bool) -> PeerResult:
        env = {"LD_LIBRARY_PATH": str(self.folder / "lib")}
        with tempfile.TemporaryDirectory(prefix="perf-analyzer-") as scratch:
            table, export = Path(scratch) / "table.csv", Path(scratch) / "export.json"
            argv = [*argv, "-f", str(table), *(["--profile-export-file", str(export)] if percentiles else [])]
            # Windows are padded, and repeated where one saw too little.
            finished = run_bounded(self.name, argv, timeout_s=2 * load.duration_s + load.limit_s, cpus=load.cpus, env=env)
            if not table.exists():
                raise RunError(f"perf_analyzer did not measure: {last_words(finished.stderr + finished.stdout)}")
            times_ns = exported_times_ns(export.read_bytes()) if percentiles else None
            return parse_table(
                table.read_text(encoding="utf-8"), finished.stdout, times_ns, cpu_s=finished.cpu_s, command=" ".join(argv)
            )

    def _library(self, pattern: str) -> list[Path]:
        return sorted(Path(sysconfig.get_path("platlib"), "nvidia_pytriton.libs").glob(pattern))


def parse_table(
    table: str, stdout: str, times_ns: np.ndarray[tuple[int], np.dtype[np.int64]] | None, *, cpu_s: float, command: str
) -> PeerResult:
    """The CSV table (times in us), the count of requests in the text, and the exported times if there are any.

    It ends at the first query that fails, so what it reports has no errors.
    """
    (row,) = csv.DictReader(table.splitlines())
    count = next((int(line.split(":")[1]) for line in stdout.splitlines() if line.strip().startswith("Request count:")), None)
    rate_qps = float(row["Inferences/Second"])
    if count is None or rate_qps == 0:
        raise RunError(f"perf_analyzer did not measure: {last_words(stdout)}")
    percentiles = {float(p): int(row[f"p{p} latency"]) * 1000 for p in (50, 99)} if times_ns is None else of_times(times_ns)
    return PeerResult(count, 0, count / rate_qps, rate_qps, percentiles, cpu_s, command)


def exported_times_ns(export: bytes) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Times from send to the last response of a ``--profile-export-file``, shape (requests,).

    It holds tensors as broken UTF-8.
    """
    requests = [
        request
        for experiment in json.loads(export.decode(errors="replace"))["experiments"]
        for request in experiment["requests"]
    ]
    times = [
        request["response_timestamps"][-1] - request["timestamp"] for request in requests if request["response_timestamps"]
    ]
    return np.array(times, dtype=np.int64)
