"""AIPerf and GuideLLM: load generators for language models, pointed at a server of OpenAI's chat completions API.

Both are held to one worker process, without streaming; they need some processes more, all on the same CPUs.
Both want a tokenizer from a model hub: they are given one of three words, made on this machine
and put where the hub's cache would hold it, and are told to stay offline.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.peers.base import GRACE_S, Arrivals, Load, PeerProtocol, PeerResult, Progress, Target, last_words, run_bounded
from benchmarks.peers.environment import CACHE, environment_python, make_environment
from benchmarks.peers.numbers import of_times
from servebench.errors import RunError

_SCRIPT = Path(__file__).parent / "scripts" / "make_tokenizer.py"
_TOKENIZER = "local/words"
_SNAPSHOT = Path("hub", "models--local--words", "snapshots", "1")
#: More queries a second than any of them sends: their data must not run out.
_MOST_QPS = 5_000


@dataclass(frozen=True, slots=True)
class AIPerf:
    """NVIDIA's successor of perf_analyzer for generative models."""

    name: str = "aiperf"
    protocols: frozenset[PeerProtocol] = frozenset({"openai"})
    arrivals: frozenset[Arrivals] = frozenset({"closed", "poisson", "constant"})

    def absent(self) -> str | None:
        return None

    def set_up(self, progress: Progress) -> None:
        _set_up(self.name, ("aiperf==0.13.0",), progress)

    def run(self, target: Target, load: Load) -> PeerResult:
        with tempfile.TemporaryDirectory(prefix="aiperf-") as scratch:
            data = Path(scratch) / "prompts.jsonl"
            data.write_text('{"text": "hello world"}\n', encoding="utf-8")
            argv = [str(environment_python(self.name).with_name("aiperf")), "profile", "-m", target.model, "--url", target.url]
            argv += ["--endpoint-type", "chat", "--input-file", str(data), "--custom-dataset-type", "single_turn"]
            argv += ["--tokenizer", _TOKENIZER, "--use-server-token-count", "--benchmark-duration", str(load.duration_s)]
            argv += ["--max-workers", "1", "--record-processors", "1", "--export-level", "records"]
            argv += ["--no-gpu-telemetry", "--no-server-metrics", "--ui", "none", "--artifact-dir", scratch]
            if load.rate_qps is None:
                argv += ["--concurrency", str(load.connections)]
            else:
                argv += ["--request-rate", str(load.rate_qps), "--arrival-pattern", load.arrivals]
            finished = run_bounded(
                self.name, argv, timeout_s=load.limit_s, cpus=load.cpus, env=_environment(self.name), cwd=Path(scratch)
            )
            summary, records = Path(scratch) / "profile_export_aiperf.json", Path(scratch) / "profile_export.jsonl"
            if not summary.exists() or not records.exists():
                raise RunError(f"aiperf did not measure: {last_words(finished.stdout + finished.stderr)}")
            return parse_aiperf(
                summary.read_text(encoding="utf-8"),
                records.read_text(encoding="utf-8"),
                cpu_s=finished.cpu_s,
                command=" ".join(argv),
            )


@dataclass(frozen=True, slots=True)
class GuideLLM:
    """The vLLM project's load generator."""

    name: str = "guidellm"
    protocols: frozenset[PeerProtocol] = frozenset({"openai"})
    arrivals: frozenset[Arrivals] = frozenset({"closed", "poisson", "constant"})

    def absent(self) -> str | None:
        return None

    def set_up(self, progress: Progress) -> None:
        _set_up(self.name, ("guidellm==0.8.1", "torch==2.13.0"), progress)

    def run(self, target: Target, load: Load) -> PeerResult:
        closed = f"kind=concurrent,streams={load.connections}"
        profile = closed if load.rate_qps is None else f"kind={load.arrivals},rate={load.rate_qps}"
        with tempfile.TemporaryDirectory(prefix="guidellm-") as scratch:
            data, report = Path(scratch) / "prompts.jsonl", Path(scratch) / "report.json"
            # Every line is used once.
            queries = round((2 * load.rate_qps if load.rate_qps else _MOST_QPS) * load.duration_s) + 100
            data.write_text('{"prompt": "hello world"}\n' * queries, encoding="utf-8")
            argv = [str(environment_python(self.name).with_name("guidellm")), "run"]
            argv += [
                "--backend",
                f"kind=openai_http,target={target.url},model={target.model},request_format={target.path},stream=false",
            ]
            argv += ["--profile", profile, "--constraint", f"kind=max_duration,seconds={load.duration_s}"]
            argv += ["--data", f"kind=json_file,path={data}", "--output", f"kind=json,path={report}", "--disable-console"]
            argv += ["--tokenizer", f"kind=huggingface_auto,model={CACHE / self.name / _SNAPSHOT}"]
            env = _environment(self.name) | {"GUIDELLM__MAX_WORKER_PROCESSES": "1"}
            finished = run_bounded(self.name, argv, timeout_s=load.limit_s, cpus=load.cpus, env=env, cwd=Path(scratch))
            if not report.exists():
                raise RunError(f"guidellm did not measure: {last_words(finished.stdout + finished.stderr)}")
            return parse_guidellm(report.read_text(encoding="utf-8"), cpu_s=finished.cpu_s, command=" ".join(argv))


def parse_aiperf(summary: str, records: str, *, cpu_s: float, command: str) -> PeerResult:
    """AIPerf's ``profile_export_aiperf.json`` and ``profile_export.jsonl``. `RunError` when no query was answered."""
    document: dict[str, Any] = json.loads(summary)
    lines = [json.loads(line) for line in records.splitlines()]
    latencies = [line["metrics"]["request_latency"] for line in lines if not line.get("error")]
    if not latencies:
        raise RunError("aiperf did not measure: none of its queries was answered")
    errors = int(document["error_request_count"]["avg"]) if document.get("error_request_count") else 0
    duration_s = float(document["benchmark_duration"]["avg"])
    completed = len(latencies)
    percentiles = of_times([round(latency["value"] * 1e6) for latency in latencies])  # ms
    return PeerResult(completed, errors, duration_s, completed / duration_s, percentiles, cpu_s, command)


def parse_guidellm(report: str, *, cpu_s: float, command: str) -> PeerResult:
    """GuideLLM's report. What was in flight when time was over is `incomplete` to it, neither answered nor failed."""
    (benchmark,) = json.loads(report)["benchmarks"]
    metrics = benchmark["metrics"]
    totals, found = metrics["request_totals"], metrics["request_latency"]["successful"]["percentiles"]
    completed, duration_s = int(totals["successful"]), float(benchmark["duration"])
    if not completed:
        raise RunError("guidellm did not measure: none of its queries was answered")
    percentiles = {p: round(found[key] * 1e9) for p, key in ((50.0, "p50"), (99.0, "p99"), (99.9, "p999"))}
    return PeerResult(completed, int(totals["errored"]), duration_s, completed / duration_s, percentiles, cpu_s, command)


def _set_up(name: str, requirements: Sequence[str], progress: Progress) -> None:
    directory = make_environment(name, requirements, progress)
    if not (directory / _SNAPSHOT / "tokenizer_config.json").exists():
        argv = [str(environment_python(name)), str(_SCRIPT), str(directory / _SNAPSHOT)]
        run_bounded(f"{name}'s tokenizer", argv, timeout_s=GRACE_S)
        reference = directory / _SNAPSHOT.parents[1] / "refs" / "main"
        reference.parent.mkdir(exist_ok=True)
        reference.write_text(_SNAPSHOT.name, encoding="ascii")


def _environment(name: str) -> dict[str, str]:
    """Settings that keep both on this machine; the environment's folder is their hub's home."""
    return {"HF_HOME": str(CACHE / name), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
