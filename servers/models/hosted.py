"""What a launcher needs to know about a model it hosts: tensors, files, and where the weights come from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output. ``dims`` leaves out the batch axis, which the server adds in front."""

    name: str
    datatype: str  #: KServe v2 name, e.g. ``FP32``
    dims: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class HostedModel:
    """A model that ships with servebench, independent of the server that hosts it.

    ``serving_files`` and ``torchserve_files`` (names in ``folder``) are all the code that Triton's
    and TorchServe's processes import; they import each other relatively and nothing else of
    servebench, so they also run where only the rendered model repository or archive is.
    """

    name: str
    folder: Path
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    serving_files: tuple[str, ...]
    torchserve_files: tuple[str, ...]  #: the handler comes first
    weights_file: str  #: name in ``folder``, and in the rendered repository
    weights_origin: str  #: how the shipped weights were made, for people

    @property
    def weights_path(self) -> Path:
        """The shipped weights."""
        return self.folder / self.weights_file
