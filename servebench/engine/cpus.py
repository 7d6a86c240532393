"""Who runs where on this host: the workers' CPUs, a launched server's, and those of the process that only watches."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from servebench.errors import ProfileError
from servebench.launcher import find_launcher
from servebench.profile import Profile


def with_cpus_named(profile: Profile) -> Profile:
    """``profile`` with the CPUs in it that ``client.apart`` stands for; `ProfileError` for CPUs that may not be used."""
    allowed, workers = sorted(os.sched_getaffinity(0)), profile.client.workers
    missing = sorted(set(profile.client.cpus or ()) - set(allowed))
    if missing:
        raise ProfileError(f"client.cpus: {missing} are not among the CPUs allowed here: {allowed}")
    own = profile.client.cpus or allowed[-workers:]
    rest = sorted(set(allowed) - set(own))
    if not profile.client.apart or not rest:
        return profile
    server = profile.server
    if server.launch is not None and "cpus" in find_launcher(server.launch).Options.model_fields:
        server = server.model_copy(update={"options": {"cpus": rest, **server.options}})
    client = profile.client.model_copy(update={"cpus": own})
    return profile.model_copy(update={"server": server, "client": client})


@contextlib.contextmanager
def kept_off(cpus: Sequence[int] | None) -> Iterator[None]:
    """Keep this process's threads off the workers' CPUs meanwhile, if there are others.

    The kernel takes a core whose worker waits for its next query for an idle one, and puts a look at
    the progress there: some milliseconds in which a query may be due.
    """
    allowed = os.sched_getaffinity(0)
    others = allowed - set(cpus or ())
    if not others or others == allowed:
        yield
        return
    _run_on(others)
    try:
        yield
    finally:
        _run_on(allowed)


def _run_on(cpus: set[int]) -> None:
    for thread in Path("/proc/self/task").iterdir():
        with contextlib.suppress(ProcessLookupError):  # it ended since the listing
            os.sched_setaffinity(int(thread.name), cpus)
