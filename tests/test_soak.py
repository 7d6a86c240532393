"""Servers started and stopped again and again, some of which fail: nothing is left behind. Minutes; `make test-models`."""

import socket
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest

from servebench.errors import LaunchError
from servebench.launcher import RunningServer, find_launcher

pytestmark = [pytest.mark.models, pytest.mark.timeout(600)]

SERVERS = [pytest.param("triton", marks=pytest.mark.triton), pytest.param("torchserve", marks=pytest.mark.torchserve)]


def leftovers() -> dict[str, set[str]]:
    """What a server could leave on this host: processes, shared memory, temporary files."""
    children = {f"{child.pid} {child.name()}" for child in psutil.Process().children(recursive=True)}
    named = {
        f"{process.pid} {process.info['name']}"
        for process in psutil.process_iter(["name"])
        if process.info["name"] in ("tritonserver", "java", "triton_python_backend_stub")
    }
    folders = {str(path) for path in Path(tempfile.gettempdir()).iterdir() if not path.name.startswith("pytest-")}
    return {
        "processes": children | named,
        "shared memory": {str(path) for path in Path("/dev/shm").iterdir()},
        "files": folders,
    }


def listening(server: RunningServer) -> list[str]:
    """Those of a server's addresses at which somebody answers."""
    found = []
    for url in server.urls.values():
        address = urlsplit(url)
        with socket.socket() as probe:
            if probe.connect_ex((str(address.hostname), int(address.port or 0))) == 0:
                found.append(url)
    return found


@pytest.mark.parametrize("name", SERVERS)
def test_ten_starts_and_five_failures_leave_nothing(tmp_path: Path, name: str) -> None:
    launcher = find_launcher(name)
    broken = tmp_path / "broken.pt"
    broken.write_bytes(b"these are no weights")
    before = leftovers()
    for number in range(10):
        server = launcher.launch("digits", launcher.Options(), tmp_path / f"{number}")
        try:
            assert {server.urls["http"], server.urls["grpc"]} <= set(listening(server)), "Triton's metrics come a moment later"
        finally:
            server.stop()
        assert listening(server) == []
    for number in range(5):
        with pytest.raises(LaunchError):
            launcher.launch("digits", launcher.Options.model_validate({"weights": broken}), tmp_path / f"broken-{number}")
    after = leftovers()
    assert {kind: found - before[kind] for kind, found in after.items()} == {kind: set() for kind in after}


@pytest.mark.parametrize("name", SERVERS)
def test_two_at_once_do_not_meet(tmp_path: Path, name: str) -> None:
    launcher = find_launcher(name)
    before = leftovers()
    first = launcher.launch("digits", launcher.Options(), tmp_path / "first")
    try:
        second = launcher.launch("identity", launcher.Options(), tmp_path / "second")
        try:
            assert set(first.urls.values()).isdisjoint(second.urls.values())
        finally:
            second.stop()
        assert {first.urls["http"], first.urls["grpc"]} <= set(listening(first)), (
            "the other one's end is no concern of this one"
        )
        assert listening(second) == []
    finally:
        first.stop()
    after = leftovers()
    assert {kind: found - before[kind] for kind, found in after.items()} == {kind: set() for kind in after}
