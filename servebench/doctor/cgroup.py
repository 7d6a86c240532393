"""The limits of this process's control groups, version 1 and 2: what a container or a service may use at most.

A limit anywhere above us holds for us too, so every group from ours to the root is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

MOUNT = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def cpu_quota(mount: Path, membership: str) -> float | None:
    """The tightest CPU limit, in CPUs; None for none. ``membership`` is the text of `MEMBERSHIP`.

    Version 2 says ``cpu.max`` (e.g. "150000 100000", "max 100000" for no limit), version 1
    ``cpu.cfs_quota_us`` (-1 for no limit) and ``cpu.cfs_period_us``.
    """
    read = _read(mount, membership, "cpu", ("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us"))
    limits = [int(quota) / int(period) for quota, period in read if quota not in ("max", "-1")]
    return min(limits, default=None)


def memory_left_bytes(mount: Path, membership: str) -> int | None:
    """How much memory the tightest limit leaves; None for no limit. The kernel counts cached files as used, and so do we.

    Version 1 spells "no limit" as a number near 2**63.
    """
    v1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")
    read = _read(mount, membership, "memory", ("memory.max", "memory.current"), v1)
    left = [int(limit) - int(used) for limit, used in read if limit != "max" and int(limit) < 1 << 60]
    return min(left, default=None)


def _read(mount: Path, membership: str, controller: str, v2: tuple[str, ...], v1: tuple[str, ...]) -> Iterator[list[str]]:
    """The two words of a limit, for each group that has them."""
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, names = mount, v2
        elif controller in controllers.split(","):
            root, names = mount / controller, v1
        else:
            continue
        # In a container the path may be that of the host, which is not mounted; its root is then the container's group.
        folder = root / path.lstrip("/")
        for group in (folder, *(parent for parent in folder.parents if parent.is_relative_to(root))):
            words = " ".join(_text(group / name) for name in names).split()
            if len(words) == 2:
                yield words


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except OSError:
        return ""
