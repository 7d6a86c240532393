"""TorchServe in a container: which container to run for a model store and a rendered configuration.

It listens on TorchServe's own ports there, on all of the container's addresses: `CONTAINER_PORTS` and
`ANY_ADDRESS` are for `TorchServeConfig.render_properties`. The image has to bring Java, torch and a
Python of 3.11 or newer (`docker/torchserve.Dockerfile`; TorchServe's own image has 3.9).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from .container import ContainerOptions, ContainerSpec, new_container_name

ANY_ADDRESS = "0.0.0.0"
CONTAINER_PORTS = {
    **{"inference": 8080, "management": 8081, "metrics": 8082, "grpc": 7070, "grpc_management": 7071},
    "worker": 9000,
}

_STORE = PurePosixPath("/servebench/model_store")
_CONFIG = PurePosixPath("/servebench/config")


def torchserve_container(
    container: ContainerOptions,
    store: Path,
    config_files: Sequence[Path],
    ports: Mapping[str, int],
    *,
    cpus: Sequence[int] | None = None,
) -> ContainerSpec:
    """The container that serves the archives of ``store``; ``ports`` are ours, by endpoint.

    ``config_files`` has ``config.properties``, and ``log4j2.xml`` where TorchServe's own is to be replaced.
    """
    # What is in model-config.yaml is in the archive, too.
    files = {file: _CONFIG / file.name for file in config_files if file.name in ("config.properties", "log4j2.xml")}
    mounted = {file.name: place for file, place in files.items()}
    log = ["--log-config", str(mounted["log4j2.xml"])] if "log4j2.xml" in mounted else []
    return ContainerSpec(
        name=new_container_name("torchserve"),
        options=container,
        command=[
            *("--start", "--foreground", "--ncs"),
            *("--ts-config", str(mounted["config.properties"])),
            *("--model-store", str(_STORE)),
            *log,
        ],
        # Workers listen inside the container only.
        ports={ports[endpoint]: inside for endpoint, inside in CONTAINER_PORTS.items() if endpoint != "worker"},
        volumes={store: _STORE, **files},
        cpus=cpus,
        entrypoint="torchserve",
    )
