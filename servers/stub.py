"""The stub server's launcher: a model server whose true queueing behaviour is known.

It answers KServe v2 over HTTP and gRPC like any model server, but only takes time: queries wait in one
queue for one server whose service times follow a chosen law, so what a load tester must report
can be computed (see `stub_queue`), and its own mistakes become visible.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from servebench.errors import LaunchError
from servebench.launcher import Launcher, RunningServer

from .host import get
from .process import ServerProcess
from .running import RunningProcess
from .stub_faults import Faults
from .stub_queue import Service

_READY_DEADLINE_S = 15.0
_ANSWER_DEADLINE_S = 5.0
_LISTENING = re.compile(r"^listening on http://127\.0\.0\.1:(\d+)$", re.MULTILINE)

Port = Annotated[int, Field(ge=0, le=65535)]
Elements = Annotated[int, Field(ge=1, le=1_000_000)]


class StubOptions(BaseModel):
    """What the stub does."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    service: Service = Service(kind="constant", mean_ms=2.0)
    """How long it works on a query."""
    queue_limit: Annotated[int, Field(ge=0)] | None = None
    """Most queries that may wait, not counting those in service; one beyond it gets status 503 (gRPC: UNAVAILABLE) at once."""
    faults: Faults = Faults()
    """Replies that are spoilt on purpose."""
    input_elements: Elements = 16
    """Numbers in a row of the model's input `INPUT`, FP32 of shape [rows, `input_elements`]."""
    output_elements: Elements = 16
    """Numbers in a row of the model's output `OUTPUT`, FP32 of shape [rows, `output_elements`]; every row is 0, 1, 2, ..."""
    port: Port = 0
    """TCP port of HTTP on 127.0.0.1; 0 takes a free one."""
    grpc_port: Port | None = 0
    """TCP port of gRPC on 127.0.0.1; 0 takes a free one, null serves HTTP only. gRPC needs the packages h2 and protobuf."""
    max_concurrent_streams: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    """Most calls that may be open at once on a gRPC connection (SETTINGS_MAX_CONCURRENT_STREAMS); no limit when omitted."""
    initial_window_size: Annotated[int, Field(ge=1, lt=2**31)] = 1 << 20
    """Bytes that a gRPC client may send ahead on a call (SETTINGS_INITIAL_WINDOW_SIZE); on a connection, 65535 at least."""
    goaway_after: Annotated[int, Field(ge=1)] | None = None
    """Calls after which a gRPC connection says GOAWAY, finishes them and closes; never when omitted."""
    cpus: list[Annotated[int, Field(ge=0)]] | None = None
    """CPUs the stub may use, e.g. `[0]`; all when omitted."""
    precise: bool = True
    """Spin for the last 0.2 ms before a departure: exact to some microseconds, costs CPU. Else rely on the kernel's timer."""


class RunningStub(RunningProcess):
    """A stub that answers. Its command line is its whole configuration."""

    def __init__(self, process: ServerProcess, urls: Mapping[str, str], facts: Mapping[str, Any]) -> None:
        super().__init__(process, facts=facts)
        self._urls = urls

    @property
    def urls(self) -> dict[str, str]:
        """``{"http": base URL, "grpc": base URL}``, the latter if gRPC is served."""
        return dict(self._urls)

    def stop(self) -> None:
        """End it; idempotent."""
        self._process.stop(grace_s=2.0)


class StubLauncher:
    """Starts the stub, hosting a model of any name."""

    name: ClassVar[str] = "stub"
    Options: type[BaseModel] = StubOptions

    def launch(self, model: str, options: StubOptions, work_dir: Path) -> RunningServer:
        """Start it and wait until it listens. Raises `LaunchError`, e.g. when the port is taken."""
        config = options.model_dump_json()
        argv = [sys.executable, "-m", "servebench_servers.stub_server", "--model", model, "--config", config]
        process = ServerProcess(self.name, argv, work_dir / "stub.log", cpus=options.cpus)
        process.wait_ready(lambda: _LISTENING.search(process.log_tail()) is not None, _READY_DEADLINE_S)
        listening = _LISTENING.search(process.log_tail())
        assert listening is not None
        port = int(listening[1])
        try:
            grpc = _ask_about_grpc(port)
        except BaseException:
            process.stop(grace_s=1.0)
            raise
        urls = {"http": f"http://127.0.0.1:{port}"}
        if "url" in grpc:
            urls["grpc"] = grpc["url"]
        return RunningStub(process, urls, _facts(model, options, urls.get("grpc", f"not served: {grpc.get('reason')}")))


def _facts(model: str, options: StubOptions, grpc: str) -> dict[str, Any]:
    """Name, version, model, whether it serves gRPC, and the queue in words and as options."""
    limit = "no limit" if options.queue_limit is None else f"at most {options.queue_limit} waiting"
    return {
        "name": StubLauncher.name,
        "version": version("servebench"),
        "model": model,
        "service": f"{options.service}; one server, first come first served, {limit}",
        "grpc": grpc,
        "config": options.model_dump(mode="json"),
    }


def _ask_about_grpc(port: int) -> dict[str, str]:
    """Where the stub serves gRPC, or why it does not. Raises `LaunchError`."""
    try:
        answer: dict[str, str] = json.loads(get(port, "/stub/grpc", timeout_s=_ANSWER_DEADLINE_S)[1])
    except OSError as error:
        raise LaunchError(f"{StubLauncher.name} listens, but does not answer: {error}") from error
    return answer


_: Launcher = StubLauncher()
