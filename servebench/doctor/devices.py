"""The accelerators of this host, as their vendors' own tools see them, and whether torch here can use them.

A kind of device has a tool that comes with its driver. No tool: no such device, as far as anybody
can tell. A tool that fails: a driver that does not work. torch says in a small file of its own
which devices it was built for, so it need not be imported, which takes seconds.
"""

from __future__ import annotations

import importlib.util
import runpy
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from servebench.hostcheck import CheckGroup, HostCheck, State, ToolAnswer, ask_tool

_TOOL_TIMEOUT_S = 4.0


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of device. ``name`` is its word in ``device:``; ``torch_build`` is the entry of ``torch/version.py`` about it."""

    name: str
    people: str
    command: tuple[str, ...]
    driver: str  #: what to install or repair when the tool fails
    torch_build: str | None = None
    torch_package: str | None = None  #: package that adds the support to torch
    torch_fix: str = ""


KINDS = (
    Kind(
        "cuda",
        "NVIDIA GPU",
        ("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"),
        "the NVIDIA driver",
        torch_build="cuda",
        torch_fix="pip install torch --index-url https://download.pytorch.org/whl/cu126 (the driver's CUDA or an older one)",
    ),
    Kind(
        "rocm",
        "AMD GPU",
        ("rocm-smi", "--showproductname", "--csv"),
        "the amdgpu driver and ROCm",
        torch_build="hip",
        torch_fix="pip install torch from the index https://download.pytorch.org/whl/ that names your ROCm",
    ),
    Kind(
        "xpu",
        "Intel GPU",
        ("xpu-smi", "discovery"),
        "Intel's GPU driver and oneAPI runtime",
        torch_build="xpu",
        torch_fix="pip install torch --index-url https://download.pytorch.org/whl/xpu",
    ),
    Kind(
        "hpu",
        "Intel Gaudi",
        ("hl-smi", "-L"),
        "the Gaudi driver",
        torch_package="habana_frameworks",
        torch_fix="install Habana's torch (habana-torch-plugin) of the driver's release",
    ),
    Kind(
        "neuron",
        "AWS Neuron",
        ("neuron-ls",),
        "the aws-neuronx driver and tools",
        torch_package="torch_neuronx",
        torch_fix="pip install torch-neuronx --index-url https://pip.repos.neuron.amazonaws.com",
    ),
)


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """What the device checks look at, by name of the kind. An answer of None: there is no such tool."""

    cpu_model: str | None
    cpus: int
    answers: Mapping[str, ToolAnswer | None]
    torch_installed: bool
    torch_supports: Mapping[str, str | None]  #: version of the support (e.g. CUDA's) or None


def collect(cpu_model: str | None, cpus: int) -> DeviceFacts:
    """Ask every vendor's tool that is here, at once."""
    with ThreadPoolExecutor(max_workers=len(KINDS)) as pool:
        answers = dict(zip((kind.name for kind in KINDS), pool.map(_ask, KINDS), strict=True))
    spec = importlib.util.find_spec("torch")
    builds = _torch_builds(Path(spec.origin).with_name("version.py")) if spec and spec.origin else {}
    supports = {kind.name: builds.get(kind.torch_build) if kind.torch_build else _has(kind.torch_package) for kind in KINDS}
    return DeviceFacts(cpu_model, cpus, answers, spec is not None, supports)


def device_group(facts: DeviceFacts) -> CheckGroup:
    """The CPU, which is always there, and each kind of accelerator."""
    found = f"{facts.cpu_model or 'unknown model'}, {facts.cpus} CPUs"
    cpu = HostCheck("cpu", State.OK, found, "every bundled model runs on it")
    return CheckGroup("Devices", (cpu, *(check_device(kind, facts) for kind in KINDS)))


def check_device(kind: Kind, facts: DeviceFacts) -> HostCheck:
    """One kind of accelerator."""
    answer = facts.answers[kind.name]
    if answer is None:
        found = f"no {kind.command[0]} on the PATH"
        fix = f"install {kind.driver}, if this host has an {kind.people}"
        return HostCheck(kind.name, State.ABSENT, found, f"no {kind.people} can be used (device: {kind.name})", fix)
    lines = [line.strip() for line in answer.output.splitlines() if line.strip()]
    if answer.returncode != 0 or not lines:
        how = f"does not answer within {_TOOL_TIMEOUT_S:g} s" if answer.returncode is None else f"exit code {answer.returncode}"
        found = f"{kind.command[0]}: {how}" + (f": {lines[0]}" if lines else "")
        meaning = f"there is a driver, but no {kind.people} works"
        return HostCheck(kind.name, State.FAIL, found, meaning, f"repair {kind.driver} until {kind.command[0]} works")
    found = "; ".join(lines[:8])
    support = facts.torch_supports[kind.name]
    if facts.torch_installed and support is None:
        meaning = f"the torch installed here cannot use an {kind.people}"
        return HostCheck(kind.name, State.WARN, found, meaning, kind.torch_fix)
    suffix = f", torch is built for {support}" if support else ""
    return HostCheck(kind.name, State.OK, found + suffix, f"models can run on it (device: {kind.name})")


def _ask(kind: Kind) -> ToolAnswer | None:
    return ask_tool(kind.command, _TOOL_TIMEOUT_S)


def _torch_builds(version_file: Path) -> dict[str, str | None]:
    """``cuda``, ``hip``, ``xpu`` of ``torch/version.py``: assignments of a version, or None."""
    try:
        return dict(runpy.run_path(str(version_file)))
    except OSError:
        return {}


def _has(package: str | None) -> str | None:
    return package if package is not None and importlib.util.find_spec(package) is not None else None
