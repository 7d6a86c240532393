"""What the run ran on: enough to tell whether two runs may be compared. No names, no secrets."""

from __future__ import annotations

import os
import platform
import resource
import sys
from collections.abc import Collection
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = ("servebench", "uvloop", "httptools", "numpy", "pyarrow", "pydantic")


def collect_environment() -> dict[str, Any]:
    """JSON-able facts about the host, its limits and the software."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return {
        "python": sys.version.split()[0],
        "implementation": platform.python_implementation(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpu_model": _cpu_model(),
        "cpus": os.cpu_count(),
        "cpus_allowed": sorted(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "clock_source": _text("/sys/devices/system/clocksource/clocksource0/current_clocksource"),
        "cpu_governor": _text("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "open_files_limit": {"soft": soft, "hard": hard},
        "local_ports": _text("/proc/sys/net/ipv4/ip_local_port_range"),
        "packages": {name: _version(name) for name in _PACKAGES},
    }


@dataclass(frozen=True, slots=True)
class CpuTimes:
    """CPU time since boot, in ticks: what a hypervisor took from us, and all of it."""

    stolen: int
    total: int

    @classmethod
    def now(cls, cpus: Collection[int] | None = None) -> CpuTimes:
        """Of these CPUs together; None: of the whole host."""
        wanted = {"cpu"} if cpus is None else {f"cpu{cpu}" for cpu in cpus}
        lines = [line.split() for line in Path("/proc/stat").read_text(encoding="ascii").splitlines()]
        # user, nice, system, idle, iowait, irq, softirq, steal; guest time, which follows, is in user time
        rows = [[int(field) for field in fields[1:9]] for fields in lines if fields[0] in wanted]
        return cls(sum(row[7] for row in rows), sum(map(sum, rows)))

    def stolen_share_until(self, later: CpuTimes) -> float:
        """The share of the time between two readings that the hypervisor gave to others."""
        return (later.stolen - self.stolen) / max(1, later.total - self.total)


def throttled_periods() -> int | None:
    """How often the cgroup's CPU quota has stopped us so far; None where there is no such count."""
    for line in (_text("/sys/fs/cgroup/cpu.stat") or "").splitlines():
        name, _, value = line.partition(" ")
        if name == "nr_throttled":
            return int(value)
    return None


def _cpu_model() -> str | None:
    for line in (_text("/proc/cpuinfo") or "").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return None


def _text(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
