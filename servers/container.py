"""A server in a container, as a process like any other: ``docker run`` (or ``podman run``) in the foreground.

Plan. The engine's command is the server process that `ServerProcess` starts, logs and awaits, so a
server class needs to know nothing of containers. Only the end differs: the engine is told to stop
the container by name, because a container lives on when the command that started it is killed.
The image has to be on the host beforehand, or to be pulled explicitly: `run` itself never pulls,
so that a start takes seconds or fails.

Inside, a server listens on all addresses of the container; published ports bind 127.0.0.1.

Limits: when servebench itself is killed, the container runs on until the next start of one by
the same engine removes it (see `container_engine.remove_leftovers`).
"""

from __future__ import annotations

import math
import secrets
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from servebench.errors import LaunchError

from .container_engine import (
    OWNER_LABEL,
    ContainerError,
    Engine,
    ask_engine,
    ensure_image,
    explain_failure,
    last_line,
    owner_token,
    remove_leftovers,
    require_engine,
)
from .devices import Inventory
from .host import HOST
from .process import ServerProcess

#: Replaces facts about this host's packages where those of an image are used.
IMAGES_OWN = {"torch": "the image's", "numpy": "the image's"}

# Exit codes of `run`: the engine failed, the program cannot be run, there is no such program; and 128 + SIGKILL.
_NOT_STARTED = (125, 126, 127)
_KILLED = 137
_LIST_TIMEOUT_S = 10


class ContainerOptions(BaseModel):
    """How to run a server in a container."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    engine: Engine = "docker"
    """The command that runs it."""
    image: str = Field(min_length=1, pattern=r"^[^-\s]\S*$")
    """Image with the server and everything that the model imports, e.g. one built from `docker/triton.Dockerfile`."""
    pull: bool = False
    """Fetch an absent image first; Triton's are 10 GB and more."""
    gpus: Literal["all"] | list[int] | None = None
    """GPUs the container gets: `all`, or their numbers, e.g. `[0, 1]`; none when omitted."""
    shm_size_mib: int = Field(default=1024, ge=64)
    """Size of the container's `/dev/shm`, in MiB (the engines' default is 64). Triton's Python backend keeps tensors there."""


@dataclass(frozen=True, slots=True)
class ContainerSpec:
    """One container to run.

    ``ports``: ours on 127.0.0.1, to the container's. ``volumes``: folders and files, to their read-only mount points.
    """

    name: str
    options: ContainerOptions
    command: Sequence[str]
    ports: Mapping[int, int]
    volumes: Mapping[Path, PurePosixPath]
    cpus: Sequence[int] | None = None
    entrypoint: str | None = None  #: the program to run instead of the image's own; ``command`` are its arguments
    environment: Mapping[str, str] = field(default_factory=dict)


def new_container_name(server: str) -> str:
    """A name for one container of ``server``, unlike any other's."""
    return f"servebench-{server}-{secrets.token_hex(4)}"


def run_command(spec: ContainerSpec, owner: str) -> list[str]:
    """The command line that runs the container in the foreground and removes it at its end. ``owner`` is an `owner_token`."""
    options = spec.options
    command = [options.engine, "run", "--rm", "--name", spec.name, "--label", f"{OWNER_LABEL}={owner}", "--pull", "never"]
    # A program that is process 1 hears only signals that it handles; a Python one (torchserve) handles this one alone.
    command += ["--stop-signal", "SIGINT"]
    for outside, inside in spec.ports.items():
        command += ["--publish", f"{HOST}:{outside}:{inside}"]
    command += ["--shm-size", f"{options.shm_size_mib}m", *_gpu_arguments(options)]
    if options.engine == "podman":
        # Where SELinux confines containers, they may read neither the folders below nor the GPU's devices.
        command += ["--security-opt", "label=disable"]
    for folder, mount_point in spec.volumes.items():
        command += ["--volume", f"{folder}:{mount_point}:ro"]
    for key, value in spec.environment.items():
        command += ["--env", f"{key}={value}"]
    if spec.cpus:
        command += ["--cpuset-cpus", ",".join(map(str, spec.cpus))]
    if spec.entrypoint is not None:
        command += ["--entrypoint", spec.entrypoint]
    return [*command, options.image, *spec.command]


def container_devices(container: ContainerOptions) -> Inventory:
    """The devices a server in the container will see, GPUs from 0 on. `ContainerError` where `all` cannot be counted."""
    if container.gpus != "all":
        return Inventory({"cuda": len(container.gpus or ())}, "container.gpus")
    try:
        listed = subprocess.run(
            ["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=_LIST_TIMEOUT_S, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise ContainerError("container.gpus: nvidia-smi cannot count this host's GPUs; give their numbers") from error
    return Inventory({"cuda": sum(line.startswith("GPU ") for line in listed.splitlines())}, "nvidia-smi")


class ContainerProcess(ServerProcess):
    """A server's container, with the interface of its process. ``pid`` is the engine's command, not the server.

    Raises `ContainerError` when the engine is absent or unreachable, or the image is not there.
    Use it from the main thread.
    """

    def __init__(self, name: str, spec: ContainerSpec, log_path: Path) -> None:
        for folder in spec.volumes:
            if ":" in str(folder):
                raise ContainerError(f"{folder}: a folder with a colon in its path cannot be mounted; choose another --dir")
        self._spec = spec
        options = spec.options
        self._facts = {
            "engine": options.engine,
            "engine_version": require_engine(options.engine),
            "image": options.image,
            "image_id": ensure_image(options.engine, options.image, pull=options.pull),
            "name": spec.name,
        }
        remove_leftovers(options.engine)
        super().__init__(name, run_command(spec, owner_token()), log_path)

    def describe(self) -> dict[str, Any]:
        """Facts for the report: engine and its version, image and its id, the container's name."""
        return dict(self._facts)

    def wait_ready(self, probe: Callable[[], bool], deadline_s: float) -> None:
        """As a process does; a failure of the engine's is a `ContainerError`, one of the server's stays a `LaunchError`."""
        try:
            super().wait_ready(probe, deadline_s)
        except LaunchError as error:
            cause = explain_failure(self._spec.options.engine, self._spec.options.image, error.log_tail)
            if cause is None and f"(exit code {_KILLED})" in str(error):
                cause = "the container was killed, most likely out of memory; give it more, or host a smaller model"
            if cause is None and any(f"(exit code {code})" in str(error) for code in _NOT_STARTED):
                cause = f"{self._spec.options.engine} could not start the container: {last_line(error.log_tail)}"
            if cause is None:
                raise
            raise ContainerError(f"{self.name}: {cause}", log_tail=error.log_tail) from None

    def stop(self, grace_s: float = 5.0) -> None:
        """End the container: SIGINT, after ``grace_s`` SIGKILL; then it is removed. Idempotent."""
        if self._popen.returncode is not None:
            return
        engine, name, wait_s = self._spec.options.engine, self._spec.name, math.ceil(grace_s)
        # Also when the command has ended: it may have been killed, and the container be running.
        ask_engine(engine, ("stop", "-t", str(wait_s), name), timeout_s=wait_s + 15.0)
        super().stop(grace_s=2.0)
        # Last, when the command can no longer make the container that it was just asked for.
        ask_engine(engine, ("rm", "--force", "--volumes", name), timeout_s=30.0)


def _gpu_arguments(options: ContainerOptions) -> list[str]:
    if options.gpus is None or options.gpus == []:
        return []
    if options.engine == "podman":
        # podman knows GPUs as CDI devices: https://docs.nvidia.com/datacenter/cloud-native/container-toolkit/latest/cdi-support.html
        numbers = ["all"] if options.gpus == "all" else [str(number) for number in options.gpus]
        return [argument for number in numbers for argument in ("--device", f"nvidia.com/gpu={number}")]
    if options.gpus == "all":
        return ["--gpus", "all"]
    # docker reads the value as a CSV record, in which a field with commas has quotes of its own.
    return ["--gpus", f'"device={",".join(map(str, options.gpus))}"']
