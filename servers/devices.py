"""Where a model computes: devices by the names users give them, and what servers and torch call them.

Pure functions of plain values; `detect` alone looks at the machine, through torch, which is what
computes in the end. It does so in a process of its own: torch is large, and a client that is
about to measure must not carry it.

=========  ============================  ======================  ===================
device     Triton's instance group       TorchServe              torch
=========  ============================  ======================  ===================
``cpu``    ``KIND_CPU``                  ``deviceType: cpu``     ``cpu``
``cuda``   ``KIND_GPU`` with ``gpus``    ``gpu``, ``deviceIds``  ``cuda:i``
``rocm``   ``KIND_MODEL``, one a device  ``gpu``, ``deviceIds``  ``cuda:i``
``xpu``    ``KIND_MODEL``, one a device  ``gpu``, ``deviceIds``  ``xpu:i``
``mps``    ``KIND_MODEL``                ``gpu``, ``deviceIds``  ``mps``
``hpu``    ``KIND_MODEL``, one a device  ``cpu``                 ``hpu``
``neuron`` ``KIND_MODEL``, one a device  ``cpu``                 ``xla``
=========  ============================  ======================  ===================

Triton knows CUDA devices only; of the others it is told that the model chooses (``KIND_MODEL``).
Gaudi and Neuron devices belong to one process each, which gets the next free one from their
driver, so they have no numbers here and cannot be chosen by number.
"""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from servebench.errors import LaunchError

from .host import installed_version

#: Devices beside the CPU, in the order in which ``auto`` prefers them.
ACCELERATORS = ("cuda", "rocm", "xpu", "hpu", "neuron", "mps")
_NUMBERED = ("cuda", "rocm", "xpu")
_ALLOWED = "auto, cpu, cuda, rocm, xpu, hpu, neuron, mps; of cuda, rocm and xpu also some by number: cuda:0,2"

_TORCH_NAMES = {"rocm": "cuda", "neuron": "xla"}
#: Modules that teach torch a device.
_PLUGINS = {"hpu": "habana_frameworks.torch.core", "neuron": "torch_neuronx"}
#: Arithmetic of each device beside fp32. int8 here is torch's dynamic quantisation, which has kernels for CPUs only.
_PRECISIONS = {
    "cpu": ("bf16", "fp16", "int8"),
    "cuda": ("bf16", "fp16"),
    "rocm": ("bf16", "fp16"),
    "xpu": ("bf16", "fp16"),
    "hpu": ("bf16",),
    "neuron": ("bf16",),
    "mps": ("bf16", "fp16"),
}

_DETECT_TIMEOUT_S = 120
#: What torch is asked, in a process of its own: prints counts by kind.
DETECT = """
import importlib, json, torch
def count(kind):
    try:
        if kind in ("cuda", "rocm"):
            return torch.cuda.device_count() if (torch.version.hip is None) == (kind == "cuda") else 0
        if kind == "xpu":
            return torch.xpu.device_count()
        if kind == "mps":
            return int(torch.backends.mps.is_available())
        if kind == "hpu":
            importlib.import_module("habana_frameworks.torch.core")
            return torch.hpu.device_count()
        importlib.import_module("torch_neuronx")
        return importlib.import_module("torch_xla.runtime").global_runtime_device_count()
    except (ImportError, AttributeError, RuntimeError):
        return 0
print(json.dumps({kind: count(kind) for kind in %r}))
"""


@dataclass(frozen=True, slots=True)
class Inventory:
    """Devices that torch can use on this machine: how many of each of `ACCELERATORS`, and who says so."""

    counts: Mapping[str, int]
    source: str  #: e.g. ``torch 2.13.0+cpu``


@dataclass(frozen=True, slots=True)
class InstanceGroup:
    """One of Triton's instance groups, without its count."""

    kind: str  #: ``KIND_CPU``, ``KIND_GPU`` or ``KIND_MODEL``
    gpus: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Placement:
    """Devices that were chosen, and why."""

    kind: str  #: ``cpu`` or one of `ACCELERATORS`
    numbers: tuple[int, ...]  #: of the devices; none where devices have no numbers
    reason: str  #: for people
    count: int = 1  #: how many devices

    @property
    def label(self) -> str:
        """As a user would ask for it: ``cpu``, ``cuda:0,1``, ``hpu``."""
        return f"{self.kind}:{','.join(map(str, self.numbers))}" if self.numbers else self.kind

    @property
    def torch_devices(self) -> tuple[str, ...]:
        """torch's name of each device."""
        name = _TORCH_NAMES.get(self.kind, self.kind)
        return tuple(f"{name}:{number}" for number in self.numbers) or (name,) * self.count

    @property
    def torch_plugin(self) -> str | None:
        """Module to import before torch knows the device."""
        return _PLUGINS.get(self.kind)

    @property
    def instance_groups(self) -> tuple[InstanceGroup, ...]:
        """Triton's instance groups that spread the model over the devices."""
        if self.kind == "cpu":
            return (InstanceGroup("KIND_CPU"),)
        if self.kind == "cuda":
            return (InstanceGroup("KIND_GPU", self.numbers),)
        return (InstanceGroup("KIND_MODEL"),) * self.count

    @property
    def torchserve_device_type(self) -> str:
        """TorchServe's ``deviceType``."""
        return "gpu" if self.torchserve_device_ids else "cpu"

    @property
    def torchserve_device_ids(self) -> tuple[int, ...]:
        """TorchServe's ``deviceIds``; none where TorchServe sees a CPU."""
        return (0,) if self.kind == "mps" else self.numbers


def check_device_name(name: str) -> str:
    """``name`` itself, if it is one of a device; `ValueError` lists those that are allowed."""
    _parse(name)
    return name


def check_precision(precision: str, kind: str) -> None:
    """`LaunchError` where a device of this kind has no such arithmetic."""
    allowed = ("fp32", *_PRECISIONS[kind])
    if precision not in allowed:
        raise LaunchError(f"precision: {kind} has no {precision} here; it has {', '.join(allowed)}")


def choose(name: str, present: Inventory) -> Placement:
    """The devices of a name among those that are there; ``auto`` takes all of the first kind of `ACCELERATORS`, else the CPU.

    `LaunchError` for what is not there.
    """
    kind, numbers = _parse(name)
    if kind == "auto":
        kind = next((one for one in ACCELERATORS if present.counts.get(one)), "cpu")
        reason = f"auto: {present.source} sees {_listed(present)}"
    else:
        reason = "asked for"
    if kind == "cpu":
        return Placement("cpu", (), reason)
    count = present.counts.get(kind, 0)
    missing = [number for number in numbers if number >= count]
    if count == 0 or missing:
        what = f"there is no {kind}:{missing[0]}" if missing else f"there is no {kind} device"
        raise LaunchError(f"device: {what}; {present.source} sees {_listed(present)}")
    if kind in _NUMBERED:
        numbers = numbers or tuple(range(count))
        count = len(numbers)
    return Placement(kind, numbers, reason, count)


def place(name: str) -> Placement:
    """`choose` on this machine, which is looked at only where that matters."""
    return choose(name, Inventory({}, "nobody") if name == "cpu" else detect())


@functools.cache
def detect() -> Inventory:
    """The devices of this machine, as torch sees them. `LaunchError` without torch, or when it fails."""
    version = installed_version("torch")
    if version is None:
        raise LaunchError(
            "the model needs torch, which is not installed; it comes with the server's extra: pip install 'servebench[triton]' "
            "or 'servebench[torchserve]'"
        )
    if version.endswith("+cpu") and sys.platform == "linux":  # built without accelerators: no need to ask
        return Inventory({}, f"torch {version}")
    try:
        asked = subprocess.run(
            [sys.executable, "-c", DETECT % (ACCELERATORS,)],
            capture_output=True,
            text=True,
            timeout=_DETECT_TIMEOUT_S,
            check=True,
        )
        counts: dict[str, int] = json.loads(asked.stdout.splitlines()[-1])
    except (subprocess.SubprocessError, ValueError, IndexError) as error:
        last = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1:]
        raise LaunchError(f"device: torch {version} cannot say which devices there are: {''.join(last)}") from None
    return Inventory(counts, f"torch {version}")


def _parse(name: str) -> tuple[str, tuple[int, ...]]:
    match = re.fullmatch(rf"(auto|cpu|{'|'.join(ACCELERATORS)})(?::(\d+(?:,\d+)*))?", name, flags=re.ASCII)
    numbers = tuple(int(one) for one in match[2].split(",")) if match and match[2] else ()
    if match is None or (numbers and match[1] not in _NUMBERED) or len(set(numbers)) < len(numbers):
        raise ValueError(f"found {name!r}, allowed: {_ALLOWED}")
    return match[1], numbers


def _listed(present: Inventory) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in present.counts.items() if count) or "no accelerator"
