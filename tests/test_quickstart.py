"""The main job on a real Triton, shorter than `make quickstart` runs it."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from e2e import trusted_run

pytestmark = pytest.mark.triton


def test_digits_on_triton_passes_and_can_be_trusted(tmp_path: Path) -> None:
    shared_memory = set(Path("/dev/shm").iterdir())
    shorter = [
        "load.target_qps=200",
        "load.min_duration_s=6",
        "load.warmup_s=1",
        "constraints=['p99 <= 100ms', 'errors < 1%']",
    ]
    document = trusted_run("digits-triton-http", *(f"--set={one}" for one in shorter), cwd=tmp_path, timeout_s=120)
    assert document["counts"]["ok"] == document["counts"]["planned"] >= 2000

    # Every kept reply equals the golden logits of its held-out image: this is the model, not an echo.
    check = document["output_check"]
    assert (check["golden"], check["checked"], check["wrong"]) == (True, 256, 0)

    server = document["server"]
    assert (server["launch"], server["metadata"]["name"], server["exit_code"]) == ("triton", "triton", None)
    assert server["model_config"]["max_batch_size"] == 16
    out = tmp_path / "run"
    assert sorted(file.name for file in (out / "server").iterdir()) == ["config.pbtxt", "triton.log"]
    table = pq.read_table(out / "queries.parquet")
    assert table.num_rows == document["counts"]["planned"]
    assert set(table.column("outcome").to_pylist()) == {"ok"}
    assert len(set(table.column("sample").to_pylist())) > 300, "the 360 held-out images are the samples"
    assert set(Path("/dev/shm").iterdir()) <= shared_memory, "nothing is left in shared memory"
