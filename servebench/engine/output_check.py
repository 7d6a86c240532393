"""Are the answers right? A check of kept replies, after the timed path.

A server can be fast and wrong: HTTP 200 with an empty tensor, one of another size than its
shape says, or plain other numbers. Each reply is decoded strictly, then compared with what the
model's metadata promises (presence, datatype, shape) and, where golden outputs are known, value
by value: floats within ``atol + rtol * |golden|``, everything else exactly.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from servebench.errors import ProfileError
from servebench.load.library import Rows, fits, read_npz, row_spec, sample_of
from servebench.wire.protocol import OutputTensor
from servebench.wire.tensors import Array, TensorSpec, byte_strings

#: (status, headers, body) -> outputs; `ValueError` for a reply that is wrong in itself.
Decode = Callable[[int, Mapping[str, str], bytes], Mapping[str, OutputTensor]]

_FLOATS = ("FP16", "FP32", "FP64", "BF16")


def load_golden(path: Path, outputs: Sequence[TensorSpec], library_rows: int, *, batched: bool) -> dict[str, Array]:
    """Golden outputs from an npz file: one array per output (some may be absent), first axis = the library's rows.

    ``outputs`` are the model's, with their batch axis if ``batched``. `ProfileError` names the
    file, the output, what was found and what is expected.
    """
    golden = read_npz(path, [row_spec(spec, batched=batched) for spec in outputs], what="output", partial=True)
    for name, array in golden.items():
        if len(array) != library_rows:
            raise ProfileError(f"{path}: output {name!r}: found {len(array)} rows, expected {library_rows} as the samples have")
    return golden


class OutputCheck:
    """Judges single replies against a model's outputs; holds no state between replies.

    ``decode`` is the protocol's (`servebench.wire.protocol.QueryProtocol.decode`).
    ``batch_size`` is the number of rows in a query, None where the model has no batch axis;
    ``golden`` holds expected rows by output name, in the order of the sample library's rows.
    """

    def __init__(
        self,
        decode: Decode,
        outputs: Sequence[TensorSpec],
        batch_size: int | None,
        golden: Mapping[str, Rows] | None,
        *,
        rtol: float,
        atol: float,
    ) -> None:
        # A server without a configuration may have outputs that take no part in batching.
        self._outputs = [(spec, batch_size if spec.shape[:1] == (-1,) else None) for spec in outputs]
        self._decode = decode
        self._golden = golden or {}
        self._rtol = rtol
        self._atol = atol

    def check(self, sample_index: int, status: int, headers: Mapping[str, str], body: bytes) -> str | None:
        """None when the reply to sample ``sample_index`` is right, else one line: what was found, what was expected."""
        try:
            found = self._decode(status, headers, body)
        except ValueError as error:
            return str(error)
        for spec, batch_size in self._outputs:
            problem = self._check_output(sample_index, spec, batch_size, found)
            if problem is not None:
                return f"output {spec.name!r}: {problem}"
        return None

    def _check_output(
        self, sample_index: int, spec: TensorSpec, batch_size: int | None, found: Mapping[str, OutputTensor]
    ) -> str | None:
        output = found.get(spec.name)
        if output is None:
            return f"missing from the reply, which has {reprlib.repr(list(found))}"
        if output.datatype != spec.datatype:
            return f"found datatype {output.datatype}, expected {spec.datatype}"
        shape = spec.shape if batch_size is None else (batch_size, *spec.shape[1:])
        if not fits(output.array.shape, shape):
            return f"found shape {list(output.array.shape)}, expected {list(shape)}"
        rows = self._golden.get(spec.name)
        if rows is None:
            return None
        return self._compare(spec.datatype, output.array, sample_of(rows, sample_index, batch_size))

    def _compare(self, datatype: str, found: Array, golden: Array) -> str | None:
        if found.shape != golden.shape:
            return f"found shape {list(found.shape)}, the golden output has {list(golden.shape)}"
        values, expected = _comparable(found, datatype), _comparable(golden, datatype)
        if datatype in _FLOATS:
            with np.errstate(all="ignore"):  # infinities and values near the limit are compared, not warned about
                right = np.isclose(values, expected, rtol=self._rtol, atol=self._atol, equal_nan=True)
            tolerance = f" beyond rtol {self._rtol:g}, atol {self._atol:g}"
        else:
            right, tolerance = values == expected, ""
        wrong: npt.NDArray[np.intp] = np.flatnonzero(~right)
        if not len(wrong):
            return None
        first = int(wrong[0])
        place = [int(axis) for axis in np.unravel_index(first, found.shape)]
        return (
            f"{len(wrong)} of {found.size} values differ from golden{tolerance}; "
            f"first at {place}: found {_value_text(values[first])}, expected {_value_text(expected[first])}"
        )


def _comparable(array: Array, datatype: str) -> Array:
    """The elements in row-major order, in a dtype that compares by value."""
    if datatype == "BYTES":
        elements = np.empty(array.size, object)
        elements[:] = byte_strings(array)
        return elements
    if datatype == "BF16":  # the upper half of a single
        return (array.ravel().astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return array.ravel().astype(np.float64) if datatype in _FLOATS else array.ravel()


def _value_text(value: object) -> str:
    text = repr(value.item() if isinstance(value, np.generic) else value)
    return text if len(text) <= 60 else text[:59] + "…"
