"""What ``servebench doctor`` shows of TorchServe: whether the wheel's can run here.

The checks are those that a launch makes (`torchserve_install`), judged from `TorchServeFacts`;
`check_host` alone collects them.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from servebench.errors import LaunchError
from servebench.hostcheck import CheckGroup, HostCheck, State, attempt, from_launch_error

from .container_engine import container_groups
from .host import installed_version, package_file
from .torchserve_install import (
    bundled_java,
    check_temp_dir,
    check_torch,
    choose_java,
    java_candidates,
    java_version,
    torchserve_home,
)

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


def check_host() -> list[CheckGroup]:
    """TorchServe by wheel, and by container, on this host."""
    return [torchserve_group(_collect()), *container_groups()]


def torchserve_group(facts: TorchServeFacts) -> CheckGroup:
    """The checks of launching the wheel's TorchServe."""
    return CheckGroup("TorchServe by wheel", tuple(_checks(facts)), way="torchserve by wheel")


def _checks(facts: TorchServeFacts) -> Iterator[HostCheck]:
    try:
        torchserve_home(facts.package_file)
        yield HostCheck("TorchServe", State.OK, facts.version or "unknown version", "the server is installed")
    except LaunchError as error:
        state = State.ABSENT if facts.package_file is None else State.FAIL
        yield from_launch_error("TorchServe", error, _UNUSABLE, state=state)
    try:
        java = choose_java(facts.java)
        yield HostCheck("Java", State.OK, f"{java.version} ({java.program})", "new enough for TorchServe")
    except LaunchError as error:
        state = State.FAIL if facts.java else State.ABSENT
        yield from_launch_error("Java", error, _UNUSABLE, state=state)
    yield attempt(
        "torch",
        lambda: check_torch(facts.torch),
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


def _collect() -> TorchServeFacts:
    candidates = java_candidates(os.environ, bundled_java())
    return TorchServeFacts(
        package_file=package_file("ts"),
        version=installed_version("torchserve"),
        torch=installed_version("torch"),
        java=tuple((origin, program, java_version(program)) for origin, program in candidates),
        temp_dir=Path(tempfile.gettempdir()),
    )
