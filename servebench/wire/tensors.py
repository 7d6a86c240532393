"""Tensors as the KServe v2 protocol names and serialises them, whatever carries them.

One table maps KServe datatypes to numpy, and two pairs of functions turn elements into what
travels: `to_blob` / `from_blob` for the binary form (row-major, little-endian; BYTES elements
each behind a 4-byte little-endian length), and `to_json` / `from_json` for plain JSON values.
BF16 has no numpy dtype: its elements are kept as the raw 16 bits in ``uint16``. BYTES are
object arrays of ``bytes``; numpy's own string arrays (kinds S and U) are accepted too.

Everything malformed is a `ValueError` whose text is the second half of a sentence; the caller
knows which tensor it was.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

#: KServe v2 datatype -> numpy dtype as it travels.
DATATYPES: Mapping[str, np.dtype[Any]] = MappingProxyType(
    {
        "BOOL": np.dtype(np.bool_),
        "INT8": np.dtype("<i1"),
        "INT16": np.dtype("<i2"),
        "INT32": np.dtype("<i4"),
        "INT64": np.dtype("<i8"),
        "UINT8": np.dtype("<u1"),
        "UINT16": np.dtype("<u2"),
        "UINT32": np.dtype("<u4"),
        "UINT64": np.dtype("<u8"),
        "FP16": np.dtype("<f2"),
        "FP32": np.dtype("<f4"),
        "FP64": np.dtype("<f8"),
        "BF16": np.dtype("<u2"),
        "BYTES": np.dtype(object),
    }
)

_LENGTH = struct.Struct("<I")
_STRING_KINDS = "OSU"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """An input or output as the model declares it; -1 in ``shape`` is a size left open."""

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ModelMetadata:
    """What a server says about a model. ``max_batch_size`` is None when no configuration told it."""

    name: str
    versions: tuple[str, ...]
    platform: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    max_batch_size: int | None = None

    @property
    def batched(self) -> bool:
        """Whether tensors lead with a batch axis: see `has_batch_axis`."""
        return has_batch_axis(self.inputs, self.max_batch_size)


def has_batch_axis(inputs: Sequence[TensorSpec], max_batch_size: int | None) -> bool:
    """Whether the shapes of a model's tensors lead with a batch axis.

    Triton's configuration decides: ``max_batch_size`` > 0 says yes (its metadata then puts -1
    in front of every shape), 0 says no, even where a shape happens to begin with -1. Servers
    without such a configuration (None) have a batch axis when every input begins with -1.
    """
    if max_batch_size is not None:
        return max_batch_size > 0
    return bool(inputs) and all(spec.shape[:1] == (-1,) for spec in inputs)


def numpy_dtype(datatype: str) -> np.dtype[Any]:
    """The numpy dtype of a KServe datatype."""
    try:
        return DATATYPES[datatype]
    except KeyError:
        raise ValueError(f"datatype {datatype!r} is not a KServe datatype; known: {', '.join(DATATYPES)}") from None


def holds(array: Array, datatype: str) -> bool:
    """Whether ``array`` has the dtype of ``datatype``, in any byte order."""
    expected = numpy_dtype(datatype)
    if datatype == "BYTES":
        return array.dtype.kind in _STRING_KINDS
    return bool(array.dtype.newbyteorder("<") == expected)


def dtype_text(datatype: str) -> str:
    """How to say `numpy_dtype` to people."""
    expected = numpy_dtype(datatype)
    return "strings (numpy S or U)" if datatype == "BYTES" else f"{expected.name}{' (raw bits)' if datatype == 'BF16' else ''}"


def to_blob(array: Array, datatype: str) -> bytes:
    """``array`` in the binary form."""
    _require_dtype(array, datatype)
    if datatype == "BYTES":
        return b"".join(_LENGTH.pack(len(item)) + item for item in byte_strings(array))
    return array.astype(DATATYPES[datatype], copy=False).tobytes()


def from_blob(blob: memoryview, datatype: str, shape: Sequence[int]) -> Array:
    """The tensor behind a blob, as a read-only view of it (BYTES are copied)."""
    dtype, count = numpy_dtype(datatype), math.prod(shape)
    if datatype == "BYTES":
        return _reshape(_object_array(_split_strings(blob, count)), shape)
    if len(blob) != count * dtype.itemsize:
        raise ValueError(f"{len(blob)} bytes of data, but shape {list(shape)} of {datatype} needs {count * dtype.itemsize}")
    if datatype == "BOOL" and count and np.frombuffer(blob, np.uint8).max() > 1:
        raise ValueError("BOOL bytes other than 0 and 1")
    return _reshape(np.frombuffer(blob, dtype), shape)


def to_json(array: Array, datatype: str) -> list[Any]:
    """``array`` as a flat list of JSON values. There are none for FP16, BF16, NaN, infinities and bytes that are not UTF-8."""
    _require_dtype(array, datatype)
    _require_json(datatype)
    if datatype == "BYTES":
        try:
            return [item.decode() for item in byte_strings(array)]
        except UnicodeDecodeError:
            raise ValueError("holds bytes that are not UTF-8, which JSON cannot carry; use the binary format") from None
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError("holds NaN or infinity, which JSON cannot carry; use the binary format")
    values: list[Any] = array.ravel().tolist()
    return values


def from_json(data: object, datatype: str, shape: Sequence[int]) -> Array:
    """The tensor behind JSON values: a flat row-major list, or lists nested as ``shape`` says.

    NaN and Infinity are accepted in floats: Triton writes them, although JSON has no such words.
    """
    _require_json(datatype)
    if not isinstance(data, list):
        raise ValueError("data is not a list")
    return from_values(_flatten(data, shape), datatype, shape)


def from_values(values: Sequence[object], datatype: str, shape: Sequence[int]) -> Array:
    """The tensor of row-major Python values (numbers, booleans, strings), each checked against ``datatype``."""
    if len(values) != math.prod(shape):
        raise ValueError(f"{len(values)} values, but shape {list(shape)} needs {math.prod(shape)}")
    return _reshape(_checked_values(values, datatype), shape)


def _checked_values(values: Sequence[object], datatype: str) -> Array:
    dtype = numpy_dtype(datatype)
    if datatype == "BF16":
        raise ValueError("BF16 cannot be written as numbers; give its raw bytes")
    if datatype == "BYTES":
        _require_types(values, (str,), datatype)
        return _object_array([_to_bytes(value) for value in values])
    if dtype.kind == "b":
        _require_types(values, (bool,), datatype)
        return np.array(values, dtype)
    if dtype.kind in "iu":
        _require_types(values, (int,), datatype)
        limits = np.iinfo(dtype)
        for value in values:
            if not limits.min <= value <= limits.max:  # type: ignore[operator]
                raise ValueError(f"a value outside {datatype}'s range of {limits.min} to {limits.max}")
        return np.array(values, dtype)
    _require_types(values, (int, float), datatype)
    try:
        wide = np.array(values, np.float64)
    except OverflowError:  # an integer beyond any float
        raise ValueError(f"a value outside {datatype}'s range") from None
    with np.errstate(over="ignore"):
        narrow = wide.astype(dtype)
    if (np.isinf(narrow) & np.isfinite(wide)).any():
        raise ValueError(f"a value outside {datatype}'s range")
    return narrow


def byte_strings(array: Array) -> list[bytes]:
    """A BYTES tensor's elements in row-major order; text is encoded as UTF-8."""
    return [_to_bytes(item) for item in array.ravel().tolist()]


def _to_bytes(item: object) -> bytes:
    if isinstance(item, bytes):
        return item
    if isinstance(item, str):
        try:
            return item.encode()
        except UnicodeEncodeError:
            raise ValueError("text with a lone surrogate, which UTF-8 cannot carry") from None
    raise ValueError(f"a BYTES element is {type(item).__name__}, expected bytes or str")


def _split_strings(blob: memoryview, count: int) -> list[bytes]:
    # Each element takes at least its length field: a count that cannot fit is refused before any loop over it.
    if len(blob) < count * _LENGTH.size:
        raise ValueError(f"{len(blob)} bytes of data cannot hold {count} BYTES elements")
    items, offset = [], 0
    for index in range(count):
        start = offset + _LENGTH.size
        end = start + _LENGTH.unpack_from(blob, offset)[0] if start <= len(blob) else start
        if end > len(blob):
            raise ValueError(f"BYTES element {index} of {count} is cut short")
        items.append(bytes(blob[start:end]))
        offset = end
    if offset != len(blob):
        raise ValueError(f"{len(blob) - offset} bytes left over after {count} BYTES elements")
    return items


def _flatten(data: list[Any], shape: Sequence[int]) -> list[Any]:
    nested = [isinstance(item, list) for item in data]
    if not any(nested):
        return data
    if not shape or len(data) != shape[0] or not all(nested):
        raise ValueError("data is not nested as its shape says")
    rows = [_flatten(item, shape[1:]) for item in data]
    if any(len(row) != math.prod(shape[1:]) for row in rows):
        raise ValueError("data is not nested as its shape says")
    return [value for row in rows for value in row]


def _object_array(items: Sequence[bytes]) -> Array:
    array = np.empty(len(items), object)
    array[:] = items
    return array


def _reshape(array: Array, shape: Sequence[int]) -> Array:
    try:
        return array.reshape(tuple(shape))
    except (ValueError, OverflowError):  # more axes, or larger ones, than numpy has
        raise ValueError(f"shape {list(shape)} is not possible") from None


def _require_dtype(array: Array, datatype: str) -> None:
    if not holds(array, datatype):
        raise ValueError(f"is {array.dtype}, but {datatype} needs {dtype_text(datatype)}")


def _require_json(datatype: str) -> None:
    if datatype in ("FP16", "BF16"):
        raise ValueError(f"{datatype} has no JSON form; use the binary format")


def _require_types(values: Sequence[object], types: tuple[type, ...], datatype: str) -> None:
    allowed = " or ".join(kind.__name__ for kind in types)
    for value in values:
        if type(value) not in types:  # exactly: True is an int to isinstance
            raise ValueError(f"a value of type {type(value).__name__}, but {datatype} needs {allowed}")
