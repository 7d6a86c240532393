"""The column file: its bytes as documented, read by hand; what is not one is refused; a full disk is an error at once."""

import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from servebench.errors import ProfileError
from servebench.record.columns import HEADER_BYTES, ROW_BYTES, Columns, HeaderSlot, file_bytes
from servebench.record.outcome import Outcome
from servebench.record.rundir import read_run

#: The format, written down a second time: files of old runs must stay readable.
LAYOUT = [
    ("scheduled_ns", "<i8"),
    ("issued_ns", "<i8"),
    ("first_byte_ns", "<i8"),
    ("completed_ns", "<i8"),
    ("sample", "<i4"),
    ("response_bytes", "<u4"),
    ("connection", "<u4"),
    ("status", "<u2"),
    ("outcome", "|u1"),
]
HEADER_SLOTS = ["magic", "rows", "worker", "workers", "start_ns", "cursor", "ended", "ok", "final"]


def padded(size: int) -> int:
    return -(-size // 8) * 8


def read_by_hand(path: Path) -> tuple[dict[str, int], dict[str, np.ndarray]]:
    """Header and columns, from the documented layout alone."""
    data = path.read_bytes()
    assert data[:8] == b"SBCOL1\0\0"
    header = dict(zip(HEADER_SLOTS, struct.unpack("<9q", data[:72]), strict=True))
    rows, offset, columns = header["rows"], 4096, {}
    for name, dtype in LAYOUT:
        size = rows * np.dtype(dtype).itemsize
        columns[name] = np.frombuffer(data[offset : offset + size], dtype=dtype)
        offset += padded(size)
    assert len(data) == offset
    return header, columns


def create(tmp_path: Path, rows: int = 10) -> Columns:
    return Columns.create(tmp_path / "columns-0.bin", rows=rows, worker=0, workers=1)


@pytest.mark.parametrize("rows", [0, 1, 7, 8, 1001])
@pytest.mark.parametrize("through", ["view", "array"])
def test_the_bytes_are_as_documented(tmp_path: Path, rows: int, through: str) -> None:
    columns = Columns.create(tmp_path / "c", rows=rows, worker=3, workers=5)
    random = np.random.default_rng(rows)
    values = {}
    for name, dtype in LAYOUT:
        limits = np.iinfo(dtype)
        values[name] = random.integers(limits.min, limits.max, size=rows, dtype=dtype, endpoint=True)
        if through == "array":
            columns.array(name)[:] = values[name]
        else:
            view = columns.view(name)
            assert len(view) == rows
            for row, value in enumerate(values[name].tolist()):
                view[row] = value
    for slot, value in zip(list(HeaderSlot)[4:], (10**15, 4, 3, 2, 1), strict=True):
        columns.header[slot] = value
    header, found = read_by_hand(columns.path)
    del header["magic"]
    assert header == dict(zip(HEADER_SLOTS[1:], (rows, 3, 5, 10**15, 4, 3, 2, 1), strict=True))
    for name, expected in values.items():
        assert found[name].tolist() == expected.tolist(), name
    again = Columns.open(columns.path)
    assert again.rows == rows
    for name, expected in values.items():
        assert again.array(name).tolist() == expected.tolist() == list(again.view(name)), name


def test_a_query_costs_what_is_promised() -> None:
    assert sum(np.dtype(dtype).itemsize for _, dtype in LAYOUT) == ROW_BYTES <= 64
    assert file_bytes(1_000_000) == 4096 + 1_000_000 * ROW_BYTES


def test_a_new_file_holds_queries_that_were_not_issued(tmp_path: Path) -> None:
    columns = create(tmp_path)
    assert set(columns.array("outcome").tolist()) == {Outcome.NOT_ISSUED} == {0}
    assert not any(columns.array(name).any() for name, _ in LAYOUT)
    assert list(columns.header)[2:] == [0, 1] + [0] * (HEADER_BYTES // 8 - 4)


def test_the_disk_blocks_are_reserved(tmp_path: Path) -> None:
    columns = create(tmp_path, rows=100_000)
    status = columns.path.stat()
    assert status.st_size == file_bytes(100_000)
    assert status.st_blocks * 512 >= status.st_size


def test_others_see_what_is_stored_at_once(tmp_path: Path) -> None:
    writer = create(tmp_path)
    reader = Columns.open(writer.path)
    writer.view("issued_ns")[4] = 123
    writer.header[HeaderSlot.CURSOR] = 5
    assert (reader.array("issued_ns")[4], reader.header[HeaderSlot.CURSOR]) == (123, 5)


def test_only_a_writable_map_can_be_written(tmp_path: Path) -> None:
    create(tmp_path)
    reader = Columns.open(tmp_path / "columns-0.bin")
    with pytest.raises(TypeError, match="read-only"):
        reader.view("status")[0] = 1
    with pytest.raises(ValueError, match="read-only"):
        reader.array("status")[0] = 1
    Columns.open(tmp_path / "columns-0.bin", writable=True).array("status")[0] = 503
    assert reader.view("status")[0] == 503


def test_what_exists_is_not_overwritten(tmp_path: Path) -> None:
    create(tmp_path).view("status")[0] = 200
    with pytest.raises(FileExistsError):
        create(tmp_path)
    assert Columns.open(tmp_path / "columns-0.bin").view("status")[0] == 200


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(lambda data: b"", r"not a column file \(only 0 bytes\)", id="empty"),
        pytest.param(lambda data: data[:4095], r"not a column file \(only 4095 bytes\)", id="part of a header"),
        pytest.param(lambda data: data[:4096], "cut short", id="only the header"),
        pytest.param(lambda data: data[:-1], "cut short", id="a byte missing"),
        pytest.param(lambda data: bytes(len(data)), "not a column file", id="zeros, as reserved but never begun"),
        pytest.param(lambda data: b"PAR1" + data[4:], "not a column file", id="another magic"),
        pytest.param(lambda data: data[:8] + struct.pack("<q", -1) + data[16:], "not a column file", id="negative rows"),
        pytest.param(lambda data: data[:8] + struct.pack("<q", 2**62) + data[16:], "cut short", id="absurd rows"),
    ],
)
def test_what_is_no_column_file_is_refused_by_name(tmp_path: Path, content: Callable[[bytes], bytes], message: str) -> None:
    path = create(tmp_path).path
    path.write_bytes(content(path.read_bytes()))
    with pytest.raises(ValueError, match=message) as caught:
        Columns.open(path)
    assert str(caught.value).startswith(f"{path}: ")


_PREPARE_WITH_LITTLE_ROOM = """
import resource, sys
from pathlib import Path
from servebench.engine.preparation import create_columns, prepare
from servebench.errors import RunError
from servebench.profile import parse_profile
from servebench.record.rundir import RunDirectory
from servebench.wire.tensors import ModelMetadata, TensorSpec

profile = parse_profile({
    "name": "full", "server": {"url": "http://127.0.0.1:1"}, "endpoint": {"model": "m"},
    "load": {"target_qps": 1000, "min_duration_s": 0, "min_query_count": 4000, "warmup_s": 0},
    "client": {"workers": 2}, "constraints": ["p99 <= 50ms"],
}, source="full")
spec = TensorSpec("X", "FP32", (1,))
preparation = prepare(profile, ModelMetadata("m", ("1",), "", (spec,), (spec,), 0))
directory = RunDirectory.create(Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
try:
    create_columns(profile, preparation, directory)
except RunError as error:
    print(error)
"""


def test_a_full_disk_is_one_line_before_the_run_and_leaves_nothing_that_looks_like_one(tmp_path: Path) -> None:
    path = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-c", _PREPARE_WITH_LITTLE_ROOM, path], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    needed = 4096 + sum(padded(4000 * np.dtype(dtype).itemsize) for _, dtype in LAYOUT) + 4096
    (line,) = done.stdout.splitlines()
    assert line == f"{path}/columns-0.bin: cannot reserve the records ({needed:,} bytes): File too large"
    for file in path.glob("*.bin"):
        with pytest.raises(ValueError, match="not a column file"):
            Columns.open(file)
    with pytest.raises(ProfileError, match="not a run directory"):
        read_run(path)
