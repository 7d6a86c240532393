"""docker and podman as commands: whether they work here, their images, and containers that nobody owns any more.

Both engines take the same words for all that is used here. Every known cause of a failure is
told by what the engine says, in a function of plain values, and raises `ContainerError` with the remedy.

A container outlives the command that started it, so each carries a label with its owner: the
servebench process, unmistakable on this machine until the next boot. `remove_leftovers` ends
those whose owner is gone.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from servebench.errors import LaunchError
from servebench.hostcheck import CheckGroup, HostCheck, State, ToolAnswer, ask_tool, from_launch_error

Engine = Literal["docker", "podman"]
ENGINES: tuple[Engine, ...] = ("docker", "podman")

OWNER_LABEL = "servebench.owner"

_ANSWER_TIMEOUT_S = 4.0
_PULL_TIMEOUT_S = 3_600.0
# Of docker: the daemon's version, so it has to answer. podman has no daemon; `info` opens its storage.
_VERSION_COMMAND: dict[Engine, tuple[str, ...]] = {
    "docker": ("version", "--format", "{{.Server.Version}}"),
    "podman": ("info", "--format", "{{.Version.Version}}"),
}
_INSTALL: dict[Engine, str] = {
    "docker": "install Docker Engine (https://docs.docker.com/engine/install/), or set container.engine to podman",
    "podman": "install the distribution's package podman, or set container.engine to docker",
}
_MEANING = "servers can be launched from container images (server.options.container)"
_GPU_TOOLS = ("nvidia-ctk", "nvidia-container-runtime-hook", "nvidia-container-cli")


class ContainerError(LaunchError):
    """The container could not be started, for a reason of the engine's rather than of the server in it."""


def ask_engine(engine: Engine, arguments: Sequence[str], timeout_s: float = _ANSWER_TIMEOUT_S) -> ToolAnswer | None:
    """Run the engine's command to its end; None where there is no such command."""
    answer = ask_tool([engine, *arguments], timeout_s)
    return None if answer is None else ToolAnswer(answer.returncode, answer.output.strip())


def require_engine(engine: Engine) -> str:
    """The engine's version, when it can be used on this host; `ContainerError` says why not."""
    return engine_version(engine, ask_engine(engine, _VERSION_COMMAND[engine]))


def engine_version(engine: Engine, answer: ToolAnswer | None) -> str:
    """The version in the engine's answer to being asked for it; `ContainerError` if that is no version."""
    if answer is None:
        raise ContainerError(f"there is no command {engine} on the PATH; {_INSTALL[engine]}")
    if answer.returncode is None:
        raise ContainerError(f"{engine} does not answer within {_ANSWER_TIMEOUT_S:g} s; restart its service")
    if answer.returncode == 0:
        return answer.output
    raise ContainerError(refusal(engine, answer.output) or f"{engine} does not work: {last_line(answer.output)}")


def refusal(engine: Engine, output: str) -> str | None:
    """Cause and remedy, when the output says that the engine itself cannot be used; else None."""
    if "permission denied while trying to connect" in output:
        return f"{engine}'s daemon refuses this user; add the user to the group {engine} and log in again, or run it rootless"
    if "Cannot connect to the Docker daemon" in output or "error during connect" in output:
        where = re.search(r"daemon at (\S+?)\.?(?:\s|$)", output)
        at = f" at {where[1]}" if where else ""
        return f"docker's daemon cannot be reached{at}; start it (systemctl start docker), or say in DOCKER_HOST where it is"
    if "newuidmap" in output or "subuid" in output:
        return f"{engine} may not map user ids; add this user to /etc/subuid and /etc/subgid, then `{engine} system migrate`"
    return None


def ensure_image(engine: Engine, image: str, *, pull: bool) -> str:
    """The id of an image that is on this host; an absent one is fetched only if ``pull`` says so (it may be many GB)."""
    inspect = ("image", "inspect", "--format", "{{.Id}}", image)
    answer = ask_engine(engine, inspect)
    if answer is not None and answer.returncode == 0:
        return answer.output
    if not pull:
        raise ContainerError(
            f"the image {image} is not on this host; fetch it with `{engine} pull {image}`, or set container.pull to true"
        )
    pulled = ask_engine(engine, ("pull", image), _PULL_TIMEOUT_S)
    if pulled is None or pulled.returncode != 0:
        said = pulled.output if pulled else ""
        cause = refusal(engine, said) or (
            f"the image {image} could not be pulled: {last_line(said)}; check its name, the network, and `{engine} login`"
        )
        raise ContainerError(cause, log_tail="\n".join(said.splitlines()[-20:]))
    answer = ask_engine(engine, inspect)
    return answer.output if answer is not None and answer.returncode == 0 else "unknown"


def remove_leftovers(engine: Engine) -> list[str]:
    """End and remove the containers whose servebench was killed; returns their ids. Never those of a living one."""
    listed = ask_engine(engine, ("ps", "--all", "--quiet", "--filter", f"label={OWNER_LABEL}"))
    ids = listed.output.split() if listed is not None and listed.returncode == 0 else []
    if not ids:
        return []
    owners = ask_engine(engine, ("inspect", "--format", f'{{{{index .Config.Labels "{OWNER_LABEL}"}}}}', *ids))
    if owners is None or owners.returncode != 0:  # one ended meanwhile; the next start looks again
        return []
    orphans = [one for one, owner in zip(ids, owners.output.splitlines(), strict=False) if owner_is_gone(owner)]
    if orphans:
        ask_engine(engine, ("rm", "--force", *orphans), timeout_s=30.0)
    return orphans


def owner_token(pid: int | None = None) -> str:
    """Names a process (ours by default) as no other of this boot and process namespace is or will be named."""
    pid = os.getpid() if pid is None else pid
    started = _start_ticks(pid)
    return ".".join(map(str, (*_here(), pid, started if started is not None else 0)))


def owner_is_gone(token: str) -> bool:
    """Whether the process of a token has ended. False for one that cannot be seen from here: another host's or namespace's."""
    *where, pid, started = token.split(".") if token.count(".") == 3 else ("", "", "", "")
    if tuple(where) != _here() or not pid.isdigit():
        return False
    return str(_start_ticks(int(pid))) != started


def container_groups() -> list[CheckGroup]:
    """What ``servebench doctor`` shows of containers: a group for each engine."""
    gpu_tool = next((tool for tool in _GPU_TOOLS if shutil.which(tool)), None)
    has_gpu = shutil.which("nvidia-smi") is not None
    answers = {engine: ask_engine(engine, _VERSION_COMMAND[engine]) for engine in ENGINES}
    return [engine_group(engine, answer, has_gpu=has_gpu, gpu_tool=gpu_tool) for engine, answer in answers.items()]


def engine_group(engine: Engine, answer: ToolAnswer | None, *, has_gpu: bool, gpu_tool: str | None) -> CheckGroup:
    """The checks of one engine. ``gpu_tool`` is a command of the NVIDIA Container Toolkit, None where there is none."""
    checks = []
    try:
        version = engine_version(engine, answer)
        checks.append(HostCheck(engine, State.OK, f"version {version}", _MEANING))
    except ContainerError as error:
        state = State.ABSENT if answer is None else State.FAIL
        checks.append(from_launch_error(engine, error, f"without {engine}, no server can be launched with it", state=state))
    if has_gpu and answer is not None:
        if gpu_tool is not None:
            checks.append(HostCheck("GPUs in containers", State.OK, gpu_tool, "containers can be given this host's GPUs"))
        else:
            meaning = "containers cannot be given this host's GPUs; on the CPU they work"
            fix = "install the NVIDIA Container Toolkit, then: " + _GPU_SETUP[engine]
            checks.append(HostCheck("GPUs in containers", State.WARN, "no NVIDIA Container Toolkit", meaning, fix))
    return CheckGroup(f"Containers: {engine}", tuple(checks), way=f"any bundled server by {engine}")


_GPU_SETUP: dict[Engine, str] = {
    "docker": "nvidia-ctk runtime configure --runtime=docker, and restart docker",
    "podman": "nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml",
}


def explain_failure(engine: Engine, image: str, log: str) -> str | None:
    """Cause and remedy, when a foreground ``run``'s output says that the engine could not start the container; else None."""
    refused = refusal(engine, log)
    if refused is not None:
        return refused
    for pattern, explain in _FAILURES:
        found = re.search(pattern, log, flags=re.IGNORECASE)
        if found is not None:
            return explain(found, engine, image)
    return None


_FAILURES: tuple[tuple[str, Callable[[re.Match[str], Engine, str], str]], ...] = (
    (
        r"127\.0\.0\.1:(\d+)\b.*(?:port is already allocated|address already in use)",
        lambda found, _engine, _image: f"port {found[1]} of 127.0.0.1 is in use; choose another, or 0 for a free one",
    ),
    (
        r"could not select device driver|unresolvable CDI devices|nvidia-container-cli: .*|failed to inject CDI devices",
        lambda _found, engine, _image: (
            f"{engine} cannot give the container a GPU; install the NVIDIA Container Toolkit, then: {_GPU_SETUP[engine]}"
        ),
    ),
    (
        r"no such image|image not known|manifest unknown|pull access denied|unable to find image",
        lambda _found, engine, image: f"the image {image} is not on this host; fetch it with `{engine} pull {image}`",
    ),
    (
        r"exec: \"?([^\"\s]+)\"?: (?:executable file not found|stat .*no such file)",
        lambda found, _engine, image: f"the image {image} has no program {found[1]}; choose an image of this server",
    ),
    (
        r"no space left on device",
        lambda _found, engine, _image: f"no space left for {engine}; free some with `{engine} system prune`",
    ),
    (
        r"requested CPUs are not available.*",
        lambda found, _engine, _image: f"{found[0].rstrip('.')}; choose others in cpus",
    ),
)


def _here() -> tuple[str, str]:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return boot, str(Path("/proc/self/ns/pid").stat().st_ino)


def _start_ticks(pid: int) -> int | None:
    """When a living process started, in clock ticks since boot; None where there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    # Field 22; the command (field 2) may hold spaces and parentheses (proc(5)). A zombie has ended.
    fields = stat[stat.rindex(b")") + 2 :].split()
    return None if fields[0] in (b"Z", b"X") else int(fields[19])


def last_line(text: str) -> str:
    """What an engine said last, but for its hint to ask for help."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("Run '")]
    return lines[-1] if lines else "it said nothing"
