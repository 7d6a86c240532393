"""A null gRPC model server: nghttpd that answers KServe calls for one model with constant replies.

nghttpd serves files over HTTP/2: under each method's path lies a length-prefixed reply, and a
trailer says grpc-status 0, which is all that a unary call needs. It allows 100 streams a
connection.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
from servebench_servers.host import free_port
from servebench_servers.process import ServerProcess

from servebench.protos import KSERVE, KSERVE_SERVICE
from servebench.wire.grpc import frame_message

MODEL = "null"
_READY_DEADLINE_S = 10.0


def find_nghttpd() -> str | None:
    """The nghttpd on the PATH; None when there is none."""
    return shutil.which("nghttpd")


def replies() -> dict[str, bytes]:
    """Method -> serialised reply."""
    metadata = KSERVE.ModelMetadataResponse(name=MODEL, versions=["1"], platform="null")
    metadata.inputs.add(name="INPUT", datatype="FP32", shape=[-1, 4])
    metadata.outputs.add(name="OUTPUT", datatype="FP32", shape=[-1, 4])
    config = KSERVE.ModelConfigResponse()
    config.config.name, config.config.max_batch_size = MODEL, 1
    infer = KSERVE.ModelInferResponse(model_name=MODEL, model_version="1", raw_output_contents=[bytes(16)])
    infer.outputs.add(name="OUTPUT", datatype="FP32", shape=[1, 4])
    server = KSERVE.ServerMetadataResponse(name="nghttpd", version="null model server")
    messages = {"ModelMetadata": metadata, "ModelConfig": config, "ModelInfer": infer, "ServerMetadata": server}
    return {method: message.SerializeToString() for method, message in messages.items()}


class NullGrpcServer:
    """A running null gRPC server on the given CPUs; use it as a context manager, from the main thread."""

    name = "nghttpd"
    endpoint: dict[str, Any] = {"model": MODEL, "protocol": "kserve-grpc"}  # noqa: RUF012 - read only

    def __init__(self, nghttpd: str, cpus: Sequence[int]) -> None:
        self._scratch = tempfile.TemporaryDirectory(prefix="null-grpc-server-")
        root = Path(self._scratch.name)
        service = root / "htdocs" / KSERVE_SERVICE
        service.mkdir(parents=True)
        for method, reply in replies().items():
            (service / method).write_bytes(frame_message(reply))
        said = subprocess.run([nghttpd, "--version"], capture_output=True, text=True, check=True).stdout
        self.version = said.strip().replace(" ", "/", 1)
        self._port = free_port()
        self.url = f"grpc://127.0.0.1:{self._port}"
        argv = [nghttpd, "--no-tls", "-a", "127.0.0.1", "-n", "1", "--trailer", "grpc-status: 0", "-d", str(root / "htdocs")]
        try:
            self._process = ServerProcess("nghttpd", [*argv, str(self._port)], root / "nghttpd.log", cpus=cpus)
            self._process.wait_ready(self._is_ready, _READY_DEADLINE_S)
        except BaseException:
            self._scratch.cleanup()
            raise

    def __enter__(self) -> NullGrpcServer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._process.stop()
        self._scratch.cleanup()

    def cpu_s(self) -> float:
        """CPU time that nghttpd has used so far, in seconds."""
        times = psutil.Process(self._process.pid).cpu_times()
        return float(times.user + times.system)

    def _is_ready(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self._port), timeout=1).close()
        except OSError:
            return False
        return True
