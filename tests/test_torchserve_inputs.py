"""Models of several inputs on a TorchServe that a run launched: every answer is what the torch module answers by itself.

Whatever carries the inputs, and wherever the samples come from. The expected outputs are made by calling the module
directly (`test_models_served.Case`); the run compares each reply with them.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from e2e import run
from servebench_servers.models import MODELS, samples
from servebench_servers.models.serving.settings import Array
from servebench_servers.torchserve import TorchServeLauncher, TorchServeOptions
from test_models_served import Case, clicks, needs_torch, tokens

from servebench.errors import ProfileError
from servebench.launcher import RunningServer
from servebench.load.library import build_library
from servebench.profile import Samples
from servebench.wire.tensors import TensorSpec

ROWS = 4
#: Largest difference between a reply and the module's answer; outputs are around 1.
ATOL = 1e-4
CARRIERS: dict[str, dict[str, str]] = {
    "multipart": {"protocol": "torchserve-http", "body": "multipart"},
    "instances": {"protocol": "torchserve-http", "body": "instances"},
    "raw": {"protocol": "torchserve-http"},
    "grpc": {"protocol": "torchserve-grpc"},
}
#: What the model leaves open, and what of random numbers it takes.
RANDOM: dict[str, dict[str, Any]] = {
    "dlrm": {},
    "bert": {
        "shapes": {"INPUT_IDS": [9], "ATTENTION_MASK": [9], "TOKEN_TYPE_IDS": [9]},
        "limits": {"TOKEN_TYPE_IDS": 2},
    },
}

pytestmark = [needs_torch, pytest.mark.torchserve, pytest.mark.timeout(300)]


@pytest.fixture(scope="module", params=[pytest.param("dlrm", marks=pytest.mark.models), "bert"])
def hosted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, RunningServer]]:
    pytest.importorskip("ts")
    options = TorchServeOptions(device="cpu", weights_seed=7, batch_size=ROWS, max_batch_delay_ms=5)
    server = TorchServeLauncher().launch(request.param, options, tmp_path_factory.mktemp(request.param))
    yield request.param, server
    server.stop()


def of_random(model: str, folder: Path) -> dict[str, Any]:
    section = {"source": "random", "count": ROWS, **RANDOM[model]}
    specs = [TensorSpec(spec.name, spec.datatype, spec.dims) for spec in MODELS[model].inputs]
    library = build_library(Samples.model_validate(section), specs, 0)
    write_golden(model, {name: np.asarray(rows) for name, rows in library.inputs.items()}, folder)
    return section


def of_npz(model: str, folder: Path) -> dict[str, Any]:
    rows = rows_of(model)
    write_golden(model, rows, folder)
    np.savez(folder / "inputs.npz", **rows)
    return {"source": "npz", "path": str(folder / "inputs.npz")}


def of_npy(model: str, folder: Path) -> dict[str, Any]:
    rows = rows_of(model)
    write_golden(model, rows, folder)
    for name, array in rows.items():
        np.save(folder / f"{name}.npy", array)
    return {"source": "npy", "path": str(folder)}


def of_perf_analyzer(model: str, folder: Path) -> dict[str, Any]:
    """Samples of different lengths, where the model has such; the expected outputs are in the file."""
    drawn = samples.clicks(ROWS) if model == "dlrm" else samples.questions(ROWS, 6, 20)
    outputs = [answers(model, {name: array[np.newaxis] for name, array in sample.items()})[0] for sample in drawn]
    assert len({output.shape for output in outputs}) == (1 if model == "dlrm" else ROWS)
    name = MODELS[model].output.name
    document = {
        "data": [{name: step(array) for name, array in sample.items()} for sample in drawn],
        "validation_data": [{name: step(output)} for output in outputs],
    }
    (folder / "steps.json").write_text(json.dumps(document))
    return {"source": "perf-analyzer", "path": str(folder / "steps.json")}


def rows_of(model: str) -> dict[str, Array]:
    return clicks() if model == "dlrm" else tokens()


def answers(model: str, rows: dict[str, Array]) -> Array:
    """What the module answers, called directly."""
    each = [slice(row, row + 1) for row in range(len(next(iter(rows.values()))))]
    return np.concatenate(Case(model, lambda: rows).directly("fp32", each))


def write_golden(model: str, rows: dict[str, Array], folder: Path) -> None:
    expected = answers(model, rows)
    for row in range(1, ROWS):
        assert np.abs(expected[row] - expected[row - 1]).max() > 20 * ATOL, "each sample has an answer of its own"
    np.savez(folder / "golden.npz", **{MODELS[model].output.name: expected})


def step(array: Array) -> dict[str, Any]:
    return {"content": array.ravel().tolist(), "shape": list(array.shape)}


def run_on(
    server: RunningServer, model: str, carrier: str, section: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """A run that launches the server, which is there already."""
    monkeypatch.setattr("servebench.engine.run.launched", lambda *_: contextlib.nullcontext(server))
    golden = folder / "golden.npz"
    profile = {
        "name": "test",
        "server": {"launch": "torchserve"},
        "endpoint": {"model": model, **CARRIERS[carrier]},
        "samples": {"order": "equal_issue", **section},
        "load": {"target_qps": 10, "min_duration_s": 0, "min_query_count": 3 * ROWS, "warmup_s": 0},
        "constraints": ["p90 <= 10s"],
        "output_check": {"rtol": 0, "atol": ATOL, "golden": str(golden) if golden.exists() else None},
    }
    document, records = run(profile, folder / "run")
    assert sorted(records.sample) == sorted(3 * list(range(ROWS)))
    return document


@pytest.mark.parametrize(
    ("source", "carrier"),
    [
        pytest.param(of_random, "multipart", id="random over multipart"),
        pytest.param(of_random, "grpc", id="random over gRPC"),
        pytest.param(of_npz, "instances", id="npz over JSON"),
        pytest.param(of_npy, "grpc", id="npy over gRPC"),
        pytest.param(of_perf_analyzer, "multipart", id="perf-analyzer over multipart"),
    ],
)
def test_answers_are_the_modules(
    hosted: tuple[str, RunningServer],
    source: Callable[[str, Path], dict[str, Any]],
    carrier: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, server = hosted
    document = run_on(server, model, carrier, source(model, tmp_path), tmp_path, monkeypatch)
    assert document["counts"]["ok"] == document["counts"]["planned"] == 3 * ROWS, document["errors"]
    checked = document["output_check"]
    assert (checked["checked"], checked["wrong"], checked["golden"]) == (3 * ROWS, 0, True), checked


def test_raw_bytes_are_refused_with_the_remedy(
    hosted: tuple[str, RunningServer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, server = hosted
    names = ", ".join(spec.name for spec in MODELS[model].inputs)
    with pytest.raises(ProfileError, match=f"^endpoint: body raw .* the model has {names}; set endpoint.body: multipart$"):
        run_on(server, model, "raw", {"source": "random", **RANDOM[model]}, tmp_path, monkeypatch)
