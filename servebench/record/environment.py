"""What the run ran on: enough to tell whether two runs may be compared. No names, no secrets."""

from __future__ import annotations

import os
import platform
import resource
import sys
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


def cpu_times() -> tuple[int, int]:
    """(stolen, total) CPU ticks of the host since boot: the difference of two calls tells what a hypervisor took."""
    fields = [int(field) for field in Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]]
    return fields[7], sum(fields)


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
