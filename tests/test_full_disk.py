"""Runs into a real file system that is too small: what is left tells the truth, and one line says what did not fit."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from e2e import CLIENT_CPUS, stub

from servebench.judge.verdict import exit_code
from servebench.record.columns import file_bytes
from servebench.record.rundir import ENVIRONMENT, FACTS, PROFILE, QUERIES, RUN, SERVER

pytestmark = pytest.mark.load

PLANNED = 900
#: What is written before the first query: profile and environment, columns of both phases, the facts so far.
BEFORE_KIB = 4 + 4 + -(-file_bytes(PLANNED) // 4096) * 4 + 4
UNPACKED = {PROFILE, ENVIRONMENT, "columns-0.bin", FACTS, SERVER}
SERVEBENCH = shlex.join([sys.executable, "-c", "from servebench.cli import main; main()"])

#: As root of a user namespace of its own: a small file system, a run into it, and reports there and of a copy elsewhere.
SCRIPT = f"""
    mount -t tmpfs -o size=$1k none small || exit 99
    {SERVEBENCH} run profile.json --out small/run --json >run.out 2>run.err; echo $? >run.code
    test -d small/run || exit 0
    cp -r small/run copy; ls copy >left
    {SERVEBENCH} report small/run --json >small.out 2>small.err; echo $? >small.code
    {SERVEBENCH} report copy --json >copy.out 2>copy.err; echo $? >copy.code
"""


@dataclass
class Said:
    """Of one command: its exit code, its document if it printed one, and its error lines."""

    code: int
    document: dict[str, Any] | None
    errors: list[str]

    @classmethod
    def read(cls, folder: Path, name: str) -> Said:
        out, err = (folder / f"{name}.out").read_text(), (folder / f"{name}.err").read_text()
        assert "Traceback" not in err and "Exception ignored" not in err, err
        errors = [line.removeprefix("servebench: error: ") for line in err.splitlines() if "error" in line]
        return cls(int((folder / f"{name}.code").read_text()), json.loads(out) if out else None, errors)


@dataclass
class Small:
    """Of one run into a small file system: what its commands said, and the files that it left."""

    run: Said
    left: set[str]
    report: Said | None = None
    report_of_copy: Said | None = None


def run_into(tmp_path: Path, url: str, kib: int) -> Small:
    folder = tmp_path / f"{kib}"
    (folder / "small").mkdir(parents=True)
    profile = {
        "name": "full",
        "server": {"url": url},
        "endpoint": {"model": "stub"},
        "load": {"target_qps": 1000, "min_duration_s": 0, "min_query_count": PLANNED, "warmup_s": 0},
        "client": {"cpus": CLIENT_CPUS},
        "constraints": ["p50 <= 1s"],
    }
    (folder / "profile.json").write_text(json.dumps(profile))
    subprocess.run(["unshare", "-rm", "sh", "-c", SCRIPT, "sh", str(kib)], cwd=folder, timeout=60, check=True)
    run = Said.read(folder, "run")
    if not (folder / "copy").exists():
        return Small(run, set())
    left = set((folder / "left").read_text().split())
    return Small(run, left, Said.read(folder, "small"), Said.read(folder, "copy"))


def why_no_mount(tmp_path: Path) -> str | None:
    """What keeps this user from mounting a file system of their own, or None."""
    try:
        command = ["unshare", "-rm", "mount", "-t", "tmpfs", "none", str(tmp_path)]
        subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except subprocess.CalledProcessError as error:
        return f"{error}: {error.stderr.strip()}"
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return None


def test_a_full_disk_ends_in_one_line_and_in_what_is_true(tmp_path: Path) -> None:
    """Page by page something else does not fit: profile, records, facts, replies, Parquet file, reports."""
    if problem := why_no_mount(tmp_path):
        pytest.skip(f"needs unshare -rm and a mount: {problem}")
    found: dict[str, list[int]] = {}
    with stub(tmp_path, service={"kind": "constant", "mean_ms": 0.1}) as server:
        for kib in (4, 8, BEFORE_KIB, *range(BEFORE_KIB + 4, BEFORE_KIB + 40, 4)):
            small = run_into(tmp_path, server.urls["http"], kib)
            found.setdefault(checked(small), []).append(kib)
    assert set(found) >= {"nothing was sent", "kept in the columns", "whole"}, found
    assert min(found["nothing was sent"]) == 4
    assert max(found["kept in the columns"]) < min(found["whole"])


def checked(small: Small) -> str:
    """How a run ended; whichever way, what is left of it says so."""
    if not small.left:
        assert (small.run.code, small.run.document) == (1, None)
        (error,) = small.run.errors
        assert error.startswith("small/run/") and error.endswith("No space left on device"), error
        return "nothing was sent"
    assert small.report is not None and small.report_of_copy is not None
    in_place, copied = small.report.document, small.report_of_copy.document
    assert in_place is not None and in_place == copied, "it is judged where nothing more can be written, too"
    assert small.report_of_copy.code == exit_code(copied["verdict"]) and not small.report_of_copy.errors
    if small.report.errors:
        assert small.report.errors == ["small/run: its reports cannot be written: No space left on device"]
        assert small.report.code == 1
    else:
        assert small.report.code == small.report_of_copy.code
    assert copied["counts"]["planned"] == PLANNED
    if copied["state"] != "complete":  # there was room for the first facts, and for no later ones
        assert small.left == UNPACKED and copied["verdict"] == "INVALID"
        assert small.run.code == 1 and small.run.errors == [f"small/run/{FACTS}: cannot be written: No space left on device"]
        return "kept without its end"
    assert copied["counts"]["ok"] == PLANNED
    codes = {reason["code"] for reason in copied["trust"]["reasons"]}
    assert not codes & {"failed", "worker_lost", "books"}, "a full disk says nothing of the client or the server"
    if QUERIES not in small.left:
        assert small.left == UNPACKED and "output_check" in codes
        assert small.run.code == 1 and small.run.document is None
        (error,) = small.run.errors
        assert error.startswith(
            f"small/run/{QUERIES}: cannot be written: No space left on device; judge what is in the columns"
        )
        return "kept in the columns"
    assert small.left >= UNPACKED - {"columns-0.bin"} | {QUERIES}
    assert small.run.document == copied
    assert small.run.code == (1 if small.run.errors else exit_code(copied["verdict"]))
    assert (RUN in small.left) or small.run.errors == ["small/run: its reports cannot be written: No space left on device"]
    return "whole"
