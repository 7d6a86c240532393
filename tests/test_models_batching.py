"""What `delay` is for: on a real Triton, at a rate too high for one query at a time, dynamic batching turns FAIL into PASS.

8 ms and 0.5 ms a row: alone a query takes 8.5 ms, so one instance serves 117.6 a second and falls
behind at 200 by 82 queries a second. In batches of n it serves n / (8 + 0.5 n): two suffice.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from e2e import assert_books_balance, command

SHORT = ["load.min_duration_s=5", "load.min_query_count=1000", "load.warmup_s=1", "constraints=['p99 <= 250ms']"]


def run_delay(tmp_path: Path, *settings: str) -> dict[str, Any]:
    pytest.importorskip("pytriton")
    options = [f"--set={setting}" for setting in (*SHORT, *settings)]
    done = command("run", "delay-triton-http", "--out", "run", "--json", *options, cwd=tmp_path, timeout_s=100)
    document: dict[str, Any] = json.loads(done.stdout)
    assert_books_balance(document, tmp_path / "run")
    return document


@pytest.mark.triton
@pytest.mark.load
def test_one_at_a_time_fails(tmp_path: Path) -> None:
    document = run_delay(tmp_path, "server.options.dynamic_batching=null")
    assert document["verdict"] == "FAIL"
    # After 5 s of falling behind, whoever is last waits for 400 others.
    assert document["response_time"]["max_ns"] > 1e9
    # 1 / 8.5 ms, and less what the server adds.
    assert 90 < document["rates"]["completed_qps"] < 1000 / 8.5


@pytest.mark.triton
@pytest.mark.load
def test_batches_pass(tmp_path: Path) -> None:
    document = run_delay(tmp_path)
    assert document["verdict"] == "PASS"
    assert document["output_check"]["wrong"] == 0
    # A batch waits for the one before it: never less than 8.5 ms, typically two batches' time.
    assert document["response_time"]["min_ns"] >= 8.5e6
    assert document["response_time"]["percentiles"]["50"] < 60e6
