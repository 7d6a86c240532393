"""hey: Go's successor of ab. Workers send one query at a time, back to back or at most at a rate each."""

from __future__ import annotations

import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers.base import Arrivals, Load, PeerProtocol, PeerResult, Progress, Target, last_words, run_bounded
from servebench.errors import RunError

_TOTAL = re.compile(r"^\s*Total:\s+([\d.]+) secs", re.MULTILINE)
_STATUS = re.compile(r"^\s*\[(\d{3})\]\s+(\d+) responses", re.MULTILINE)
_ERROR = re.compile(r"^\s*\[(\d+)\]\s+(?!\d+ responses)\S", re.MULTILINE)
_PERCENTILE = re.compile(r"^\s*(50|99)%+ in ([\d.]+) secs", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Hey:
    """One OS process with one CPU for Go's scheduler; its `constant` waits for replies, so it falls behind a stalled server."""

    name: str = "hey"
    protocols: frozenset[PeerProtocol] = frozenset({"kserve-http", "openai"})
    arrivals: frozenset[Arrivals] = frozenset({"closed", "constant"})

    def absent(self) -> str | None:
        return None if shutil.which("hey") else "not on the PATH (apt install hey)"

    def set_up(self, progress: Progress) -> None:
        pass

    def run(self, target: Target, load: Load) -> PeerResult:
        with tempfile.TemporaryDirectory(prefix="hey-") as scratch:
            body = Path(scratch) / "body"
            body.write_bytes(target.body)
            argv = ["hey", "-z", f"{load.duration_s}s", "-c", str(load.connections), "-cpus", "1", "-m", "POST"]
            kind = dict(target.headers).get("content-type", "application/octet-stream")
            argv += ["-D", str(body), "-disable-compression", "-T", kind]
            argv += [word for name, value in target.headers if name != "content-type" for word in ("-H", f"{name}: {value}")]
            if load.rate_qps is not None:
                argv += ["-q", f"{load.rate_qps / load.connections}"]
            argv.append(target.url + target.path)
            finished = run_bounded(self.name, argv, timeout_s=load.limit_s, cpus=load.cpus)
        return parse_hey(finished.stdout, cpu_s=finished.cpu_s, command=" ".join(argv))


def parse_hey(output: str, *, cpu_s: float, command: str) -> PeerResult:
    """hey's summary; its percentiles are rounded to 0.1 ms, and end at 99. `RunError` when it measured nothing."""
    total = _TOTAL.search(output)
    if total is None or float(total[1]) == 0:
        raise RunError(f"hey did not measure: {last_words(output) or 'it wrote nothing'}")
    replies = {int(status): int(count) for status, count in _STATUS.findall(output)}
    completed = sum(count for status, count in replies.items() if status == 200)
    errors = (
        sum(replies.values())
        - completed
        + sum(int(count) for count in _ERROR.findall(output.partition("Error distribution")[2]))
    )
    duration_s = float(total[1])
    percentiles = {float(p): round(float(seconds) * 1e9) for p, seconds in _PERCENTILE.findall(output)}
    return PeerResult(completed, errors, duration_s, completed / duration_s, percentiles or None, cpu_s, command)
