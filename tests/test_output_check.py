"""The output check: right replies pass, and every way of being wrong is one line that says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from servebench.engine.output_check import OutputCheck, load_golden
from servebench.errors import ProfileError
from servebench.wire.kserve import HEADER_LENGTH, decode_outputs
from servebench.wire.tensors import DATATYPES, Array, TensorSpec, to_blob

Y = TensorSpec("y", "FP32", (-1, 4))
LABEL = TensorSpec("label", "INT64", (-1,))


def reply(**outputs: tuple[str, Array]) -> tuple[int, dict[str, str], bytes]:
    """An HTTP 200 with binary outputs, name=(datatype, array)."""
    blobs = [to_blob(array, datatype) for datatype, array in outputs.values()]
    listed = [
        {"name": name, "datatype": datatype, "shape": list(array.shape), "parameters": {"binary_data_size": len(blob)}}
        for (name, (datatype, array)), blob in zip(outputs.items(), blobs, strict=True)
    ]
    header = json.dumps({"model_name": "m", "outputs": listed}).encode()
    return 200, {HEADER_LENGTH: str(len(header))}, b"".join([header, *blobs])


def checker(
    *outputs: TensorSpec, batch_size: int | None = 1, golden: Any = None, rtol: float = 1e-3, atol: float = 1e-4
) -> OutputCheck:
    return OutputCheck(decode_outputs, outputs, batch_size, golden, rtol=rtol, atol=atol)


def floats(*values: float) -> tuple[str, Array]:
    return "FP32", np.array([values], np.float32)


RIGHT = reply(y=floats(1, 2, 3, 4))


def test_right_reply_passes() -> None:
    assert checker(Y).check(0, *RIGHT) is None


def test_numpy_2_corruption_recorded_from_triton() -> None:
    """Triton 2.51's Python backend under numpy 2.4 (nvidia-pytriton 0.7.0), asked to echo [[1, 2, 3, 4]].

    The reply is a success with no bytes in it, and therefore without the length header.
    """
    body = (
        b'{"model_name":"echo","model_version":"1","outputs":[{"name":"output_fp32","datatype":"FP32","shape":[1,4],'
        b'"parameters":{"binary_data_size":0}}]}'
    )
    headers = {"content-type": "application/json", "content-length": "144"}
    assert len(body) == 144
    found = checker(TensorSpec("output_fp32", "FP32", (-1, 4))).check(0, 200, headers, body)
    assert found == "output 'output_fp32': 0 bytes of data, but shape [1, 4] of FP32 needs 16"


@pytest.mark.parametrize(
    ("check", "answer", "found"),
    [
        pytest.param(checker(Y, LABEL), RIGHT, "output 'label': missing from the reply, which has ['y']", id="output missing"),
        pytest.param(checker(Y), reply(), "output 'y': missing from the reply, which has []", id="no outputs"),
        pytest.param(
            checker(Y),
            reply(y=("FP64", np.ones((1, 4)))),
            "output 'y': found datatype FP64, expected FP32",
            id="datatype",
        ),
        pytest.param(
            checker(TensorSpec("y", "BF16", (-1, 1))),
            reply(y=("UINT16", np.ones((1, 1), np.uint16))),
            "output 'y': found datatype UINT16, expected BF16",
            id="datatype with the same bits",
        ),
        pytest.param(checker(Y), reply(y=floats(1, 2, 3)), "output 'y': found shape [1, 3], expected [1, 4]", id="shape"),
        pytest.param(
            checker(Y), reply(y=("FP32", np.ones(4, np.float32))), "output 'y': found shape [4], expected [1, 4]", id="axes"
        ),
        pytest.param(checker(Y, batch_size=2), RIGHT, "output 'y': found shape [1, 4], expected [2, 4]", id="batch axis"),
        pytest.param(
            checker(Y),
            reply(y=("FP32", np.ones((0, 4), np.float32))),
            "output 'y': found shape [0, 4], expected [1, 4]",
            id="consistent, but empty",
        ),
        pytest.param(checker(Y), (503, {}, b'{"error":"full"}'), "HTTP status 503: full", id="error status"),
        pytest.param(checker(Y), (200, {}, b"{}"), "the reply's outputs are None, expected a list", id="nothing useful"),
        pytest.param(
            checker(Y),
            (RIGHT[0], RIGHT[1], RIGHT[2][:-1]),
            "output 'y': binary_data_size is 16, but only 15 bytes of the body are left",
            id="cut short",
        ),
    ],
)
def test_wrong_reply(check: OutputCheck, answer: tuple[int, dict[str, str], bytes], found: str) -> None:
    assert check.check(0, *answer) == found


@pytest.mark.parametrize(
    ("declared", "batch_size", "shape"),
    [
        pytest.param((-1, -1, 6), 1, (1, 0, 6), id="open size may be empty"),
        pytest.param((-1, -1, 6), 3, (3, 17, 6), id="open size may be any"),
        pytest.param((-1, 6), None, (17, 6), id="no batch axis: the leading -1 is open too"),
        pytest.param((6,), 3, (6,), id="an output that takes no part in batching"),
    ],
)
def test_shapes_that_pass(declared: tuple[int, ...], batch_size: int | None, shape: tuple[int, ...]) -> None:
    check = checker(TensorSpec("y", "FP32", declared), batch_size=batch_size)
    assert check.check(0, *reply(y=("FP32", np.zeros(shape, np.float32)))) is None


def test_outputs_that_the_model_does_not_declare_are_left_alone() -> None:
    assert checker(Y).check(0, *reply(extra=floats(9), y=floats(1, 2, 3, 4))) is None


# --- golden values --------------------------------------------------------------------------

GOLDEN = np.array([[1, 2, 3, 4], [10, 20, 30, 40], [np.nan, np.inf, -np.inf, 0]], np.float32)


@pytest.mark.parametrize(
    ("index", "values", "found"),
    [
        pytest.param(0, (1, 2, 3, 4), None, id="equal"),
        pytest.param(1, (10.01, 19.99, 30, 40), None, id="within rtol"),
        pytest.param(
            0,
            (1, 2.5, 3, 3),
            "output 'y': 2 of 4 values differ from golden beyond rtol 0.001, atol 0.0001; "
            "first at [0, 1]: found 2.5, expected 2.0",
            id="beyond",
        ),
        pytest.param(2, (np.nan, np.inf, -np.inf, 9e-5), None, id="NaN and infinities equal themselves; zero within atol"),
        pytest.param(2, (np.nan, np.inf, -np.inf, 2e-4), "1 of 4 values differ", id="zero beyond atol"),
        pytest.param(2, (0, np.inf, -np.inf, 0), "first at [0, 0]: found 0.0, expected nan", id="number for NaN"),
        pytest.param(0, (np.nan, 2, 3, 4), "first at [0, 0]: found nan, expected 1.0", id="NaN for number"),
        pytest.param(2, (np.nan, -np.inf, -np.inf, 0), "found -inf, expected inf", id="the other infinity"),
        pytest.param(1, (1, 2, 3, 4), "4 of 4 values differ", id="another sample's answer"),
    ],
)
def test_golden_floats(index: int, values: tuple[float, ...], found: str | None) -> None:
    result = checker(Y, golden={"y": GOLDEN}).check(index, *reply(y=floats(*values)))
    assert result == found if found is None else found in (result or "")


def test_tolerance_is_numpys_isclose() -> None:
    generator = np.random.default_rng(5)
    golden = generator.normal(size=(200, 4)).astype(np.float32)
    noisy = golden + generator.normal(scale=2e-3, size=golden.shape).astype(np.float32)
    check = checker(Y, golden={"y": golden}, rtol=1e-3, atol=1e-3)
    passed = [check.check(index, *reply(y=("FP32", noisy[index : index + 1]))) is None for index in range(200)]
    expected = [np.allclose(noisy[i].astype("f8"), golden[i].astype("f8"), rtol=1e-3, atol=1e-3) for i in range(200)]
    assert passed == expected
    assert 5 < sum(passed) < 195


def test_golden_rows_are_batched_like_the_samples() -> None:
    golden = {"label": np.arange(5, dtype=np.int64) * 10}
    check = checker(LABEL, batch_size=2, golden=golden)
    for index, labels in enumerate([(0, 10), (20, 30), (40, 0)]):  # 5 rows in twos: the last wraps
        assert check.check(index, *reply(label=("INT64", np.array(labels)))) is None
    assert "first at [1]: found 1, expected 0" in str(check.check(2, *reply(label=("INT64", np.array((40, 1))))))


def test_golden_without_a_batch_axis() -> None:
    check = checker(TensorSpec("y", "FP32", (4,)), batch_size=None, golden={"y": GOLDEN})
    assert check.check(1, *reply(y=("FP32", GOLDEN[1]))) is None
    assert check.check(0, *reply(y=("FP32", GOLDEN[1]))) is not None


@pytest.mark.parametrize(
    ("datatype", "golden", "wrong", "text"),
    [
        pytest.param("INT64", np.array([[1000, 1]]), np.array([[1001, 1]]), "found 1001, expected 1000", id="integers exactly"),
        pytest.param("BOOL", np.array([[True]]), np.array([[False]]), "found False, expected True", id="BOOL"),
        pytest.param(
            "BYTES", np.array([["é", "b"]]), np.array([[b"e", b"b"]]), r"found b'e', expected b'\xc3\xa9'", id="BYTES"
        ),
        pytest.param("FP16", np.array([[1.0]], "f2"), np.array([[1.01]], "f2"), "found 1.009765625, expected 1.0", id="FP16"),
        pytest.param("BF16", np.array([[0x3F80]], "u2"), np.array([[0x3F82]], "u2"), "found 1.015625, expected 1.0", id="BF16"),
        pytest.param("FP64", np.array([[1e308]]), np.array([[-1e308]]), "found -1e+308, expected 1e+308", id="FP64 overflow"),
    ],
)
def test_golden_datatypes(datatype: str, golden: Array, wrong: Array, text: str) -> None:
    check = checker(TensorSpec("y", datatype, (-1, -1)), golden={"y": golden})
    assert check.check(0, *reply(y=(datatype, golden))) is None
    result = check.check(0, *reply(y=(datatype, wrong)))
    assert result is not None
    assert f"1 of {golden.size} values differ from golden" in result
    assert text in result


def test_bf16_tolerance_is_in_values_not_bits() -> None:
    golden = np.array([[1.0, 256.0]], ml_dtypes.bfloat16)
    near = np.array([[1.0078125, 258.0]], ml_dtypes.bfloat16)  # the next values up, 0.8 % away
    answer = reply(y=("BF16", near.view(np.uint16)))
    for rtol, right in ((1e-2, True), (1e-3, False)):
        check = checker(TensorSpec("y", "BF16", (-1, 2)), golden={"y": golden.view(np.uint16)}, rtol=rtol)
        assert (check.check(0, *answer) is None) is right


def test_golden_of_another_shape() -> None:
    check = checker(TensorSpec("y", "FP32", (-1, -1)), golden={"y": GOLDEN})
    assert check.check(0, *reply(y=floats(1, 2))) == "output 'y': found shape [1, 2], the golden output has [1, 4]"


def test_long_values_are_cut() -> None:
    check = checker(TensorSpec("y", "BYTES", (-1, 1)), golden={"y": np.array([[b"a" * 500]])})
    result = check.check(0, *reply(y=("BYTES", np.array([[b"b" * 5000]]))))
    assert result is not None
    assert len(result) < 300


# --- golden files ---------------------------------------------------------------------------


def test_load_golden(tmp_path: Path) -> None:
    path = tmp_path / "golden.npz"
    np.savez(path, y=GOLDEN)
    golden = load_golden(path, [Y, LABEL], 3, batched=True)
    assert list(golden) == ["y"]
    np.testing.assert_array_equal(golden["y"], GOLDEN)
    assert list(load_golden(path, [TensorSpec("y", "FP32", (4,))], 3, batched=False)) == ["y"]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        pytest.param({"z": GOLDEN}, "'z' is not an output of the model; its outputs: y, label", id="unknown output"),
        pytest.param({}, "output 'y' is missing; found: nothing", id="nothing there"),
        pytest.param({"y": GOLDEN[:2]}, "output 'y': found 2 rows, expected 3 as the samples have", id="rows"),
        pytest.param({"y": GOLDEN[:, :3]}, "output 'y': found shape [3, 3], expected [rows, 4]", id="shape"),
        pytest.param({"y": GOLDEN.astype("f8")}, "output 'y': found dtype float64, expected float32 for FP32", id="dtype"),
        pytest.param({"y": GOLDEN, "label": np.zeros(4, "i8")}, "outputs differ in their number of rows", id="uneven rows"),
    ],
)
def test_bad_golden_files(arrays: dict[str, Array], message: str, tmp_path: Path) -> None:
    path = tmp_path / "golden.npz"
    np.savez(path, **arrays)
    with pytest.raises(ProfileError) as error:
        load_golden(path, [Y, LABEL], 3, batched=True)
    assert str(error.value).startswith(f"{path}: {message}")


@pytest.mark.parametrize("datatype", DATATYPES)
def test_every_datatype_passes_against_its_own_golden(datatype: str) -> None:
    values = np.array([[b"a\0", b""]], object) if datatype == "BYTES" else np.array([[1, 0]], DATATYPES[datatype])
    assert checker(TensorSpec("y", datatype, (-1, 2)), golden={"y": values}).check(0, *reply(y=(datatype, values))) is None
