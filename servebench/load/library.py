"""The sample library: the payload tensors that queries carry, made or read before the clock starts.

A *row* is one model input set as a source delivers it: one entry of an npz array's first axis,
one step of a perf-analyzer file. A *sample* is what one query carries. Where the model has a
batch axis, sample i stacks ``batch_size`` consecutive rows from row i * batch_size on, the last
one wrapping round to row 0, so a file of n rows gives ceil(n / batch_size) samples. Where it
has none, sample i is row i. Generated sources make ``count`` samples.

Tensors are views of the source wherever that is possible (`npy` files stay on disk until they
are read), so a library costs little more than its source.
"""

from __future__ import annotations

import base64
import json
import tokenize
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from servebench.errors import ProfileError
from servebench.profile import Samples
from servebench.wire.tensors import Array, TensorSpec, dtype_text, from_blob, from_values, has_batch_axis, holds, numpy_dtype

#: Rows of one tensor: an array whose first axis counts them, or one array each where shapes differ.
Rows = Array | Sequence[Array]
Shape = tuple[int, ...]

_OPEN_SIZE_EXAMPLE = 16
_RANDOM_STRING_BYTES = 128  # perf_analyzer's default, so that results compare
_RANDOM_INTEGER_LIMIT = 128  # wide integers are mostly token ids and indices: small ones are valid nearly everywhere
_ALPHABET = np.frombuffer(b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz", np.uint8)

#: What numpy and zipfile raise for damaged files; RuntimeError covers encrypted and unsupported archives.
_UNREADABLE = (OSError, ValueError, EOFError, RuntimeError, tokenize.TokenError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True, slots=True)
class SampleLibrary:
    """Samples by index, and the golden outputs that came with them."""

    rows: int  #: rows of the source
    batch_size: int | None  #: rows per sample; None where the model has no batch axis
    inputs: Mapping[str, Rows]
    golden: Mapping[str, Rows] | None = None  #: expected outputs, one row per row of the source

    def __len__(self) -> int:
        step = self.batch_size or 1
        return (self.rows + step - 1) // step

    def arrays(self, index: int) -> dict[str, Array]:
        """Sample ``index`` (0 to len - 1) by input name, the batch axis leading where the model has one; read-only use."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of a library of {len(self)}")
        return {name: sample_of(rows, index, self.batch_size) for name, rows in self.inputs.items()}


def sample_of(rows: Rows, index: int, batch_size: int | None) -> Array:
    """The rows that belong to sample ``index``, stacked if there is a batch axis; a view where possible."""
    if batch_size is None:
        return rows[index]
    start, stop = index * batch_size, (index + 1) * batch_size
    if isinstance(rows, np.ndarray) and stop <= len(rows):
        return rows[start:stop]
    if batch_size == 1:
        return rows[start][np.newaxis]
    return np.stack([rows[row % len(rows)] for row in range(start, stop)])


def build_library(
    samples: Samples, inputs: Sequence[TensorSpec], max_batch_size: int | None, outputs: Sequence[TensorSpec] = ()
) -> SampleLibrary:
    """Make or read the samples that a profile asks for, shaped for a model's ``inputs``.

    ``max_batch_size`` is the model configuration's, None when the server has none
    (`has_batch_axis`). ``outputs`` are needed to read the ``validation_data`` of a
    perf-analyzer file. `ProfileError` names the key or file, the input, what was found and
    what is expected.
    """
    if not inputs:
        raise ProfileError("samples: the server names no inputs for this model, so no payload can be made")
    batched = has_batch_axis(inputs, max_batch_size)
    _check_batch_size(samples.batch_size, batched=batched, max_batch_size=max_batch_size)
    declared = [row_spec(spec, batched=batched) for spec in inputs]
    specs = _apply_shapes(samples.shapes, declared)
    batch_size = samples.batch_size if batched else None
    golden: dict[str, list[Array]] | None = None
    rows: Mapping[str, Rows]
    if samples.path is None:
        _require_closed(specs)
        count = samples.count * (batch_size or 1)
        _check_limits(samples.limits, specs)
        make = _zeros if samples.source == "zero" else _Random(samples.payload_seed, samples.limits).rows
        rows = {spec.name: make(spec, count) for spec in specs}
    elif samples.source == "npz":
        rows = read_npz(samples.path, specs, what="input")
    elif samples.source == "npy":
        rows = _read_npy_folder(samples.path, specs)
    else:
        expected = [row_spec(spec, batched=batched) for spec in outputs]
        steps, golden = _read_perf_analyzer(samples.path, declared, samples.shapes, expected)
        for tensors in (steps, golden or {}):
            _require_equal_shapes(samples.path, tensors, batch_size)
        rows = steps
    return SampleLibrary(len(next(iter(rows.values()))), batch_size, rows, golden)


def row_spec(spec: TensorSpec, *, batched: bool) -> TensorSpec:
    """``spec`` without its batch axis, if it has one: what one row has."""
    return TensorSpec(spec.name, spec.datatype, spec.shape[1:]) if batched and spec.shape[:1] == (-1,) else spec


def fits(shape: Sequence[int], declared: Sequence[int]) -> bool:
    """Whether ``shape`` is one that ``declared`` allows; -1 there allows any size."""
    return len(shape) == len(declared) and all(want in (-1, have) for have, want in zip(shape, declared, strict=True))


def read_npz(path: Path, specs: Sequence[TensorSpec], *, what: str, partial: bool = False) -> dict[str, Array]:
    """Arrays of an npz file by tensor name, first axis = rows, each checked against its (row) spec.

    ``what`` is "input" or "output", for messages. Every tensor must be there unless
    ``partial``; an array that is none of the tensors, or another number of rows, is a
    `ProfileError`.
    """
    try:
        with path.open("rb") as file:  # given a path, numpy leaves the file open when it is no zip archive
            archive = np.load(file, allow_pickle=False)
            if isinstance(archive, np.ndarray):
                raise ProfileError(f"{path}: a single array, expected an npz file with one array per {what}")
            _check_names(f"{path}", archive.files, specs, what, partial=partial)
            arrays = {spec.name: archive[spec.name] for spec in specs if spec.name in archive.files}
    except _UNREADABLE as error:
        raise ProfileError(f"{path}: not a readable npz file: {' '.join(str(error).split())}") from None
    for spec in specs:
        if spec.name in arrays:
            _check_array(path, arrays[spec.name], spec, what)
    _check_row_counts(path, arrays, what)
    return arrays


def _read_npy_folder(path: Path, specs: Sequence[TensorSpec]) -> dict[str, Array]:
    if not path.is_dir():
        raise ProfileError(f"{path}: not a directory; source npy reads a directory with one <input>.npy per input")
    _check_names(f"{path}", [file.stem for file in sorted(path.glob("*.npy"))], specs, "input")
    arrays = {}
    for spec in specs:
        file = path / f"{spec.name}.npy"
        try:
            arrays[spec.name] = np.load(file, mmap_mode="r", allow_pickle=False)
        except _UNREADABLE as error:
            raise ProfileError(f"{file}: not a readable npy file: {' '.join(str(error).split())}") from None
        _check_array(file, arrays[spec.name], spec, "input")
    _check_row_counts(path, arrays, "input")
    return arrays


def _check_names(where: str, found: Sequence[str], specs: Sequence[TensorSpec], what: str, *, partial: bool = False) -> None:
    names = [spec.name for spec in specs]
    unknown = [name for name in found if name not in names]
    missing = [name for name in names if name not in found]
    if unknown:
        raise ProfileError(f"{where}: {unknown[0]!r} is not an {what} of the model; its {what}s: {', '.join(names)}")
    if (missing and not partial) or not found:
        raise ProfileError(f"{where}: {what} {missing[0]!r} is missing; found: {', '.join(found) or 'nothing'}")


def _check_array(path: Path, array: Array, spec: TensorSpec, what: str) -> None:
    if not holds(array, spec.datatype):
        expected = f"{dtype_text(spec.datatype)} for {spec.datatype}"
        raise ProfileError(f"{path}: {what} {spec.name!r}: found dtype {array.dtype}, expected {expected}")
    if array.ndim == 0 or len(array) == 0 or not fits(array.shape[1:], spec.shape):
        expected = ", ".join(["rows", *map(str, spec.shape)])
        raise ProfileError(f"{path}: {what} {spec.name!r}: found shape {list(array.shape)}, expected [{expected}]")


def _check_row_counts(path: Path, arrays: Mapping[str, Array], what: str) -> None:
    counts = {name: len(array) for name, array in arrays.items()}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name} has {count}" for name, count in counts.items())
        raise ProfileError(f"{path}: {what}s differ in their number of rows: {listed}")


def _check_batch_size(batch_size: int, *, batched: bool, max_batch_size: int | None) -> None:
    if batch_size > 1 and not batched:
        raise ProfileError(f"samples.batch_size: found {batch_size}, but the model has no batch axis; only 1 is possible")
    if max_batch_size and batch_size > max_batch_size:
        raise ProfileError(f"samples.batch_size: found {batch_size}, but the model's max_batch_size is {max_batch_size}")


def _apply_shapes(shapes: Mapping[str, Sequence[int]], specs: Sequence[TensorSpec]) -> list[TensorSpec]:
    names = [spec.name for spec in specs]
    for name, shape in shapes.items():
        if name not in names:
            raise ProfileError(f"samples.shapes: {name!r} is not an input of the model; its inputs: {', '.join(names)}")
        declared = specs[names.index(name)].shape
        if not fits(shape, declared) or any(size < 0 for size in shape):
            raise ProfileError(f"samples.shapes.{name}: found {list(shape)}, expected {list(declared)} (-1 is any size)")
    return [TensorSpec(spec.name, spec.datatype, tuple(shapes.get(spec.name, spec.shape))) for spec in specs]


def _require_closed(specs: Sequence[TensorSpec]) -> None:
    for spec in specs:
        if -1 in spec.shape:
            raise ProfileError(
                f"samples.shapes.{spec.name}: required, because the model leaves sizes open: {list(spec.shape)}; "
                f"write for example shapes: {{{spec.name}: {_example(spec)}}}"
            )


def _example(spec: TensorSpec) -> list[int]:
    return [_OPEN_SIZE_EXAMPLE if size == -1 else size for size in spec.shape]


def _check_limits(limits: Mapping[str, int], specs: Sequence[TensorSpec]) -> None:
    integers = {spec.name: np.iinfo(numpy_dtype(spec.datatype)) for spec in specs if "INT" in spec.datatype}
    for name, limit in limits.items():
        if name not in integers:
            raise ProfileError(
                f"samples.limits: {name!r} is not an integer input of the model; those: {', '.join(integers) or 'none'}"
            )
        if limit > integers[name].max + 1:
            raise ProfileError(f"samples.limits.{name}: found {limit}, at most {integers[name].max + 1} is possible")


def _zeros(spec: TensorSpec, count: int) -> Array:
    zero = np.array(b"") if spec.datatype == "BYTES" else np.zeros((), numpy_dtype(spec.datatype))
    return np.broadcast_to(zero, (count, *spec.shape))


class _Random:
    """Seeded rows (PCG64), an independent stream per input in the model's order."""

    def __init__(self, seed: int, limits: Mapping[str, int]) -> None:
        self._seeds = np.random.SeedSequence(seed)
        self._limits = limits

    def rows(self, spec: TensorSpec, count: int) -> Array:
        """Floats in [0, 1), booleans, text; integers in [0, limit), or else all of 8 bits, wider ones in [0, 128)."""
        random = np.random.Generator(np.random.PCG64(self._seeds.spawn(1)[0]))
        shape, dtype = (count, *spec.shape), numpy_dtype(spec.datatype)
        match spec.datatype:
            case "BYTES":
                letters: Array = _ALPHABET[random.integers(len(_ALPHABET), size=(*shape, _RANDOM_STRING_BYTES), dtype=np.uint8)]
                return letters.view(f"S{_RANDOM_STRING_BYTES}").reshape(shape)
            case "BOOL":
                return random.integers(2, size=shape, dtype=np.uint8).astype(dtype)
            case "FP16":  # multiples of 2^-11 are exact in half precision: no value rounds up to 1
                return (random.integers(2**11, size=shape, dtype=np.uint16) / np.float32(2**11)).astype(dtype)
            case "BF16":  # as above with 2^-8; a bfloat16 is the upper half of a single
                singles = random.integers(2**8, size=shape, dtype=np.uint16) / np.float32(2**8)
                return (singles.view(np.uint32) >> 16).astype(dtype)
            case "FP32" | "FP64":
                return random.random(shape, np.float32 if spec.datatype == "FP32" else np.float64)
            case "INT8" | "UINT8" if spec.name not in self._limits:
                limits = np.iinfo(dtype)
                return random.integers(limits.min, limits.max, size=shape, dtype=dtype, endpoint=True)
            case _:
                return random.integers(self._limits.get(spec.name, _RANDOM_INTEGER_LIMIT), size=shape, dtype=dtype)


# --- perf_analyzer's input JSON ------------------------------------------------------------
# {"data": [STEP, ...] or [[STEP, ...], ...], "validation_data": same}; a STEP gives a tensor as
# [flat values], {"content": [flat values] or {"b64": text}, "shape": [...]} or {"b64": text}.
# A shape in the file goes before the one in samples.shapes.


def _read_perf_analyzer(
    path: Path, inputs: Sequence[TensorSpec], shapes: Mapping[str, Sequence[int]], outputs: Sequence[TensorSpec]
) -> tuple[dict[str, list[Array]], dict[str, list[Array]] | None]:
    """Input rows, and golden rows where the file has ``validation_data`` and outputs are known."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ProfileError(f"{path}: not a readable JSON file: {error}") from None
    if not isinstance(document, dict) or "data" not in document:
        raise ProfileError(f"{path}: expected an object with the key data, as perf_analyzer's --input-data has")
    unknown = set(document) - {"data", "validation_data"}
    if unknown:
        raise ProfileError(f"{path}: unknown key {min(unknown)!r}; allowed here: data, validation_data")
    rows = _read_steps(f"{path}: data", document["data"], inputs, shapes, "input")
    if "validation_data" not in document or not outputs:
        return rows, None
    golden = _read_steps(f"{path}: validation_data", document["validation_data"], outputs, {}, "output")
    found, expected = (len(next(iter(tensors.values()))) for tensors in (golden, rows))
    if found != expected:
        raise ProfileError(f"{path}: validation_data has {found} steps, expected {expected} as data has")
    return rows, golden


def _read_steps(
    where: str, streams: object, specs: Sequence[TensorSpec], shapes: Mapping[str, Sequence[int]], what: str
) -> dict[str, list[Array]]:
    listed = streams if isinstance(streams, list) else []
    steps = [step for stream in listed for step in (stream if isinstance(stream, list) else [stream])]
    if not steps:
        raise ProfileError(f"{where}: found no steps, expected a list of them")
    rows: dict[str, list[Array]] = {spec.name: [] for spec in specs}
    for number, step in enumerate(steps):
        here = f"{where} step {number}"
        if not isinstance(step, dict):
            raise ProfileError(f"{here}: found {type(step).__name__}, expected an object of {what}s")
        _check_names(here, list(step), specs, what)
        for spec in specs:
            try:
                rows[spec.name].append(_step_tensor(step[spec.name], spec, shapes.get(spec.name, spec.shape)))
            except ValueError as error:
                raise ProfileError(f"{here}, {what} {spec.name!r}: {error}") from None
    return rows


def _step_tensor(value: Any, spec: TensorSpec, default_shape: Sequence[int]) -> Array:
    content, shape = value, default_shape
    if isinstance(value, dict):
        unknown = set(value) - {"content", "shape", "b64"}
        if unknown:
            raise ValueError(f"unknown key {min(unknown)!r}; allowed here: content, shape, b64")
        content = value if "b64" in value else value.get("content")
        shape = value.get("shape", default_shape)
    if not isinstance(shape, list | tuple) or any(type(size) is not int for size in shape) or not fits(shape, spec.shape):
        raise ValueError(f"found shape {shape}, expected {list(spec.shape)} (-1 is any size)")
    if any(size < 0 for size in shape):
        raise ValueError(
            f"the model leaves sizes open: {list(spec.shape)}; write for example "
            f'{{"content": [...], "shape": {_example(spec)}}}, or set samples.shapes for inputs'
        )
    if isinstance(content, dict) and isinstance(content.get("b64"), str):
        try:
            blob = base64.b64decode(content["b64"], validate=True)
        except ValueError:
            raise ValueError("b64 is not base64 text") from None
        return from_blob(memoryview(blob), spec.datatype, shape)
    if not isinstance(content, list):
        raise ValueError("found neither a flat list of values nor a b64 text")
    return from_values(content, spec.datatype, shape)


def _require_equal_shapes(path: Path, rows: Mapping[str, Sequence[Array]], batch_size: int | None) -> None:
    for name, arrays in rows.items():
        shapes = sorted({array.shape for array in arrays})
        if len(shapes) > 1 and batch_size not in (None, 1):
            raise ProfileError(f"{path}: {name!r}: steps of shapes {shapes} cannot share a batch of {batch_size}")
