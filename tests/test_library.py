"""The sample library: what each source makes of a model's inputs, and what it refuses."""

from __future__ import annotations

import base64
import json
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from tritonclient.utils import serialize_byte_tensor

from servebench.errors import ProfileError
from servebench.load.library import SampleLibrary, build_library
from servebench.profile import Samples
from servebench.wire.tensors import DATATYPES, Array, TensorSpec

X = TensorSpec("x", "FP32", (-1, 2, 3))
Y = TensorSpec("y", "INT64", (-1, 2))
S = TensorSpec("s", "BYTES", (-1, 2))

FLOATS = np.arange(5 * 6, dtype=np.float32).reshape(5, 2, 3)
INTS = np.arange(10, dtype=np.int64).reshape(5, 2)
STRINGS = np.array([[b"a", b""], [b"\0b", b"c\xff"], [b"d", b"e"], [b"f", b"g"], [b"h", b"ij"]])


def build(
    inputs: Sequence[TensorSpec], max_batch_size: int | None = 8, outputs: Sequence[TensorSpec] = (), **samples: Any
) -> SampleLibrary:
    return build_library(Samples.model_validate(samples), inputs, max_batch_size, outputs)


def write_npz(path: Path, **arrays: Array) -> Path:
    np.savez(path / "samples.npz", **arrays)
    return path / "samples.npz"


def write_json(path: Path, document: Any) -> Path:
    file = path / "input.json"
    file.write_text(json.dumps(document), encoding="utf-8")
    return file


# --- shapes and the batch axis --------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "max_batch_size", "batch_size", "expected"),
    [
        pytest.param((-1, 3), 8, 1, (1, 3), id="batched"),
        pytest.param((-1, 3), 8, 8, (8, 3), id="batched, as many as allowed"),
        pytest.param((3,), 0, 1, (3,), id="not batched"),
        pytest.param((-1, 3), None, 4, (4, 3), id="no configuration, leading -1"),
        pytest.param((2, 3), None, 1, (2, 3), id="no configuration, fixed"),
        pytest.param((-1,), 8, 2, (2,), id="nothing but the batch axis"),
    ],
)
@pytest.mark.parametrize("source", ["random", "zero"])
def test_generated_shapes(source: str, shape: Any, max_batch_size: int | None, batch_size: int, expected: Any) -> None:
    library = build([TensorSpec("x", "FP32", shape)], max_batch_size, source=source, count=5, batch_size=batch_size)
    assert len(library) == 5
    assert [library.arrays(index)["x"].shape for index in range(5)] == [expected] * 5


def test_open_sizes_come_from_the_profile() -> None:
    spec = TensorSpec("x", "FP32", (-1, -1, 3, -1))
    assert build([spec], shapes={"x": [4, 3, 2]}).arrays(0)["x"].shape == (1, 4, 3, 2)
    # Without a batch axis the first -1 is an open size like the others.
    assert build([spec], 0, shapes={"x": [7, 4, 3, 2]}).arrays(0)["x"].shape == (7, 4, 3, 2)


@pytest.mark.parametrize(
    ("samples", "max_batch_size", "message"),
    [
        pytest.param({}, 8, "samples.shapes.t: required, because the model leaves sizes open: [-1, 3]; "
                     "write for example shapes: {t: [16, 3]}", id="open size"),
        pytest.param({"shapes": {"u": [1]}}, 8, "samples.shapes: 'u' is not an input of the model; its inputs: t", id="name"),
        pytest.param({"shapes": {"t": [4, 4]}}, 8, "samples.shapes.t: found [4, 4], expected [-1, 3]", id="fixed size changed"),
        pytest.param({"shapes": {"t": [4]}}, 8, "samples.shapes.t: found [4], expected [-1, 3]", id="too few axes"),
        pytest.param({"shapes": {"t": [-1, 3]}}, 8, "samples.shapes.t: found [-1, 3]", id="still open"),
        pytest.param({"shapes": {"t": [4, 3]}, "batch_size": 9}, 8, "samples.batch_size: found 9, but the model's "
                     "max_batch_size is 8", id="batch too large"),
        pytest.param({"shapes": {"t": [1, 4, 3]}, "batch_size": 2}, 0, "samples.batch_size: found 2, but the model has no "
                     "batch axis", id="no batch axis"),
    ],
)  # fmt: skip
def test_bad_settings(samples: dict[str, Any], max_batch_size: int, message: str) -> None:
    with pytest.raises(ProfileError) as error:
        build([TensorSpec("t", "FP32", (-1, -1, 3))], max_batch_size, **samples)
    assert message in str(error.value)


def test_a_model_without_inputs_is_refused() -> None:
    with pytest.raises(ProfileError, match="names no inputs"):
        build([])


def test_index_is_checked() -> None:
    library = build([X], count=2)
    for index in (-1, 2):
        with pytest.raises(IndexError):
            library.arrays(index)


# --- generated values -----------------------------------------------------------------------


@pytest.mark.parametrize("datatype", DATATYPES)
def test_zero(datatype: str) -> None:
    (array,) = build([TensorSpec("x", datatype, (-1, 3))], source="zero", count=100_000).arrays(99_999).values()
    assert array.tolist() == [[b"" if datatype == "BYTES" else 0] * 3]
    assert array.dtype == DATATYPES[datatype] or array.dtype.kind == "S"


def random_values(datatype: str, *, seed: int = 0, **settings: Any) -> Array:
    """4000 values of one input, in the library's order."""
    library = build([TensorSpec("x", datatype, (-1, 20))], None, count=50, batch_size=4, payload_seed=seed, **settings)
    return np.concatenate([library.arrays(index)["x"].ravel() for index in range(50)])


@pytest.mark.parametrize("datatype", ["FP16", "FP32", "FP64", "BF16"])
def test_random_floats_are_uniform_below_one(datatype: str) -> None:
    values = random_values(datatype)
    assert values.dtype == DATATYPES[datatype]
    numbers = (values.view(ml_dtypes.bfloat16) if datatype == "BF16" else values).astype(np.float64)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    # The coarsest grid here is BF16's 1/256, far below what 4000 values can tell from a continuous uniform.
    assert stats.kstest(numbers, "uniform").pvalue > 1e-4


@pytest.mark.parametrize(
    ("datatype", "low", "count"),
    [
        pytest.param("BOOL", 0, 2, id="BOOL"),
        pytest.param("INT8", -128, 256, id="INT8"),
        pytest.param("UINT8", 0, 256, id="UINT8"),
        *[pytest.param(name, 0, 128, id=name) for name in ("INT16", "INT32", "INT64", "UINT16", "UINT32", "UINT64")],
    ],
)
def test_random_integers_are_uniform_in_their_range(datatype: str, low: int, count: int) -> None:
    values = random_values(datatype)
    assert values.dtype == DATATYPES[datatype]
    found = np.bincount(values.astype(np.int64) - low, minlength=count)
    assert len(found) == count
    assert found.min() > 0
    assert stats.chisquare(found).pvalue > 1e-4


@pytest.mark.parametrize("datatype", ["INT8", "UINT8", "INT16", "INT64", "UINT64"])
def test_random_integers_end_below_their_limit(datatype: str) -> None:
    values = random_values(datatype, limits={"x": 3})
    assert values.dtype == DATATYPES[datatype]
    assert stats.chisquare([(values == value).sum() for value in (0, 1, 2)], [4000 / 3] * 3).pvalue > 1e-4


def test_a_limit_is_of_its_input_alone() -> None:
    specs = [TensorSpec("x", "INT64", (-1, 20)), TensorSpec("y", "INT64", (-1, 20))]
    with_limit, without = build(specs, limits={"x": 2}).arrays(0), build(specs).arrays(0)
    assert with_limit["x"].max() == 1
    assert (with_limit["y"] == without["y"]).all()


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        pytest.param({"z": 2}, "'z' is not an integer input of the model; those: i, u", id="name"),
        pytest.param({"f": 2}, "'f' is not an integer input", id="float"),
        pytest.param({"b": 2}, "'b' is not an integer input", id="BF16, whose dtype is one"),
        pytest.param({"u": 257}, "samples.limits.u: found 257, at most 256 is possible", id="beyond UINT8"),
        pytest.param({"i": 129}, "samples.limits.i: found 129, at most 128 is possible", id="beyond INT8"),
    ],
)
def test_bad_limits(limits: dict[str, int], message: str) -> None:
    specs = [
        TensorSpec(name, datatype, (-1, 2)) for name, datatype in {"i": "INT8", "u": "UINT8", "f": "FP32", "b": "BF16"}.items()
    ]
    build(specs, limits={"i": 128, "u": 256})
    with pytest.raises(ProfileError, match=f"^samples.limits.*{message.removeprefix('samples.limits')}"):
        build(specs, limits=limits)


def test_random_strings_are_ascii_of_perf_analyzers_default_length() -> None:
    values = random_values("BYTES").tolist()
    assert all(re.fullmatch(rb"[0-9A-Za-z]{128}", value) for value in values)
    assert len(set(values)) == 4000


@pytest.mark.parametrize("datatype", DATATYPES)
def test_the_seed_decides_random_values(datatype: str) -> None:
    first, again, other = random_values(datatype), random_values(datatype), random_values(datatype, seed=1)
    assert (first == again).all()
    assert (first != other).any()


def test_inputs_and_samples_differ() -> None:
    library = build([X, TensorSpec("x2", "FP32", (-1, 2, 3))], count=3, batch_size=2)
    rows = [row.tobytes() for index in range(3) for array in library.arrays(index).values() for row in array]
    assert len(set(rows)) == 12


# --- npz and npy ----------------------------------------------------------------------------


def test_npz_one_row_a_sample(tmp_path: Path) -> None:
    library = build([X, Y, S], source="npz", path=write_npz(tmp_path, x=FLOATS, y=INTS, s=STRINGS))
    assert (len(library), library.rows, library.batch_size, library.golden) == (5, 5, 1, None)
    for index in range(5):
        arrays = library.arrays(index)
        assert list(arrays) == ["x", "y", "s"]
        np.testing.assert_array_equal(arrays["x"], FLOATS[index : index + 1])
        np.testing.assert_array_equal(arrays["y"], INTS[index : index + 1])
        assert arrays["s"].tolist() == [STRINGS[index].tolist()]


def test_batches_group_consecutive_rows_and_wrap(tmp_path: Path) -> None:
    library = build([Y], source="npz", path=write_npz(tmp_path, y=INTS), batch_size=2)
    assert len(library) == 3  # 5 rows in twos
    assert [library.arrays(index)["y"].tolist() for index in range(3)] == [
        [[0, 1], [2, 3]],
        [[4, 5], [6, 7]],
        [[8, 9], [0, 1]],
    ]


def test_a_batch_larger_than_the_file_wraps_more_than_once(tmp_path: Path) -> None:
    library = build([Y], source="npz", path=write_npz(tmp_path, y=INTS[:2]), batch_size=5)
    assert len(library) == 1
    assert library.arrays(0)["y"][:, 0].tolist() == [0, 2, 0, 2, 0]


def test_without_a_batch_axis_rows_are_whole_tensors(tmp_path: Path) -> None:
    library = build([TensorSpec("x", "FP32", (2, -1))], 0, source="npz", path=write_npz(tmp_path, x=FLOATS))
    np.testing.assert_array_equal(library.arrays(3)["x"], FLOATS[3])


def test_samples_are_views_of_their_source(tmp_path: Path) -> None:
    library = build([X], source="npz", path=write_npz(tmp_path, x=FLOATS), batch_size=2)
    assert np.shares_memory(library.arrays(0)["x"], library.inputs["x"])
    assert library.arrays(0)["x"].base is not None


def test_npy_folder_stays_on_disk(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", FLOATS)
    np.save(tmp_path / "y.npy", INTS)
    library = build([X, Y], source="npy", path=tmp_path)
    np.testing.assert_array_equal(library.arrays(4)["x"], FLOATS[4:])
    np.testing.assert_array_equal(library.arrays(4)["y"], INTS[4:])
    assert isinstance(library.inputs["x"], np.memmap)


@pytest.mark.parametrize("kind", ["npz", "npy"])
@pytest.mark.parametrize(
    ("arrays", "samples", "message"),
    [
        pytest.param({"x": FLOATS}, {}, "input 'y' is missing; found: x", id="input missing"),
        pytest.param({"x": FLOATS, "y": INTS, "z": INTS}, {}, "'z' is not an input of the model; its inputs: x, y", id="name"),
        pytest.param({"x": FLOATS.astype("f8"), "y": INTS}, {}, "input 'x': found dtype float64, expected float32 for FP32",
                     id="dtype"),
        pytest.param({"x": FLOATS, "y": INTS.astype("u8")}, {}, "input 'y': found dtype uint64, expected int64", id="sign"),
        pytest.param({"x": FLOATS[:, :, :2], "y": INTS}, {}, "input 'x': found shape [5, 2, 2], expected [rows, 2, 3]",
                     id="shape"),
        pytest.param({"x": FLOATS[0], "y": INTS}, {}, "input 'x': found shape [2, 3], expected [rows, 2, 3]", id="no row axis"),
        pytest.param({"x": FLOATS, "y": np.array(3)}, {}, "input 'y': found shape [], expected [rows, 2]", id="scalar"),
        pytest.param({"x": FLOATS, "y": INTS[:4]}, {}, "inputs differ in their number of rows: x has 5, y has 4", id="rows"),
        pytest.param({"x": FLOATS, "y": INTS}, {"shapes": {"q": [1]}}, "samples.shapes: 'q' is not an input", id="shapes"),
        pytest.param({}, {}, "input 'x' is missing; found: nothing", id="nothing there"),
    ],
)  # fmt: skip
def test_bad_arrays(kind: str, arrays: dict[str, Array], samples: dict[str, Any], message: str, tmp_path: Path) -> None:
    if kind == "npz":
        path = write_npz(tmp_path, **arrays)
    else:
        path = tmp_path
        for name, array in arrays.items():
            np.save(path / f"{name}.npy", array)
    with pytest.raises(ProfileError) as error:
        build([X, Y], source=kind, path=path, **samples)
    assert message in str(error.value)
    if not samples:
        assert str(error.value).startswith(str(path))


def test_an_empty_npz_array_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"input 'y': found shape \[0, 2\], expected \[rows, 2\]"):
        build([Y], source="npz", path=write_npz(tmp_path, y=INTS[:0]))


def test_profile_shapes_narrow_what_a_file_may_hold(tmp_path: Path) -> None:
    path = write_npz(tmp_path, x=FLOATS)
    spec = TensorSpec("x", "FP32", (-1, -1, -1))
    assert len(build([spec], source="npz", path=path)) == 5
    with pytest.raises(ProfileError, match=r"found shape \[5, 2, 3\], expected \[rows, 2, 4\]"):
        build([spec], source="npz", path=path, shapes={"x": [2, 4]})


@pytest.mark.parametrize(
    ("source", "content", "message"),
    [
        pytest.param("npz", b"junk", "not a readable npz file", id="npz junk"),
        pytest.param("npz", b"", "not a readable npz file", id="npz empty"),
        pytest.param("npz", b"PK\3\4 cut short", "not a readable npz file", id="npz cut"),
        pytest.param("npy", b"x", "not a directory; source npy reads", id="npy that is a file"),
        pytest.param("perf-analyzer", b"{", "not a readable JSON file", id="JSON cut"),
        pytest.param("perf-analyzer", b"\xff", "not a readable JSON file", id="JSON not UTF-8"),
        pytest.param("perf-analyzer", b"[" * 100_000, "not a readable JSON file", id="JSON nested deeply"),
    ],
)
def test_unreadable_files(source: str, content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(ProfileError) as error:
        build([X], source=source, path=path)
    assert str(error.value).startswith(f"{path}: {message}")


def test_npz_pickles_and_single_arrays_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "one.npy", FLOATS)
    with pytest.raises(ProfileError, match="a single array, expected an npz file with one array per input"):
        build([X], source="npz", path=tmp_path / "one.npy")
    with pytest.raises(ProfileError, match="not a readable npz file: Object arrays"):
        build([S], source="npz", path=write_npz(tmp_path, s=np.array([["a", "b"]], object)))


def test_corrupt_npz_member_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "samples.npz"
    np.savez_compressed(path, x=np.random.default_rng(0).random((50, 2, 3), np.float32))
    content = bytearray(path.read_bytes())
    content[200:400] = bytes(200)
    path.write_bytes(content)
    with pytest.raises(ProfileError, match="not a readable npz file"):
        build([X], source="npz", path=path)


@pytest.fixture(scope="module")
def whole_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    np.savez(folder / "samples.npz", x=FLOATS[:2])
    np.savez_compressed(folder / "compressed.npz", x=FLOATS[:2])
    np.save(folder / "x.npy", FLOATS[:2])
    steps = [{"x": {"content": [0.5] * 6, "shape": [2, 3]}}, {"x": {"b64": b64(bytes(24))}}]
    (folder / "input.json").write_text(json.dumps({"data": [steps]}))
    return folder


@pytest.mark.parametrize(
    ("source", "name"),
    [("npz", "samples.npz"), ("npz", "compressed.npz"), ("npy", "x.npy"), ("perf-analyzer", "input.json")],
)
@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_files_are_read_or_refused(source: str, name: str, whole_files: Path, data: st.DataObject) -> None:
    content = bytearray((whole_files / name).read_bytes())
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    del content[data.draw(st.none() | st.integers(0, len(content))) :]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        try:
            library = build([X], source=source, path=path.parent if source == "npy" else path)
        except ProfileError as error:
            assert "\n" not in str(error)
            assert str(error).startswith(folder)
        else:
            assert [library.arrays(index)["x"].shape for index in range(len(library))] == [(1, 2, 3)] * library.rows


def test_unreadable_npy_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.npy").write_bytes(b"junk")
    with pytest.raises(ProfileError, match=r"x\.npy: not a readable npy file"):
        build([X], source="npy", path=tmp_path)


# --- perf_analyzer's JSON --------------------------------------------------------------------


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


I = TensorSpec("I", "INT32", (-1, 2, 2))  # noqa: E741
ROW = [1, 2, 3, 4]
RAW = np.array(ROW, "<i4").tobytes()


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        pytest.param([{"I": ROW}, {"I": [5, 6, 7, 8]}], [ROW, [5, 6, 7, 8]], id="flat values"),
        pytest.param([{"I": {"content": ROW}}], [ROW], id="content"),
        pytest.param([{"I": {"content": ROW, "shape": [2, 2]}}], [ROW], id="content and shape"),
        pytest.param([{"I": {"b64": b64(RAW)}}], [ROW], id="b64"),
        pytest.param([{"I": {"b64": b64(RAW), "shape": [2, 2]}}], [ROW], id="b64 beside shape"),
        pytest.param([{"I": {"content": {"b64": b64(RAW)}, "shape": [2, 2]}}], [ROW], id="b64 in content"),
        pytest.param([[{"I": ROW}, {"I": [0] * 4}], [{"I": [9] * 4}]], [ROW, [0] * 4, [9] * 4], id="streams, in order"),
    ],
)
def test_perf_analyzer_forms(data: Any, expected: list[list[int]], tmp_path: Path) -> None:
    library = build([I], source="perf-analyzer", path=write_json(tmp_path, {"data": data}))
    assert len(library) == len(expected)
    for index, row in enumerate(expected):
        array = library.arrays(index)["I"]
        np.testing.assert_array_equal(array, np.array(row, np.int32).reshape(1, 2, 2), strict=True)


def test_perf_analyzer_documents_shapes_example(tmp_path: Path) -> None:
    """The example of perf_analyzer's input data guide: shapes in the file go before the default (its --shape)."""
    ones = [1] * 16
    data = [
        {"INPUT": {"content": ones, "shape": [2, 8]}},
        {"INPUT": {"content": ones, "shape": [8, 2]}},
        {"INPUT": {"content": ones}},
        {"INPUT": {"content": ones, "shape": [4, 4]}},
    ]
    path = write_json(tmp_path, {"data": data})
    library = build([TensorSpec("INPUT", "INT32", (-1, -1))], 0, source="perf-analyzer", path=path, shapes={"INPUT": [4, 4]})
    assert [library.arrays(index)["INPUT"].shape for index in range(4)] == [(2, 8), (8, 2), (4, 4), (4, 4)]


@pytest.mark.parametrize(
    ("datatype", "content", "expected"),
    [
        pytest.param("BYTES", ["a", "é"], [b"a", "é".encode()], id="strings"),
        pytest.param("BYTES", {"b64": b64(serialize_byte_tensor(np.array([b"\0x", b""], object)).item())}, [b"\0x", b""],
                     id="strings in b64, each behind its length"),
        pytest.param("BOOL", [True, False], [True, False], id="booleans"),
        pytest.param("UINT64", [2**64 - 1, 0], [2**64 - 1, 0], id="largest integer"),
        pytest.param("FP32", [1, 0.1], [1.0, float(np.float32(0.1))], id="floats"),
        pytest.param("FP16", [1, 0.1], [1.0, float(np.float16(0.1))], id="half floats"),
        pytest.param("BF16", {"b64": b64(b"\x80\x3f\0\0")}, [0x3F80, 0], id="BF16 as raw bytes"),
    ],
)  # fmt: skip
def test_perf_analyzer_datatypes(datatype: str, content: Any, expected: list[Any], tmp_path: Path) -> None:
    path = write_json(tmp_path, {"data": [{"t": {"content": content, "shape": [2]}}]})
    array = build([TensorSpec("t", datatype, (-1, -1))], source="perf-analyzer", path=path).arrays(0)["t"]
    assert array.tolist() == [expected]
    assert array.dtype == DATATYPES[datatype]


def test_perf_analyzer_batches_and_golden_rows(tmp_path: Path) -> None:
    document = {
        "data": [{"I": [step] * 4} for step in range(3)],
        "validation_data": [{"O": [step / 2]} for step in range(3)],
    }
    path = write_json(tmp_path, document)
    output = TensorSpec("O", "FP32", (-1, 1))
    library = build([I], source="perf-analyzer", path=path, batch_size=2, outputs=[output])
    assert [library.arrays(index)["I"][:, 0, 0].tolist() for index in range(len(library))] == [[0, 1], [2, 0]]
    assert library.golden is not None
    assert [row.tolist() for row in library.golden["O"]] == [[0.0], [0.5], [1.0]]
    assert build([I], source="perf-analyzer", path=path).golden is None


@pytest.mark.parametrize(
    ("document", "samples", "message"),
    [
        pytest.param([], {}, "expected an object with the key data", id="not an object"),
        pytest.param({"validation_data": []}, {}, "expected an object with the key data", id="no data"),
        pytest.param({"data": [{"I": ROW}], "more": 1}, {}, "unknown key 'more'; allowed here: data, validation_", id="key"),
        pytest.param({"data": []}, {}, "data: found no steps", id="no steps"),
        pytest.param({"data": {"I": ROW}}, {}, "data: found no steps", id="data that is no list"),
        pytest.param({"data": [{"I": ROW}, 3]}, {}, "data step 1: found int, expected an object of inputs", id="step"),
        pytest.param({"data": [{"J": ROW}]}, {}, "data step 0: 'J' is not an input of the model; its inputs: I", id="unknown"),
        pytest.param({"data": [{"I": ROW}, {}]}, {}, "data step 1: input 'I' is missing; found: nothing", id="missing"),
        pytest.param({"data": [{"I": [1, 2, 3]}]}, {}, "step 0, input 'I': 3 values, but shape [2, 2] needs 4", id="count"),
        pytest.param({"data": [{"I": [1, 2, 3, 4.5]}]}, {}, "type float, but INT32 needs int", id="float for integer"),
        pytest.param({"data": [{"I": [1, 2, 3, 2**31]}]}, {}, "INT32's range of -2147483648 to 2147483647", id="range"),
        pytest.param({"data": [{"I": [[1, 2], [3, 4]]}]}, {}, "2 values, but shape [2, 2] needs 4", id="nested values"),
        pytest.param({"data": [{"I": 7}]}, {}, "found neither a flat list of values nor a b64 text", id="number"),
        pytest.param({"data": [{"I": {"shape": [2, 2]}}]}, {}, "found neither a flat list", id="shape alone"),
        pytest.param({"data": [{"I": {"content": ROW, "dtype": 1}}]}, {}, "unknown key 'dtype'; allowed here: content, shape",
                     id="tensor key"),
        pytest.param({"data": [{"I": {"content": ROW, "shape": [4]}}]}, {}, "found shape [4], expected [2, 2]", id="shape"),
        pytest.param({"data": [{"I": {"content": ROW, "shape": "2,2"}}]}, {}, "found shape 2,2, expected", id="shape text"),
        pytest.param({"data": [{"I": {"b64": "?"}}]}, {}, "b64 is not base64 text", id="b64 junk"),
        pytest.param({"data": [{"I": {"b64": b64(RAW[:-1])}}]}, {}, "15 bytes of data, but shape [2, 2] of INT32 needs 16",
                     id="b64 short"),
        pytest.param({"data": [{"I": ROW}], "validation_data": [{"O": [1]}] * 2}, {}, "validation_data has 2 steps, expected 1",
                     id="validation steps"),
        pytest.param({"data": [{"I": ROW}], "validation_data": [{"P": [1]}]}, {},
                     "validation_data step 0: 'P' is not an output of the model; its outputs: O", id="validation output"),
        pytest.param({"data": [{"I": ROW}], "validation_data": [{"O": [1, 2]}]}, {}, "output 'O': 2 values, but shape [1]",
                     id="validation size"),
    ],
)  # fmt: skip
def test_bad_perf_analyzer_files(document: Any, samples: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write_json(tmp_path, document)
    with pytest.raises(ProfileError) as error:
        build([I], source="perf-analyzer", path=path, outputs=[TensorSpec("O", "FP32", (-1, 1))], **samples)
    assert str(error.value).startswith(str(path))
    assert message in str(error.value)


def test_perf_analyzer_open_sizes_need_a_shape(tmp_path: Path) -> None:
    spec = TensorSpec("I", "INT32", (-1, -1, 2))
    path = write_json(tmp_path, {"data": [{"I": ROW}]})
    with pytest.raises(ProfileError) as error:
        build([spec], source="perf-analyzer", path=path)
    assert '{"content": [...], "shape": [16, 2]}, or set samples.shapes' in str(error.value)
    assert build([spec], source="perf-analyzer", path=path, shapes={"I": [2, 2]}).arrays(0)["I"].shape == (1, 2, 2)


def test_perf_analyzer_steps_of_different_shapes_cannot_share_a_batch(tmp_path: Path) -> None:
    spec = TensorSpec("I", "INT32", (-1, -1))
    path = write_json(tmp_path, {"data": [{"I": {"content": [1], "shape": [1]}}, {"I": {"content": [1, 2], "shape": [2]}}]})
    assert [build([spec], source="perf-analyzer", path=path).arrays(index)["I"].shape for index in (0, 1)] == [(1, 1), (1, 2)]
    with pytest.raises(ProfileError, match=r"'I': steps of shapes \[\(1,\), \(2,\)\] cannot share a batch of 2"):
        build([spec], source="perf-analyzer", path=path, batch_size=2)
