"""Tensors of models that their server does not describe (TorchServe): declared by who launched it, or by the samples' files."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from servebench.errors import LaunchError, ProfileError
from servebench.load.library import SampleLibrary, row_spec
from servebench.profile import Samples
from servebench.wire.tensors import DATATYPES, Array, TensorSpec, has_batch_axis

#: The input that a request body is, where samples are files.
BODY = "data"

#: What numpy and zipfile raise for damaged files.
_UNREADABLE = (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)


def specs_of_file(path: Path) -> tuple[TensorSpec, ...]:
    """One spec per array of an npz file: its rows' shape and dtype. `ProfileError` for other files and dtypes."""
    try:
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if isinstance(archive, np.ndarray):
                raise ProfileError(f"{path}: a single array, expected an npz file with named arrays")
            return tuple(_spec(path, name, archive[name]) for name in archive.files)
    except _UNREADABLE as error:
        raise ProfileError(f"{path}: not a readable npz file: {' '.join(str(error).split())}") from None


def specs_of_folder(path: Path) -> tuple[TensorSpec, ...]:
    """One spec per ``<input>.npy`` of a directory, as `specs_of_file`."""
    files = sorted(path.glob("*.npy"))
    if not files:
        raise ProfileError(f"samples.path: {path}: no directory with npy files; source npy reads one <input>.npy per input")
    specs = []
    for file in files:
        try:
            specs.append(_spec(file, file.stem, np.load(file, mmap_mode="r", allow_pickle=False)))
        except _UNREADABLE as error:
            raise ProfileError(f"{file}: not a readable npy file: {' '.join(str(error).split())}") from None
    return tuple(specs)


def launched_specs(described: Mapping[str, Any]) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Inputs and outputs, one row each, that a launcher's description of its server declares; none where it is silent.

    An output is left out where its size says no shape: several sizes left open, or strings.
    `LaunchError` for what is not a list of objects with name, datatype and shape.
    """
    inputs, outputs = (_described(described, key) for key in ("inputs", "outputs"))
    batched = has_batch_axis(inputs, None)
    rows = [row_spec(spec, batched=batched) for spec in outputs]
    return (
        tuple(row_spec(spec, batched=batched) for spec in inputs),
        tuple(spec for spec in rows if spec.shape.count(-1) < 2 and spec.datatype != "BYTES"),
    )


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
    if samples.source == "npy" and samples.path is not None:
        return specs_of_folder(samples.path)
    raise ProfileError(
        f"samples.source: {samples.source!r} says no datatypes, and TorchServe describes its model's inputs only where the run "
        "launches it (server.launch); use npz, npy or files"
    )


def _described(described: Mapping[str, Any], key: str) -> list[TensorSpec]:
    specs = []
    declared = described.get(key, [])
    for tensor in declared if isinstance(declared, list) else [declared]:
        match tensor:
            case {"name": str() as name, "datatype": str() as datatype, "shape": [*shape]} if datatype in DATATYPES and all(
                type(size) is int and size >= -1 for size in shape
            ):
                specs.append(TensorSpec(name, datatype, tuple(shape)))
            case _:
                raise LaunchError(
                    f"the launcher describes the model's {key} with {tensor!r}; a tensor has name, KServe datatype and shape"
                )
    return specs


def _spec(path: Path, name: str, array: Array) -> TensorSpec:
    if array.dtype.kind in "SU":
        return TensorSpec(name, "BYTES", array.shape[1:])
    for datatype, dtype in DATATYPES.items():
        if datatype != "BF16" and np.dtype(dtype) == array.dtype.newbyteorder("<"):
            return TensorSpec(name, datatype, array.shape[1:])
    raise ProfileError(f"{path}: array {name!r}: dtype {array.dtype} has no KServe datatype")
