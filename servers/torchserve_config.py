"""TorchServe's configuration: rendered as its three files, and compared with what a server says it applied.

Pure text and values. ``config.properties`` holds what concerns the server, ``model-config.yaml``
(inside the model archive) what concerns the model, ``log4j2.xml`` what is logged. Keys are those of
TorchServe 0.12. No paths in any of them, so they work as they are for a TorchServe elsewhere.

TorchServe corrects what it dislikes without a word: a ``maxBatchDelay`` of 0 becomes 100 ms, an
unknown key is ignored. Hence `TorchServeConfig.differences`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from .host import HOST
from .torchserve_cpu_launcher import CpuLauncher

#: Endpoints that get a port of their own. ``worker`` is the first of the ports of its Python
#: processes, used only where TorchServe cannot have Unix sockets.
ENDPOINTS = ("inference", "management", "metrics", "grpc", "grpc_management", "worker")

# TorchServe has no "never"; a run that outlives its tokens would turn into errors half way.
_TOKEN_EXPIRATION_MIN = 365 * 24 * 60

# As Triton's default for HTTP.
_MAX_MESSAGE_BYTES = 64 * 1024 * 1024

# TorchServe's own file logs eight lines a request, each to the console and to a file. Exactly those are left out here.
_QUIET_LOG4J2 = """\
<?xml version="1.0" encoding="UTF-8"?>
<Configuration>
  <Appenders>
    <Console name="STDOUT" target="SYSTEM_OUT">
      <PatternLayout pattern="%d{ISO8601} [%-5p] %t %c - %m%n"/>
    </Console>
  </Appenders>
  <Loggers>
    <Logger name="ACCESS_LOG" level="off"/>
    <Logger name="MODEL_METRICS" level="off"/>
    <Logger name="TS_METRICS" level="off"/>
    <Logger name="io.netty" level="error"/>
    <Logger name="org.apache" level="off"/>
    <Logger name="org.pytorch.serve.ServerInitializer" level="warn"/>
    <Logger name="org.pytorch.serve.http.api.rest.OpenInferenceProtocolRequestHandler" level="warn"/>
    <Logger name="org.pytorch.serve.wlm.BatchAggregator" level="warn"/>
    <Logger name="org.pytorch.serve.wlm.WorkerThread" level="info">
      <RegexFilter regex="(Looping backend response at|Backend response time): .*" onMatch="DENY" onMismatch="NEUTRAL"/>
    </Logger>
    <Logger name="org.pytorch.serve.wlm.WorkerLifeCycle" level="info">
      <RegexFilter regex="result=.*" onMatch="DENY" onMismatch="NEUTRAL"/>
    </Logger>
    <Logger name="MODEL_LOG" level="info">
      <RegexFilter regex="Backend received inference at: .*" onMatch="DENY" onMismatch="NEUTRAL"/>
    </Logger>
    <Root level="info">
      <AppenderRef ref="STDOUT"/>
    </Root>
  </Loggers>
</Configuration>
"""


@dataclass(frozen=True, slots=True)
class TorchServeConfig:
    """The settings of a TorchServe that hosts one model."""

    model: str
    batch_size: int
    max_batch_delay_ms: int  #: 1 or more
    workers: int
    job_queue_size: int
    response_timeout_s: int
    startup_timeout_s: int
    netty_threads: int | None  #: None: twice the CPUs, netty's default
    heap_mib: int
    token_auth: bool
    model_api: bool
    oip: bool
    handler: Mapping[str, Any]  #: what the model's handler reads
    device_type: str = "cpu"  #: ``cpu`` or ``gpu``
    device_ids: tuple[int, ...] = ()  #: of the GPUs that workers are spread over
    cpu_launcher: CpuLauncher | None = None  #: None: workers run on any of the server's CPUs

    @property
    def vmargs(self) -> list[str]:
        """Arguments of the Java virtual machine."""
        return [f"-Xmx{self.heap_mib}m"]

    @property
    def archive_name(self) -> str:
        """File name of the model archive in the model store."""
        return f"{self.model}.mar"

    def render_properties(self, ports: Mapping[str, int], address: str = HOST) -> str:
        """``config.properties``. ``ports`` has one for each of `ENDPOINTS`, all on ``address``."""
        properties: dict[str, str | int | bool] = {
            "inference_address": f"http://{address}:{ports['inference']}",
            "management_address": f"http://{address}:{ports['management']}",
            "metrics_address": f"http://{address}:{ports['metrics']}",
            "grpc_inference_address": address,
            "grpc_inference_port": ports["grpc"],
            "grpc_management_address": address,
            "grpc_management_port": ports["grpc_management"],
            "initial_worker_port": ports["worker"],
            "load_models": self.archive_name,
            "default_workers_per_model": self.workers,
            "default_response_timeout": self.response_timeout_s,
            "default_startup_timeout": self.startup_timeout_s,
            "job_queue_size": self.job_queue_size,
            # Not how many to use, but how many there are: up to the highest number.
            "number_of_gpu": max(self.device_ids, default=-1) + 1,
            # Its own 6.5 MB are ten images of 224 x 224.
            "max_request_size": _MAX_MESSAGE_BYTES,
            "max_response_size": _MAX_MESSAGE_BYTES,
            "metrics_mode": "prometheus",
            # They come from a Python process that TorchServe starts once a minute.
            "disable_system_metrics": True,
            "disable_token_authorization": not self.token_auth,
            "token_expiration_min": _TOKEN_EXPIRATION_MIN,
            "enable_model_api": self.model_api,
            "ts_open_inference_protocol": self.oip,
            # Nothing but this file counts, and nothing is fetched or installed.
            "enable_envvars_config": False,
            "install_py_dep_per_model": False,
            "allowed_urls": "file://.*",
            "vmargs": " ".join(self.vmargs),
        }
        if self.netty_threads is not None:
            properties["number_of_netty_threads"] = self.netty_threads
        if self.cpu_launcher is not None:
            properties |= {"cpu_launcher_enable": True, "cpu_launcher_args": self.cpu_launcher.arguments}
        return "".join(
            f"{key}={str(value).lower() if isinstance(value, bool) else value}\n" for key, value in properties.items()
        )

    def render_model_config(self) -> str:
        """``model-config.yaml``."""
        devices = {"deviceIds": list(self.device_ids)} if self.device_ids else {}
        return yaml.safe_dump(self._model_settings() | devices | {"handler": dict(self.handler)}, sort_keys=False)

    def render_log4j2(self) -> str:
        """``log4j2.xml``: to the console only, and nothing for a request that succeeds."""
        return _QUIET_LOG4J2

    def render_manifest(self, *, handler: str, archiver: str, created_on: str) -> dict[str, Any]:
        """The archive's ``MAR-INF/MANIFEST.json``. ``handler`` is its dotted module name inside the archive."""
        return {
            "createdOn": created_on,
            "runtime": "python",
            "model": {"modelName": self.model, "modelVersion": "1.0", "handler": handler, "configFile": "model-config.yaml"},
            "archiverVersion": archiver,
        }

    def differences(self, described: Mapping[str, Any]) -> list[str]:
        """What a server's ``GET /models/NAME`` has otherwise than asked: ``"batchSize is 1, asked for 4"``."""
        queue = described.get("jobQueueStatus", {})
        pairs = [(key, asked, described.get(key)) for key, asked in self._model_settings().items()]
        # Not stated as such; nobody sends anything yet, so the queue is empty.
        pairs.append(("job queue size", self.job_queue_size, queue.get("remainingCapacity")))
        return [f"{what} is {found}, asked for {asked}" for what, asked, found in pairs if found != asked]

    def _model_settings(self) -> dict[str, Any]:
        return {
            "minWorkers": self.workers,
            "maxWorkers": self.workers,
            "batchSize": self.batch_size,
            "maxBatchDelay": self.max_batch_delay_ms,
            "responseTimeout": self.response_timeout_s,
            "startupTimeout": self.startup_timeout_s,
            "deviceType": self.device_type,
        }
