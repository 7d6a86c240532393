"""Whether this host can send traffic on time: the client's own needs, judged from facts.

`collect` reads the facts, `checks` judges them; only the latter knows what is good. Its bounds are
rules of thumb, each said where it is used. A run measures what really happened and has its own
verdict on it (`docs/trust.md`): the point here is to be warned beforehand.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from servebench.hostcheck import CheckGroup, HostCheck, State
from servebench.record.environment import collect_environment

from . import cgroup
from .timer import TimerOvershoot, measure_overshoot

_MIB = 1024 * 1024
MIN_PYTHON = (3, 11)
_GRPC_PACKAGES = ("grpcio", "hpack", "protobuf")
# Read from user space through the vDSO, some 20-50 ns a call; any other costs a system call or a slow device.
_FAST_CLOCKS = ("tsc", "arch_sys_counter", "kvm-clock", "hyperv_clocksource_tsc_page")
_SLOWING_GOVERNORS = ("powersave", "ondemand", "conservative", "schedutil")


@dataclass(frozen=True, slots=True)
class ClientFacts:
    """What the client's checks look at. None: this host does not say."""

    environment: Mapping[str, Any]  #: `collect_environment`
    grpc_packages: Mapping[str, str | None]  #: version by name
    cpu_quota: float | None  #: CPUs' worth of time that the control group may use; None for no limit
    memory_available_bytes: int | None
    timer: TimerOvershoot


def collect() -> ClientFacts:
    """The facts of this host. Takes half a second, and the machine to itself: it measures the timer."""
    timer = measure_overshoot()
    membership = _text(cgroup.MEMBERSHIP) or ""
    available = parse_meminfo(_text(Path("/proc/meminfo")) or "")
    left = cgroup.memory_left_bytes(cgroup.MOUNT, membership)
    return ClientFacts(
        environment=collect_environment(),
        grpc_packages={name: _version(name) for name in _GRPC_PACKAGES},
        cpu_quota=cgroup.cpu_quota(cgroup.MOUNT, membership),
        memory_available_bytes=min((amount for amount in (available, left) if amount is not None), default=None),
        timer=timer,
    )


def client_group(facts: ClientFacts) -> CheckGroup:
    """All checks of the client."""
    return CheckGroup("Client", tuple(_checks(facts)))


def _checks(facts: ClientFacts) -> Iterator[HostCheck]:
    environment = facts.environment
    yield check_python(environment["python"], environment["implementation"])
    yield check_packages(environment["packages"])
    yield check_grpc(facts.grpc_packages)
    yield check_cpus(len(environment["cpus_allowed"]), environment["cpus"])
    yield check_cpu_quota(facts.cpu_quota, len(environment["cpus_allowed"]))
    yield check_memory(facts.memory_available_bytes)
    yield check_open_files(environment["open_files_limit"]["soft"], environment["open_files_limit"]["hard"])
    yield check_local_ports(environment["local_ports"])
    yield check_clock_source(environment["clock_source"])
    yield check_timer(facts.timer)
    yield check_governor(environment["cpu_governor"])


def check_python(version: str, implementation: str) -> HostCheck:
    """The interpreter; an old one is a failure, another than CPython was never measured."""
    found = f"{implementation} {version}"
    name, meaning = "Python", "runs the client"
    if tuple(map(int, version.split(".")[:2])) < MIN_PYTHON:
        needed = ".".join(map(str, MIN_PYTHON))
        return HostCheck(name, State.FAIL, found, "too old for servebench", f"install Python {needed} or newer")
    if implementation != "CPython":
        meaning = "the client's timing was only ever measured on CPython"
        return HostCheck(name, State.WARN, found, meaning, "run servebench with CPython")
    return HostCheck(name, State.OK, found, meaning)


def check_packages(versions: Mapping[str, str | None]) -> HostCheck:
    """What servebench needs to run at all."""
    missing = [name for name, version in versions.items() if version is None]
    if missing:
        fix = "pip install --force-reinstall servebench"
        return HostCheck("packages", State.FAIL, f"missing: {', '.join(missing)}", "no run can start", fix)
    found = ", ".join(f"{name} {version}" for name, version in versions.items())
    return HostCheck("packages", State.OK, found, "runs over HTTP need no more")


def check_grpc(versions: Mapping[str, str | None]) -> HostCheck:
    """What protocols over gRPC need besides."""
    missing = [name for name, version in versions.items() if version is None]
    if missing:
        meaning, fix = "profiles over gRPC cannot run; those over HTTP can", "pip install 'servebench[grpc]'"
        return HostCheck("gRPC packages", State.ABSENT, f"missing: {', '.join(missing)}", meaning, fix)
    found = ", ".join(f"{name} {version}" for name, version in versions.items())
    return HostCheck("gRPC packages", State.OK, found, "profiles over gRPC can run")


def check_cpus(allowed: int, present: int) -> HostCheck:
    """A client and a server on one core measure each other's turns."""
    found = f"{allowed} of {present} CPUs may be used" if allowed < present else f"{present} CPUs"
    if allowed >= 2:
        return HostCheck("CPUs", State.OK, found, "client and a server on this host can have a CPU each (server.options.cpus)")
    meaning = "a server on this host would share the client's only CPU, and delay what measures it"
    fix = "give this host or container 2 CPUs or more, or test a server elsewhere"
    return HostCheck("CPUs", State.WARN, found, meaning, fix)


def check_cpu_quota(quota: float | None, allowed: int) -> HostCheck:
    """A control group that has used up its quota stands still until its period ends, often for tens of milliseconds."""
    name = "CPU quota"
    if quota is None or quota >= allowed:
        found = "none" if quota is None else f"{quota:g} CPUs' worth, no less than there are"
        return HostCheck(name, State.OK, found, "the kernel will not stop the client in the middle of a run")
    meaning = "a client that uses more is stopped for the rest of a period (often 100 ms): its tail latency is the quota's"
    return HostCheck(name, State.WARN, f"{quota:g} CPUs' worth of time", meaning, "raise or remove the limit (docker: --cpus)")


def check_memory(available_bytes: int | None) -> HostCheck:
    """A run of a million queries takes some hundred MiB; a server with a real model takes GiB."""
    name = "memory"
    if available_bytes is None:
        return HostCheck(name, State.WARN, "unknown", "cannot tell whether a server fits", "see MemAvailable in /proc/meminfo")
    found = f"{available_bytes / 1024 / _MIB:.1f} GiB available"
    if available_bytes >= 1024 * _MIB:
        return HostCheck(name, State.OK, found, "enough for the client and a small model")
    meaning = "a launched server may be killed by the kernel while it loads its model"
    return HostCheck(name, State.WARN, found, meaning, "free some memory, or raise this container's limit, to 1 GiB or more")


def check_open_files(soft: int, hard: int) -> HostCheck:
    """A connection is a descriptor; servebench and its libraries need some more."""
    name = "open files"
    infinite = soft < 0  # RLIM_INFINITY
    found = "no limit" if infinite else f"limit {soft}"
    if infinite or soft >= 4096:
        return HostCheck(name, State.OK, found, "enough for thousands of connections")
    meaning = f"at most about {max(0, soft - 100)} connections; over HTTP, each outstanding query needs one"
    if hard < 0 or hard >= 4096:
        return HostCheck(name, State.WARN, found, meaning, f"ulimit -n {65536 if hard < 0 else min(hard, 65536)}")
    fix = "raise nofile in /etc/security/limits.conf (docker: --ulimit nofile=65536)"
    return HostCheck(name, State.WARN, found, meaning, fix)


def check_local_ports(port_range: str | None) -> HostCheck:
    """A closed connection keeps its port for a minute (TIME_WAIT)."""
    name = "local ports"
    numbers = (port_range or "").split()
    if len(numbers) != 2:
        meaning, fix = "cannot tell how many connections may be opened a minute", "see /proc/sys/net/ipv4/ip_local_port_range"
        return HostCheck(name, State.WARN, "unknown", meaning, fix)
    first, last = map(int, numbers)
    count = last - first + 1
    found = f"{first}-{last}, {count} ports"
    if count >= 10_000:
        return HostCheck(name, State.OK, found, "enough, as connections are kept and used again")
    meaning = "a server that closes its connections can use them up within a minute"
    return HostCheck(name, State.WARN, found, meaning, "sysctl -w net.ipv4.ip_local_port_range='10240 60999'")


def check_clock_source(source: str | None) -> HostCheck:
    """Each query takes some five time stamps."""
    name = "clock source"
    if source in _FAST_CLOCKS:
        return HostCheck(name, State.OK, str(source), "time stamps cost tens of nanoseconds")
    if source is None:
        return HostCheck(name, State.WARN, "unknown", "cannot tell what a time stamp costs", "make /sys readable")
    meaning = "each time stamp is a system call or a slow read, which lowers the client's highest rate"
    return HostCheck(name, State.WARN, source, meaning, "boot with clocksource=tsc if the machine's TSC is stable")


def check_timer(timer: TimerOvershoot) -> HostCheck:
    """What an idle machine shows is 0.05-0.1 ms; a run judges its own lateness against the bounds it is given."""
    name = "timer"
    found = f"late by {timer.median_ns / 1000:.0f} us (median), {timer.p99_ns / 1000:.0f} us (p99 of {timer.count})"
    if timer.median_ns <= 200_000 and timer.p99_ns <= 1_000_000:
        return HostCheck(name, State.OK, found, "queries can be sent on time")
    meaning = "queries leave late, and their response times say so"
    fix = "keep pacing: precise, stop what else runs here, and give client and server CPUs of their own"
    return HostCheck(name, State.WARN, found, meaning, fix)


def check_governor(governor: str | None) -> HostCheck:
    """A CPU that slows down between queries answers the first one after a pause slowly."""
    name = "CPU governor"
    if governor is None:
        return HostCheck(name, State.OK, "none", "the frequency is not this system's to choose (a virtual machine, often)")
    if governor in _SLOWING_GOVERNORS:
        meaning = "the CPU's speed depends on the load, so results differ between rates and runs"
        return HostCheck(name, State.WARN, governor, meaning, "cpupower frequency-set -g performance (as root)")
    return HostCheck(name, State.OK, governor, "the CPU's speed does not depend on the load")


def parse_meminfo(meminfo: str) -> int | None:
    """MemAvailable of ``/proc/meminfo``, in bytes."""
    for line in meminfo.splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return None
