"""The part of a launcher's options that is about the model, the same for every server, and what follows from it."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, FilePath, ValidationError, field_validator, model_validator

from servebench.errors import LaunchError, ProfileError

from ..devices import Inventory, Placement, check_device_name, check_precision, choose, place
from ..host import installed_version
from . import MODELS, HostedModel
from .hosted import Settings, TensorSpec
from .hub import check_hub_name, find_weights

#: Name of the weights in a rendered repository or archive, without suffix.
WEIGHTS_STEM = "weights"


class HostingOptions(BaseModel):
    """Options about the model and where it computes. A launcher's own options come on top."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())

    model_options: dict[str, Any] = Field(default_factory=dict)
    """The model's own options, e.g. `{a_ms: 5, b_ms: 0.5}` for `delay`, `{size: large}` for `bert`."""
    weights: FilePath | None = None
    """File with weights of the network: a torch state dict, or `.safetensors`. When omitted: `weights_hub`, else the shipped
    ones, or random ones where none ship."""
    weights_hub: str | None = None
    """Weights in this machine's Hugging Face cache, never fetched: `ORGANISATION/NAME` or `ORGANISATION/NAME@REVISION`."""
    weights_seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of random weights (`resnet50`, `bert`, `dlrm` and `unet` ship none)."""
    device: str = "auto"
    """`auto`, `cpu`, or `cuda`, `rocm`, `xpu`, `hpu`, `neuron`, `mps`: all such devices, or some by number, e.g. `cuda:0,2`."""
    precision: Literal["fp32", "bf16", "fp16", "int8"] = "fp32"
    """Of weights and arithmetic; tensors travel as declared. `int8` quantises linear layers dynamically, on CPUs only."""
    torch_threads: int = Field(default=1, ge=1)
    """Threads torch uses in each process of the model; processes x threads beyond the number of CPUs slow each other down."""

    @field_validator("weights_hub")
    @classmethod
    def _is_a_hub_name(cls, name: str | None) -> str | None:
        return None if name is None else check_hub_name(name)

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if self.weights is not None and self.weights_hub is not None:
            raise ValueError("weights come from a file (weights) or from the hub cache (weights_hub), not from both")
        return self

    @field_validator("device")
    @classmethod
    def _is_a_device(cls, name: str) -> str:
        return check_device_name(name)


@dataclass(frozen=True, slots=True)
class Hosting:
    """One model with its options checked, on devices that are there."""

    model: HostedModel
    options: HostingOptions
    settings: Settings
    placement: Placement
    weights: Path | None  #: the file to put beside the code; None where they are drawn from the seed
    weights_origin: str  #: for people

    def facts(self, *, processes: int, cpus: int) -> dict[str, Any]:
        """What a report says about the model, which ``processes`` processes host on ``cpus`` CPUs."""
        threads = self.options.torch_threads
        computing = {
            "weights": self._weights_facts(),
            "precision": self.options.precision,
            "torch_threads": threads,
            "threads": {"processes": processes, "each": threads, "total": processes * threads, "cpus": cpus},
        }
        return {
            "model": self.model.name,
            "model_options": self.settings.options,
            "inputs": [_tensor_facts(spec) for spec in self.model.inputs],
            "outputs": [_tensor_facts(self.model.output)],
            "device": self.placement.label,
            "device_reason": self.placement.reason,
            **(computing if self.model.uses_torch else {}),
            # The processes run in this interpreter's environment.
            "torch": installed_version("torch"),
            "numpy": installed_version("numpy"),
        }

    def _weights_facts(self) -> dict[str, Any]:
        if self.weights is None:
            return {"origin": self.weights_origin, "sha256": None}
        with self.weights.open("rb") as file:
            return {"origin": self.weights_origin, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def prepare(name: str, options: HostingOptions, *, server: str, present: Inventory | None = None) -> Hosting:
    """Everything about the model that can be refused before anything starts.

    `ProfileError` where an option does not fit the model, else `LaunchError`.

    ``server`` is the launcher's word for itself, for messages. ``present`` are the devices that the
    server will see; this machine's when omitted.
    """
    if name not in MODELS:
        raise LaunchError(f"there is no model called {name!r} to host on {server}; known: {', '.join(sorted(MODELS))}")
    model = MODELS[name]
    for key in ("weights", "weights_hub"):
        if getattr(options, key) is not None and not model.uses_torch:
            raise ProfileError(f"{key}: {name} has none")
    if options.precision not in model.precisions:
        raise ProfileError(f"precision: {name} has no {options.precision}; it has {', '.join(model.precisions)}")
    if not model.uses_torch:
        placement = _without_torch(name, options.device)
    else:
        placement = place(options.device) if present is None else choose(options.device, present)
    check_precision(options.precision, placement.kind)
    weights, origin = _weights(model, options)
    settings = Settings(
        model=name,
        inputs=model.inputs,
        output=model.output,
        uses_torch=model.uses_torch,
        pads=model.pads,
        options=_model_options(model, options.model_options),
        weights=None if weights is None else f"{WEIGHTS_STEM}{_suffix(weights)}",
        seed=options.weights_seed,
        devices=placement.torch_devices,
        device_plugin=placement.torch_plugin,
        precision=options.precision,
        torch_threads=options.torch_threads,
    )
    return Hosting(model, options, settings, placement, weights, origin)


def _weights(model: HostedModel, options: HostingOptions) -> tuple[Path | None, str]:
    """The file of weights, None where they are drawn from the seed; and where they come from, for people."""
    if options.weights is not None:
        return options.weights, str(options.weights)
    if options.weights_hub is not None:
        found = find_weights(options.weights_hub, os.environ)
        return found.path, found.origin
    if model.weights_path is not None:
        return model.weights_path, str(model.weights_origin)
    return None, f"random, seed {options.weights_seed}"


def _suffix(weights: Path) -> str:
    """Processes tell formats apart by it; everything else is a torch state dict, whatever it is called."""
    return weights.suffix if weights.suffix == ".safetensors" else ".pt"


def _model_options(model: HostedModel, given: dict[str, Any]) -> dict[str, Any]:
    try:
        return model.options.model_validate(given).model_dump()
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(["model_options", *map(str, first["loc"])])
        allowed = ", ".join(model.options.model_fields) or "none"
        raise ProfileError(f"{key}: {first['msg']}, found {first['input']!r}; options of {model.name}: {allowed}") from None


def _without_torch(name: str, device: str) -> Placement:
    if device not in ("auto", "cpu"):
        raise LaunchError(f"device: {name} computes nothing, so it has no use for {device!r}; use cpu")
    return Placement("cpu", (), f"{name} needs no other")


def _tensor_facts(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": spec.datatype, "shape": [-1, *spec.dims]}
