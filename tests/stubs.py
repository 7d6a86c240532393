"""Stubs for the tests of both their protocols: fixtures that start and stop them, and what a stub's stamps say."""

import contextlib
import json
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from servebench_servers.stub import StubLauncher, StubOptions

from servebench.launcher import RunningServer

NOTHING = {"kind": "constant", "mean_ms": 0.0}
Start = Callable[..., RunningServer]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts stubs of the given options."""
    with contextlib.ExitStack() as stack:

        def start_stub(**options: Any) -> RunningServer:
            server = StubLauncher().launch("m", StubOptions(**options), tmp_path)
            stack.callback(server.stop)
            return server

        yield start_stub


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A stub that takes no time."""
    server = StubLauncher().launch("m", StubOptions(service=NOTHING), tmp_path_factory.mktemp("stub"))
    yield server
    server.stop()


@pytest.fixture
def instant(shared: RunningServer) -> RunningServer:
    """The shared stub, which has forgotten the tests before."""
    reset(shared)
    return shared


def reset(server: RunningServer) -> None:
    with urllib.request.urlopen(urllib.request.Request(f"{server.urls['http']}/stub/reset", method="POST")) as response:
        assert response.status == 200


def stamps(server: RunningServer) -> dict[str, np.ndarray]:
    with urllib.request.urlopen(f"{server.urls['http']}/stub/stamps") as response:
        return {name: np.array(column, dtype=np.int64) for name, column in json.load(response).items()}


def count(server: RunningServer) -> int:
    """How many queries have arrived."""
    return len(stamps(server)["arrival_ns"])
