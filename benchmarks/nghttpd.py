"""A null gRPC model server: nghttpd that answers KServe calls for one model with constant replies.

nghttpd serves files over HTTP/2: under each method's path lies a length-prefixed reply, and a
trailer says grpc-status 0, which is all that a unary call needs. It allows 100 streams a
connection.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from servebench_servers.host import free_port

from benchmarks.nginx import INPUT, MODEL
from benchmarks.scratch_server import ScratchServer
from servebench.protos import KSERVE, KSERVE_SERVICE
from servebench.wire.grpc import frame_message


def find_nghttpd() -> str | None:
    """The nghttpd on the PATH; None when there is none."""
    return shutil.which("nghttpd")


def replies() -> dict[str, bytes]:
    """Method -> serialised reply."""
    metadata = KSERVE.ModelMetadataResponse(name=MODEL, versions=["1"], platform="null")
    metadata.inputs.add(name=INPUT.name, datatype=INPUT.datatype, shape=INPUT.shape)
    metadata.outputs.add(name="OUTPUT", datatype="FP32", shape=[-1, 4])
    config = KSERVE.ModelConfigResponse()
    config.config.name, config.config.max_batch_size = MODEL, 1
    infer = KSERVE.ModelInferResponse(model_name=MODEL, model_version="1", raw_output_contents=[bytes(16)])
    infer.outputs.add(name="OUTPUT", datatype="FP32", shape=[1, 4])
    server = KSERVE.ServerMetadataResponse(name="nghttpd", version="null model server")
    messages = {"ModelMetadata": metadata, "ModelConfig": config, "ModelInfer": infer, "ServerMetadata": server}
    return {method: message.SerializeToString() for method, message in messages.items()}


class NullGrpcServer(ScratchServer):
    """A running null gRPC server."""

    name = "nghttpd"
    endpoint: dict[str, Any] = {"model": MODEL, "protocol": "kserve-grpc"}  # noqa: RUF012 - read only
    saturating_connections: int | None = None

    def __init__(self, nghttpd: str, cpus: Sequence[int]) -> None:
        self._nghttpd = nghttpd
        said = subprocess.run([nghttpd, "--version"], capture_output=True, text=True, check=True).stdout
        self.version = said.strip().replace(" ", "/", 1)
        self._port = free_port()
        self.url = f"grpc://127.0.0.1:{self._port}"
        super().__init__(cpus)

    def prepare(self, directory: Path) -> list[str]:
        """A file with the reply of each method."""
        service = directory / "htdocs" / KSERVE_SERVICE
        service.mkdir(parents=True)
        for method, reply in replies().items():
            (service / method).write_bytes(frame_message(reply))
        options = ["--no-tls", "-a", "127.0.0.1", "-n", "1", "--trailer", "grpc-status: 0", "-d", str(service.parent)]
        return [self._nghttpd, *options, str(self._port)]

    def is_ready(self) -> bool:
        """Whether it listens."""
        try:
            socket.create_connection(("127.0.0.1", self._port), timeout=1).close()
        except OSError:
            return False
        return True
