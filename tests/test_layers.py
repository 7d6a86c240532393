"""Who may import whom: the folders' order, held by reading every import."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"servebench": ROOT / "servebench", "servebench_servers": ROOT / "servers"}

#: Group -> what it may import besides itself, `ANYWHERE`, and what is not ours.
ANYWHERE = ("servebench", "servebench.errors", "servebench.clock")
_MEASURING = ("wire", "load", "transport", "control", "engine")
MAY_IMPORT = {
    "__init__": (),
    "errors": (),
    "clock": (),
    "constraint": (),
    "launcher": (),
    "hostcheck": (),
    "profile": ("constraint",),
    "protos": (),
    "wire": ("protos",),
    "load": ("profile", "wire.tensors"),
    "record": (),
    "transport": ("protos", "wire", "record.outcome"),
    "control": ("protos", "wire", "transport.grpcio_client", "record.outcome"),
    "engine": ("profile", "launcher", "load", "wire", "transport", "control", "record"),
    "judge": ("constraint", "record"),
    "report": ("judge", "record"),
    "cli": (
        "protos",
        "constraint",
        "profile",
        "launcher",
        "load",
        "wire",
        "transport",
        "engine",
        "record",
        "judge",
        "report",
        "doctor",
    ),
    "doctor": ("hostcheck", "launcher", "record.environment"),
    "servers": ("launcher", "hostcheck", "protos"),
}
#: Group -> modules of others that it never imports: pure code knows no time, no sockets and no event loop.
_IMPURE = ("asyncio", "socket", "time", "ssl", "select", "selectors", "uvloop", "servebench.clock")
NEVER_IMPORTS = {"protos": _IMPURE, "wire": _IMPURE, "load": _IMPURE, "judge": _IMPURE}

FILE_CALLS = {"open", "read_text", "read_bytes", "write_text", "write_bytes"}


def files() -> Iterator[tuple[str, Path]]:
    """Every module's dotted name and file."""
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            yield ".".join((package, *(part for part in parts if part != "__init__"))), path


MODULES = dict(files())


def imports(module: str, source: str, *, package: bool = False) -> set[str]:
    """Dotted names that a module imports anywhere in its code, also inside functions and for type checkers."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                parents = parts[: len(parts) - node.level + package]
                base = ".".join([*parents, *([base] if base else [])])
            # `from package import module` names a module, `from module import thing` does not.
            found |= {name if (name := f"{base}.{alias.name}") in MODULES else base for alias in node.names}
    return found


def group_of(module: str) -> str:
    """The folder, or the single module, that a name belongs to."""
    package, *rest = module.split(".")
    if package == "servebench_servers":
        return "servers"
    return rest[0] if rest else "__init__"


def is_within(name: str, parent: str) -> bool:
    return name == parent or name.startswith(f"{parent}.")


def violations(module: str, found: set[str]) -> list[str]:
    """What a module imports against the table."""
    group = group_of(module)
    wrong = []
    for name in sorted(found):
        if any(is_within(name, banned) for banned in NEVER_IMPORTS.get(group, ())):
            wrong.append(name)
        elif name.split(".")[0] in PACKAGES and name not in ANYWHERE and group_of(name) != group:
            allowed = (f"servebench.{one}" for one in MAY_IMPORT[group])
            if not any(is_within(name, one) for one in allowed):
                wrong.append(name)
    return wrong


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_downward_only(module: str) -> None:
    path = MODULES[module]
    found = imports(module, path.read_text(encoding="utf-8"), package=path.name == "__init__.py")
    assert violations(module, found) == [], f"{path.relative_to(ROOT)} may not import this"


def test_every_folder_is_in_the_table() -> None:
    assert {group_of(module) for module in MODULES} == set(MAY_IMPORT)
    for group, allowed in MAY_IMPORT.items():
        for one in allowed:
            assert f"servebench.{one}" in MODULES, f"{group} may import {one}, which is not there"


def test_the_two_halves_never_meet_above_the_waist() -> None:
    """What measures and what judges share the records and nothing else."""
    for group in ("judge", "report", "record"):
        assert not set(MAY_IMPORT[group]) & set(_MEASURING), group
    for group in (*_MEASURING, "record"):
        assert not {"judge", "report", "cli"} & set(MAY_IMPORT[group]), group
    assert not [group for group, allowed in MAY_IMPORT.items() if "cli" in allowed]


@pytest.mark.parametrize(
    ("module", "source", "wrong"),
    [
        pytest.param(
            "servebench.judge.x", "from servebench.engine.run import run_profile", ["servebench.engine.run"], id="from"
        ),
        pytest.param("servebench.judge.x", "import servebench.wire.http1", ["servebench.wire.http1"], id="import"),
        pytest.param("servebench.judge.x", "from servebench import transport", ["servebench.transport"], id="a folder"),
        pytest.param("servebench.judge.x", "from ..load import schedule", ["servebench.load.schedule"], id="relative"),
        pytest.param("servebench.judge.x", "def f():\n    import time", ["time"], id="inside a function"),
        pytest.param("servebench.judge.x", "from servebench.clock import now_ns", ["servebench.clock"], id="our clock"),
        pytest.param("servebench.judge.x", "import os, timeit\nfrom .summary import summarize", [], id="what is allowed"),
        pytest.param(
            "servebench.load.x", "from servebench.wire.http1 import Y", ["servebench.wire.http1"], id="part of a folder"
        ),
        pytest.param("servebench.load.x", "from servebench.wire import tensors", [], id="the allowed part"),
        pytest.param("servebench.wire.x", "import asyncio.protocols", ["asyncio.protocols"], id="a submodule"),
        pytest.param("servebench.engine.x", "import servebench.cli", ["servebench.cli"], id="the command"),
        pytest.param(
            "servebench_servers.x", "from servebench.record import columns", ["servebench.record.columns"], id="servers"
        ),
        pytest.param("servebench_servers.x", "from .process import P\nfrom servebench.launcher import L", [], id="a launcher"),
        pytest.param("servebench.engine.x", "from servebench_servers.stub import S", ["servebench_servers.stub"], id="upward"),
    ],
)
def test_a_forbidden_import_is_found(module: str, source: str, wrong: list[str]) -> None:
    assert violations(module, imports(module, source)) == wrong


@pytest.mark.parametrize("module", [module for module in MODULES if group_of(module) == "judge"])
def test_judging_opens_no_files(module: str) -> None:
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", None)
            assert name not in FILE_CALLS, f"{module}:{node.lineno} calls {name}()"


def test_the_stub_server_starts_light() -> None:
    """It shares a small machine with the client under test: nothing but its loop, its parser and numpy."""
    code = "import sys, servebench_servers.stub_server; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    heavy = {"torch", "sklearn", "scipy", "pyarrow", "pandas", "aiohttp", "rich", "click", "hdrh", "yaml", "pytriton"}
    assert not heavy & set(done.stdout.split())
