"""TorchServe's CPU launcher: every worker on CPUs of its own, by torch's ``torch.backends.xeon.run_cpu``.

What TorchServe does. Under ``cpu_launcher_enable`` it starts a worker through
``python -m torch.backends.xeon.run_cpu``, with ``cpu_launcher_args`` and, where there are several
workers, ``--ninstances`` and ``--rank``. That sets OMP_NUM_THREADS, binds the worker with numactl
(to its CPUs' memory, too) or, where that does not work, with taskset, and preloads what it finds of
tcmalloc, jemalloc and Intel's OpenMP.

What goes wrong in silence. If a trial with ``hostname`` fails, TorchServe starts its workers unbound.
run_cpu counts all CPUs of the machine, also those that the server may not use, and where more are
listed than one worker needs, it starts the worker several times on one socket. A library that was
asked for and is not found is a warning. Hence: the CPUs are listed, exactly as many as needed; what
the trial needs is checked beforehand; and `inspect_workers` asks the kernel what came of it.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from servebench.errors import LaunchError

#: What run_cpu can be asked for beside the CPUs, which the other options say.
LauncherArgument = Literal[
    "--disable_numactl", "--disable_iomp", "--enable_tcmalloc", "--enable_jemalloc", "--use_default_allocator"
]
ALLOCATORS = ("--enable_tcmalloc", "--enable_jemalloc", "--use_default_allocator")

_LIBRARIES = ("tcmalloc", "jemalloc", "iomp5")
# They win over run_cpu's own; the others make it divide a worker's CPUs further.
_OVERRIDING = ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE", "LOCAL_RANK")


@dataclass(frozen=True, slots=True)
class CpuLauncher:
    """Which CPUs the workers get. ``cpus`` has ``threads`` for each worker, ascending, worker after worker."""

    cpus: tuple[int, ...]
    threads: int
    extra: tuple[LauncherArgument, ...] = ()

    @property
    def arguments(self) -> str:
        """``cpu_launcher_args``."""
        cores = ",".join(map(str, self.cpus))
        return " ".join(["--core_list", cores, "--ncores_per_instance", str(self.threads), *self.extra])

    @property
    def shares(self) -> list[list[int]]:
        """The CPUs of each worker."""
        return [list(self.cpus[start : start + self.threads]) for start in range(0, len(self.cpus), self.threads)]


def plan_launcher(cpus: Sequence[int], *, workers: int, threads: int, extra: Sequence[LauncherArgument] = ()) -> CpuLauncher:
    """A launcher that gives each of ``workers`` as many of ``cpus`` as it has threads; `LaunchError` for too few."""
    needed, usable = workers * threads, sorted(set(cpus))
    if len(usable) < needed:
        raise LaunchError(
            f"cpu_launcher: {workers} workers of {threads} torch_threads need {needed} CPUs, the server has {len(usable)}; "
            "lower workers or torch_threads, or give it more cpus"
        )
    return CpuLauncher(tuple(usable[:needed]), threads, tuple(extra))


def check_programs(which: Callable[[str], str | None]) -> None:
    """``which`` finds a program; `LaunchError` names those that TorchServe's trial or run_cpu would lack."""
    missing = [name for name in ("python", "hostname", "lscpu") if which(name) is None]
    if which("taskset") is None and which("numactl") is None:
        missing.append("taskset or numactl")
    if missing:
        raise LaunchError(
            f"cpu_launcher: there is no {', '.join(missing)} on the PATH, so TorchServe would start its workers unbound; "
            "install it (distributions have hostname, util-linux with lscpu and taskset, numactl), or set cpu_launcher to false"
        )


def launcher_environment(base: Mapping[str, str], python: Path = Path(sys.executable)) -> dict[str, str]:
    """``base`` for the launcher: TorchServe's trial finds an interpreter as ``python``, and nothing overrides run_cpu."""
    kept = {key: value for key, value in base.items() if key not in _OVERRIDING}
    return kept | {"PATH": os.pathsep.join(filter(None, (str(python.parent), base.get("PATH"))))}


def inspect_workers(launcher: CpuLauncher, pids: Sequence[int]) -> list[dict[str, Any]]:
    """What the kernel says of the worker processes: CPUs, OMP_NUM_THREADS, libraries of `_LIBRARIES`; by their CPUs.

    `LaunchError` where that is not what was asked for.
    """
    try:
        found = sorted((_inspect(pid) for pid in pids), key=lambda worker: worker["cpus"])
    except OSError as error:
        raise LaunchError(f"cpu_launcher: a worker cannot be looked at: {error.strerror}; see torchserve.log") from None
    cpus = [worker["cpus"] for worker in found]
    if cpus != launcher.shares:
        raise LaunchError(
            f"cpu_launcher: the workers run on CPUs {cpus}, not on {launcher.shares}; "
            "torchserve.log has what torch.backends.xeon.run_cpu said; or set cpu_launcher to false"
        )
    for library in ("tcmalloc", "jemalloc"):
        if f"--enable_{library}" in launcher.extra and any(library not in worker["libraries"] for worker in found):
            raise LaunchError(
                f"cpu_launcher_args: --enable_{library}, but run_cpu found no lib{library}.so where it looks "
                "(torchserve.log has the list); put a link of that name there"
            )
    return found


def _inspect(pid: int) -> dict[str, Any]:
    environ = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    threads = next((entry.partition("=")[2] for entry in environ if entry.startswith("OMP_NUM_THREADS=")), None)
    maps = Path(f"/proc/{pid}/maps").read_text(encoding="utf-8", errors="replace")
    return {
        "pid": pid,
        "cpus": sorted(os.sched_getaffinity(pid)),
        "omp_num_threads": int(threads) if threads and threads.isdigit() else None,
        "libraries": [name for name in _LIBRARIES if re.search(rf"/lib{name}[^/]*\.so", maps)],
    }
