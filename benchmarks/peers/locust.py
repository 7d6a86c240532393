"""Locust with FastHttpUser (geventhttpclient), its faster kind of user, in one process."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers.base import Arrivals, Load, PeerProtocol, PeerResult, Progress, Target, last_words, run_bounded
from benchmarks.peers.environment import environment_python, make_environment
from benchmarks.peers.numbers import of_counts
from servebench.errors import RunError

_LOCUSTFILE = Path(__file__).parent / "scripts" / "locustfile.py"
_REQUIREMENTS = ("locust==2.47.0",)


@dataclass(frozen=True, slots=True)
class Locust:
    """``connections`` users. Users wait for their replies: `constant` (``constant_throughput``) is paced, but no open loop."""

    name: str = "locust"
    protocols: frozenset[PeerProtocol] = frozenset({"kserve-http", "openai"})
    arrivals: frozenset[Arrivals] = frozenset({"closed", "constant"})

    def absent(self) -> str | None:
        return None

    def set_up(self, progress: Progress) -> None:
        make_environment(self.name, _REQUIREMENTS, progress)

    def run(self, target: Target, load: Load) -> PeerResult:
        settings = {
            "path": target.path,
            "body": target.body.hex(),
            "headers": target.headers,
            "rate_qps": load.rate_qps,
            "connections": load.connections,
        }
        argv = [str(environment_python(self.name)), "-m", "locust", "-f", str(_LOCUSTFILE), "--headless", "--json"]
        # Locust knows whole seconds only; all users start at once, and what is counted begins when they have.
        users = str(load.connections)
        argv += ["-u", users, "-r", users, "-t", f"{math.ceil(load.duration_s)}s", "--reset-stats", "--host", target.url]
        argv += ["--loglevel", "ERROR", "--exit-code-on-error", "0"]
        env = {"PEER_SETTINGS": json.dumps(settings)}
        finished = run_bounded(self.name, argv, timeout_s=load.limit_s, cpus=load.cpus, env=env)
        return parse_locust(finished.stdout, finished.stderr, command=" ".join(argv))


def parse_locust(stdout: str, stderr: str, *, command: str) -> PeerResult:
    """Locust's ``--json`` and our line of CPU time. Its times are whole milliseconds. `RunError` when it measured nothing."""
    try:
        (stats,) = json.loads(stdout)
        cpu_s = next(float(line.split()[1]) for line in stderr.splitlines() if line.startswith("CPU "))
    except (ValueError, StopIteration):
        raise RunError(f"locust did not measure: {last_words(stderr) or last_words(stdout) or 'it wrote nothing'}") from None
    duration_s = stats["last_request_timestamp"] - stats["start_time"]
    completed = stats["num_requests"] - stats["num_failures"]
    # Locust keeps the times of failed requests in the same counts.
    counts = {round(float(time_ms) * 1e6): count for time_ms, count in stats["response_times"].items()}
    return PeerResult(completed, stats["num_failures"], duration_s, completed / duration_s, of_counts(counts), cpu_s, command)
