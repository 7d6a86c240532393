"""The four bundled ways to the digits model, each on its real server: same images, same answers, a PASS that can be trusted."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from e2e import CPUS, trusted_run

MODELS = Path(__file__).resolve().parent.parent / "servers" / "models" / "digits"
PROFILES = [
    pytest.param("digits-triton-http", marks=pytest.mark.triton),
    pytest.param("digits-triton-grpc", marks=pytest.mark.triton),
    pytest.param("digits-torchserve-http", marks=pytest.mark.torchserve),
    pytest.param("digits-torchserve-grpc", marks=pytest.mark.torchserve),
]


@pytest.mark.parametrize("profile", PROFILES)
def test_every_held_out_image_gets_the_same_label_everywhere(tmp_path: Path, profile: str) -> None:
    """`unique` sends each of the 360 images once, and every reply is kept and compared with the golden logits."""
    settings = [
        "samples.order=unique",
        "output_check.replies=360",
        "load.target_qps=120",
        "load.warmup_s=1",
        "constraints=['p90 <= 500ms']",
    ]
    document = trusted_run(profile, *(f"--set={one}" for one in settings), cwd=tmp_path, timeout_s=150)
    assert document["counts"]["ok"] == 360
    effective = yaml.safe_load((tmp_path / "run" / "profile.yaml").read_text())
    assert effective["client"]["cpus"] == CPUS[-1:]
    assert effective["server"]["options"]["cpus"] == CPUS[:-1]
    samples = pq.read_table(tmp_path / "run" / "queries.parquet").column("sample").to_pylist()
    assert sorted(samples) == list(range(360))
    assert (document["output_check"]["checked"], document["output_check"]["wrong"]) == (360, 0)
    # Logits within 0.1 % of the golden ones have the golden argmax, which is right for over 97 % of the images.
    with np.load(MODELS / "golden.npz") as golden, np.load(MODELS / "labels.npz") as labels:
        logits = golden["LOGITS"]
        best = np.sort(logits, axis=1)
        assert (best[:, -1] - best[:, -2] > 2 * (1e-4 + 1e-3 * np.abs(best[:, -1]))).all(), "no image is that close a call"
        assert (logits.argmax(axis=1) == labels["LABEL"].ravel()).mean() > 0.97
    assert document["server"]["launch"] == profile.split("-")[1]
