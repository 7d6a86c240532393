"""Tensors of models that their server does not describe (TorchServe): declared by the files that hold them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from servebench.errors import ProfileError
from servebench.load.library import SampleLibrary
from servebench.profile import Samples
from servebench.wire.tensors import DATATYPES, Array, TensorSpec

#: The input that a request body is, where samples are files.
BODY = "data"


def specs_of_file(path: Path) -> tuple[TensorSpec, ...]:
    """One spec per array of an npz file: its rows' shape and dtype. `ProfileError` for other files and dtypes."""
    try:
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if isinstance(archive, np.ndarray):
                raise ProfileError(f"{path}: a single array, expected an npz file with named arrays")
            return tuple(_spec(path, name, archive[name]) for name in archive.files)
    except (OSError, ValueError, EOFError) as error:
        raise ProfileError(f"{path}: not a readable npz file: {' '.join(str(error).split())}") from None


def files_library(samples: Samples) -> SampleLibrary:
    """Every file of a directory is the body of one query, in the order of their names."""
    assert samples.path is not None, "the profile's schema sees to it"
    if not samples.path.is_dir():
        raise ProfileError(f"samples.path: {samples.path}: not a directory; source files reads one, a query's body per file")
    bodies: list[Array] = []
    for file in sorted(path for path in samples.path.iterdir() if path.is_file() and not path.name.startswith(".")):
        body = np.empty((), dtype=object)
        body[()] = file.read_bytes()
        bodies.append(body)
    if not bodies:
        raise ProfileError(f"samples.path: {samples.path}: holds no files")
    return SampleLibrary(len(bodies), None, {BODY: bodies})


def input_specs(samples: Samples) -> tuple[TensorSpec, ...]:
    """What a model takes, judged by the samples it is to be given. `ProfileError` when they don't tell."""
    if samples.source == "files":
        return (TensorSpec(BODY, "BYTES", ()),)
    if samples.source == "npz" and samples.path is not None:
        return specs_of_file(samples.path)
    raise ProfileError(
        f"samples.source: {samples.source!r} needs a server that describes its model's inputs, which this one does not; "
        "use npz or files"
    )


def _spec(path: Path, name: str, array: Array) -> TensorSpec:
    if array.dtype.kind in "SU":
        return TensorSpec(name, "BYTES", array.shape[1:])
    for datatype, dtype in DATATYPES.items():
        if datatype != "BF16" and np.dtype(dtype) == array.dtype.newbyteorder("<"):
            return TensorSpec(name, datatype, array.shape[1:])
    raise ProfileError(f"{path}: array {name!r}: dtype {array.dtype} has no KServe datatype")
