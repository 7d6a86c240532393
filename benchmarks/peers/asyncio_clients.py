"""aiohttp and grpc.aio: what an application's own asyncio loop does with them (`scripts/asyncio_load.py`)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers.base import Arrivals, Load, PeerProtocol, PeerResult, Progress, Target, run_bounded
from benchmarks.peers.environment import environment_python, make_environment
from benchmarks.peers.numbers import of_times

_SCRIPT = Path(__file__).parent / "scripts" / "asyncio_load.py"


@dataclass(frozen=True, slots=True)
class AsyncioClient:
    """One of the two; ``requirements`` are pip's words for its environment."""

    name: str
    protocols: frozenset[PeerProtocol]
    requirements: tuple[str, ...]
    arrivals: frozenset[Arrivals] = frozenset({"closed", "poisson", "constant"})

    def absent(self) -> str | None:
        return None

    def set_up(self, progress: Progress) -> None:
        make_environment(self.name, self.requirements, progress)

    def run(self, target: Target, load: Load) -> PeerResult:
        settings = {
            "url": target.url,
            "path": target.path,
            "body": target.body.hex(),
            "headers": target.headers,
            "arrivals": load.arrivals,
            "rate_qps": load.rate_qps,
            "connections": load.connections,
            "duration_s": load.duration_s,
        }
        argv = [str(environment_python(self.name)), str(_SCRIPT), self.name]
        finished = run_bounded(self.name, argv, timeout_s=load.limit_s, cpus=load.cpus, stdin=json.dumps(settings).encode())
        said = json.loads(finished.stdout)
        times_ns = said["times_ns"]
        return PeerResult(
            completed=len(times_ns),
            errors=said["errors"],
            duration_s=said["duration_s"],
            rate_qps=len(times_ns) / said["duration_s"],
            percentiles=of_times(times_ns),
            cpu_s=said["cpu_s"],
            command=f"{self.name} ({', '.join(self.requirements)}), {_SCRIPT.name}",
        )


AIOHTTP = AsyncioClient("aiohttp", frozenset({"kserve-http", "openai"}), ("aiohttp==3.14.5", "uvloop==0.23.0"))
GRPC_AIO = AsyncioClient("grpc.aio", frozenset({"kserve-grpc"}), ("grpcio==1.85.1", "uvloop==0.23.0"))
