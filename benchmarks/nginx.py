"""A null model server: nginx that answers KServe requests for one model with constant replies.

What is left of a measurement against it is the client, the loopback network and the kernel. One
nginx process on one core, no logs, no disk; the request's body is read and dropped.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from http.client import HTTPException
from pathlib import Path
from typing import Any

from servebench_servers.host import free_port, get

from benchmarks.scratch_server import ScratchServer
from servebench.wire.kserve import infer_path, model_path
from servebench.wire.tensors import TensorSpec

MODEL = "null"
INFER_PATH = infer_path(MODEL)
INPUT = TensorSpec("INPUT", "FP32", (-1, 4))
#: nginx's own limit of a body, and one larger than any query of the benchmarks.
_BODY_LIMIT, _LARGE_BODY_LIMIT = "1m", "64m"


def model_replies(input_shape: Sequence[int], max_batch_size: int) -> dict[str, str]:
    """The reply of every path that is served, for a model that takes one tensor of this shape."""
    return {
        "/v2": '{"name":"nginx","version":"null model server","extensions":[]}',
        "/v2/health/ready": "",
        model_path(MODEL): (
            f'{{"name":"{MODEL}","versions":["1"],"platform":"null",'
            f'"inputs":[{{"name":"{INPUT.name}","datatype":"{INPUT.datatype}","shape":{list(input_shape)}}}],'
            '"outputs":[{"name":"OUTPUT","datatype":"FP32","shape":[-1,4]}]}'
        ),
        f"{model_path(MODEL)}/config": f'{{"name":"{MODEL}","platform":"null","max_batch_size":{max_batch_size}}}',
        INFER_PATH: (
            f'{{"model_name":"{MODEL}","model_version":"1",'
            '"outputs":[{"name":"OUTPUT","datatype":"FP32","shape":[1,4],"data":[0.0,1.0,2.0,3.0]}]}'
        ),
    }


REPLIES = model_replies(INPUT.shape, 1)
#: The same model under another name with a binary tensor in its reply (four floats of bytes that a configuration file
#: may hold), for clients that print a warning for each tensor in JSON.
BINARY_MODEL = "null-binary"
_BINARY_HEAD = (
    f'{{"model_name":"{BINARY_MODEL}","model_version":"1",'
    '"outputs":[{"name":"OUTPUT","datatype":"FP32","shape":[1,4],"parameters":{"binary_data_size":16}}]}'
)
#: More than an open loop that fell behind for some seconds opens; `listen` queues as many as the kernel allows.
_MAX_CONNECTIONS = 32_768
_TEMP_PATHS = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")


def find_nginx() -> str | None:
    """The nginx on the PATH, or where Debian installs it beside the PATH of ordinary users; None when there is none."""
    return shutil.which("nginx") or shutil.which("/usr/sbin/nginx")


def build_facts(nginx: str) -> str:
    """What ``nginx -V`` says: its version and the modules it was built with or without."""
    return subprocess.run([nginx, "-V"], capture_output=True, text=True, check=True).stderr


def render_config(
    port: int, directory: Path, facts: str, *, replies: Mapping[str, str] = REPLIES, body_limit: str = _BODY_LIMIT
) -> str:
    """The configuration file: the model on 127.0.0.1:``port``, with every file that nginx makes below ``directory``.

    ``facts`` is `build_facts`: a module's scratch path is set only where the module is built in, because
    nginx refuses directives it does not know, and without it wants to write to the system's folders.
    """
    built_in = [name for name in _TEMP_PATHS if f"--without-http_{name}_module" not in facts]
    locations = [f"location = {path} {{ return 200 '{reply}'; }}" for path, reply in replies.items()]
    for path in (model_path(BINARY_MODEL), f"{model_path(BINARY_MODEL)}/config"):
        reply = replies[path.replace(BINARY_MODEL, MODEL)].replace(f'"{MODEL}"', f'"{BINARY_MODEL}"')
        locations.append(f"location = {path} {{ return 200 '{reply}'; }}")
    locations.append(
        f"location = {infer_path(BINARY_MODEL)} {{ default_type application/octet-stream; "
        f"add_header Inference-Header-Content-Length {len(_BINARY_HEAD)}; return 200 '{_BINARY_HEAD}{'abcd' * 4}'; }}"
    )
    return "\n".join(
        [
            "daemon off;",
            "master_process off;",  # the one process is the worker, and dies with us whatever ends us
            f"worker_rlimit_nofile {_MAX_CONNECTIONS + 64};",
            f'pid "{directory}/nginx.pid";',
            "error_log stderr error;",
            f"events {{ worker_connections {_MAX_CONNECTIONS}; }}",
            "http {",
            f"client_max_body_size {body_limit};",
            "access_log off;",
            *(f'{name}_temp_path "{directory / name}";' for name in built_in),
            "default_type application/json;",
            "keepalive_requests 1000000000;",
            "keepalive_timeout 1h;",
            "server {",
            f"listen 127.0.0.1:{port} backlog=4096;",
            *locations,
            "}",
            "}",
            "",
        ]
    )


class NullServer(ScratchServer):
    """A running null server."""

    name = "nginx"
    endpoint: dict[str, Any] = {"model": MODEL, "tensor_format": "json"}  # noqa: RUF012 - read only
    saturating_connections: int | None = 64
    replies: Mapping[str, str] = REPLIES
    body_limit = _BODY_LIMIT

    def __init__(self, nginx: str, cpus: Sequence[int]) -> None:
        self._nginx = nginx
        self._facts = build_facts(nginx)
        version = re.search(r"nginx/\S+", self._facts)
        self.version = version[0] if version else "nginx"
        self._port = free_port()
        self.url = f"http://127.0.0.1:{self._port}"
        super().__init__(cpus)

    def prepare(self, directory: Path) -> list[str]:
        """The configuration file."""
        config = directory / "nginx.conf"
        rendered = render_config(self._port, directory, self._facts, replies=self.replies, body_limit=self.body_limit)
        config.write_text(rendered, encoding="utf-8")
        return [self._nginx, "-p", str(directory), "-c", str(config)]

    def is_ready(self) -> bool:
        """What KServe's readiness says."""
        try:
            return get(self._port, "/v2/health/ready")[0] == HTTPStatus.OK
        except (OSError, HTTPException):
            return False


class PayloadServer(NullServer):
    """The same for queries of any size: its model takes one vector of any length, without batches."""

    endpoint: dict[str, Any] = {"model": MODEL, "tensor_format": "binary"}  # noqa: RUF012 - read only
    replies = model_replies((-1,), 0)
    body_limit = _LARGE_BODY_LIMIT
