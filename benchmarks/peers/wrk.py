"""wrk: the fastest closed loop in common use, in C over epoll."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers.base import Arrivals, Load, PeerProtocol, PeerResult, Progress, Target, last_words, run_bounded
from servebench.errors import RunError


@dataclass(frozen=True, slots=True)
class Wrk:
    """One thread."""

    name: str = "wrk"
    protocols: frozenset[PeerProtocol] = frozenset({"kserve-http", "openai"})
    arrivals: frozenset[Arrivals] = frozenset({"closed"})

    def absent(self) -> str | None:
        return None if shutil.which("wrk") else "not on the PATH (apt install wrk)"

    def set_up(self, progress: Progress) -> None:
        pass

    def run(self, target: Target, load: Load) -> PeerResult:
        with tempfile.TemporaryDirectory(prefix="wrk-") as scratch:
            script = Path(scratch) / "query.lua"
            script.write_text(wrk_script(target), encoding="utf-8")
            # wrk knows whole seconds only.
            argv = [
                "wrk",
                "-t1",
                f"-c{load.connections}",
                f"-d{max(1, round(load.duration_s))}s",
                "-s",
                str(script),
                target.url + target.path,
            ]
            finished = run_bounded(self.name, argv, timeout_s=load.limit_s, cpus=load.cpus)
        return parse_wrk(finished.stdout, cpu_s=finished.cpu_s, command=" ".join(argv))


def wrk_script(target: Target) -> str:
    """wrk's Lua script: the query, and a last line for `parse_wrk`."""
    return "\n".join(
        [
            'wrk.method = "POST"',
            f"wrk.body = [==[{target.body.decode()}]==]",
            *(f'wrk.headers["{name}"] = "{value}"' for name, value in target.headers),
            "function done(summary, latency)",
            "  local e = summary.errors",
            "  local failed = e.connect + e.read + e.write + e.timeout + e.status",
            "  local us = {latency:percentile(50), latency:percentile(99), latency:percentile(99.9)}",
            "  local said = {summary.requests, summary.duration, failed, us[1], us[2], us[3]}",
            '  io.write("RESULT " .. table.concat(said, " ") .. "\\n")',
            "end",
            "",
        ]
    )


def parse_wrk(output: str, *, cpu_s: float, command: str) -> PeerResult:
    """wrk's output with our last line. `RunError` when there is none. ``summary.requests`` counts failed replies too."""
    for line in output.splitlines():
        match line.split():
            case ["RESULT", *numbers]:
                requests, duration_us, failed, p50_us, p99_us, p999_us = map(int, numbers)
                completed, duration_s = requests - failed, duration_us / 1e6
                percentiles = {50.0: p50_us * 1000, 99.0: p99_us * 1000, 99.9: p999_us * 1000}
                return PeerResult(completed, failed, duration_s, completed / duration_s, percentiles, cpu_s, command)
    raise RunError(f"wrk did not measure: {last_words(output) or 'it wrote nothing'}")
