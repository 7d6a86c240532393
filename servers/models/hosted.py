"""What a launcher needs to know about a model it hosts: tensors, files, options, and where the weights come from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from . import serving
from .serving.settings import Settings, TensorSpec

__all__ = ["HostedModel", "ModelOptions", "Settings", "TensorSpec"]

_SERVING = Path(serving.__file__).parent


class ModelOptions(BaseModel):
    """``model_options`` of one model; this one has none. What is in here goes to the ``build`` of its ``network.py``."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


@dataclass(frozen=True, slots=True)
class HostedModel:
    """A model that ships with servebench, independent of the server that hosts it.

    ``folder`` has the model's own ``network.py``; what surrounds it in a server's process is the
    same for all models (`serving`).
    """

    name: str
    summary: str  #: one line for people
    folder: Path
    inputs: tuple[TensorSpec, ...]
    output: TensorSpec
    options: type[ModelOptions] = ModelOptions
    uses_torch: bool = True
    pads: bool = False  #: queries of different sizes can share a batch
    precisions: tuple[str, ...] = ("fp32",)
    traced_size: int = 1  #: that open axes may have, for an example to trace the network with
    weights_file: str | None = None  #: of the shipped weights, in ``folder``; None where weights come from a seed
    weights_origin: str | None = None  #: how the shipped weights were made, for people

    @property
    def weights_path(self) -> Path | None:
        """The shipped weights."""
        return None if self.weights_file is None else self.folder / self.weights_file

    def serving_files(self, names: tuple[str, ...]) -> list[Path]:
        """The code that a server's processes import: the common files of these names, and the model's own."""
        return [*(_SERVING / name for name in names), self.folder / "network.py"]
