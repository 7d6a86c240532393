"""What ``servebench doctor`` shows of Triton: whether the wheel's, or a local one, can run here.

The checks are those that a launch makes (`triton_install`), in words for somebody who has not asked
for a launch yet. They judge `TritonFacts`; `check_host` alone collects them.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

from servebench.errors import LaunchError
from servebench.hostcheck import CheckGroup, HostCheck, State, attempt, from_launch_error

from .container_engine import container_groups
from .host import installed_version
from .triton_install import (
    SERVER_NAME,
    SHM_DIR,
    WHEEL,
    TritonInstallation,
    check_glibc,
    check_libraries,
    check_numpy,
    check_shm,
    check_torch,
    find_installation,
    shm_needed_bytes,
    trace_libraries,
)

_MIB = 1024 * 1024
_START_TIMEOUT_S = 5.0
_UNUSABLE = "Triton cannot be launched this way"


@dataclass(frozen=True, slots=True)
class ServerAnswer:
    """What ``tritonserver --help`` did: whether it printed its usage, and its first words."""

    usage: bool
    first_line: str


@dataclass(frozen=True, slots=True)
class TritonFacts:
    """What the checks look at."""

    installation: TritonInstallation | LaunchError
    present: bool  #: whether there is a Triton at all, fitting or not
    answer: ServerAnswer | None  #: None: there is nothing to ask
    loader_output: str | None  #: what the loader says of the Python backend's stub; None: there is none
    glibc: str | None  #: as in ``glibc 2.36``
    numpy: str
    torch: str | None
    shm_free_bytes: int | None  #: None: there is no /dev/shm


def check_host() -> list[CheckGroup]:
    """Triton by wheel, by local binary, and by container, on this host."""
    return [
        triton_group("wheel", _collect(None, present=installed_version(WHEEL) is not None)),
        triton_group("local binary", _collect("PATH", present=shutil.which(SERVER_NAME) is not None)),
        *container_groups(),
    ]


def triton_group(how: str, facts: TritonFacts) -> CheckGroup:
    """The checks of one way to launch Triton; one that is absent needs no further ones."""
    checks = tuple(_checks(facts)) if facts.present else (_check_installation(facts),)
    return CheckGroup(f"Triton by {how}", checks, way=f"triton by {how}")


def _checks(facts: TritonFacts) -> Iterator[HostCheck]:
    yield _check_installation(facts)
    if isinstance(facts.installation, TritonInstallation):
        minimum = facts.installation.min_glibc
        if minimum is not None:
            yield attempt(
                "C library",
                lambda: check_glibc(facts.glibc, minimum),
                found=facts.glibc or "unknown",
                meaning="new enough for the wheel",
                otherwise=_UNUSABLE,
            )
        yield _check_answer(facts.answer)
        yield attempt(
            "libpython",
            lambda: check_libraries(facts.loader_output or ""),
            found="all libraries of the Python backend are found",
            meaning="Python models can be loaded",
            otherwise="every model would fail to load after half a minute",
        )
    yield attempt(
        "numpy",
        lambda: check_numpy(facts.numpy),
        found=facts.numpy,
        meaning="of the layout that the Python backend expects",
        otherwise="answers would be garbage, with status 200",
    )
    yield attempt(
        "torch",
        lambda: check_torch(facts.torch),
        found=facts.torch or "",
        meaning="the bundled models can be loaded",
        otherwise="most of the bundled models cannot be loaded",
    )
    free = facts.shm_free_bytes
    yield attempt(
        str(SHM_DIR),
        # One instance, with room for batches of some MiB: what is less breaks down at the first larger model.
        lambda: check_shm(free, shm_needed_bytes(1, 16 * _MIB)),
        found=f"{(free or 0) // _MIB} MiB free",
        meaning="Triton and its instances can exchange tensors",
        otherwise="instances die when they exchange tensors",
    )


def _check_installation(facts: TritonFacts) -> HostCheck:
    if isinstance(facts.installation, TritonInstallation):
        return HostCheck("Triton", State.OK, facts.installation.label, "has a Python backend for this Python")
    return from_launch_error("Triton", facts.installation, _UNUSABLE, state=State.FAIL if facts.present else State.ABSENT)


def _check_answer(answer: ServerAnswer | None) -> HostCheck:
    if answer is not None and answer.usage:
        return HostCheck(SERVER_NAME, State.OK, "runs", "the server's own libraries are found")
    found = f"does not run: {answer.first_line if answer else 'no answer'}"
    fix = f"pip install --force-reinstall {WHEEL}, or install the library that it names"
    return HostCheck(SERVER_NAME, State.FAIL, found, _UNUSABLE, fix)


def _collect(binary: str | None, *, present: bool) -> TritonFacts:
    installation: TritonInstallation | LaunchError
    answer = loader_output = None
    try:
        installation = find_installation(binary)
    except LaunchError as error:
        installation = error
    else:
        env = installation.environment(os.environ)
        answer = _ask_server(installation, env)
        loader_output = trace_libraries(installation.stub, env)
    return TritonFacts(
        installation=installation,
        present=present,
        answer=answer,
        loader_output=loader_output,
        glibc=" ".join(platform.libc_ver()).strip() or None,
        numpy=importlib.metadata.version("numpy"),
        torch=installed_version("torch"),
        shm_free_bytes=shutil.disk_usage(SHM_DIR).free if SHM_DIR.is_dir() else None,
    )


def _ask_server(installation: TritonInstallation, env: dict[str, str]) -> ServerAnswer:
    command = [str(installation.server), "--help"]
    try:
        asked = subprocess.run(
            command, env=env, capture_output=True, text=True, errors="replace", timeout=_START_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return ServerAnswer(usage=False, first_line=str(error))
    said = (asked.stderr + asked.stdout).strip()  # it ends with exit code 1 whatever it is asked
    return ServerAnswer(
        usage="Usage: tritonserver" in said, first_line=said.partition("\n")[0] or f"exit code {asked.returncode}"
    )
