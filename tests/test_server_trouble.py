"""Real servers in trouble: a Triton that goes away, a TorchServe that is full, wants another token, or gets too much."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from e2e import Quiet, assert_books_balance, run

from servebench.errors import TransportError
from servebench.launcher import RunningServer, find_launcher
from servebench.profile import load_profile
from servebench.record.progress import Snapshot


def launch(name: str, tmp_path: Path, **options: Any) -> RunningServer:
    launcher = find_launcher(name)
    return launcher.launch("digits", launcher.Options.model_validate(options), tmp_path)


def settings(profile: str, url: str, **load: Any) -> dict[str, Any]:
    data = load_profile(profile).model_dump(mode="json")
    data["server"] = {"url": url}
    data["load"] |= {"warmup_s": 0, "min_query_count": 100, "drain_timeout_s": 3, "timeout_s": 3, **load}
    data["constraints"] = ["p99 <= 800ms", "errors < 1%"]
    return data


@pytest.mark.triton
@pytest.mark.parametrize(
    ("framing", "number"),
    [
        # Over HTTP a Triton that was asked to stop goes on serving busy connections for half a minute.
        pytest.param("http", signal.SIGKILL, id="HTTP, killed"),
        pytest.param("grpc", signal.SIGINT, id="gRPC, stopped with a GOAWAY"),
    ],
)
def test_a_triton_that_goes_away_mid_run(tmp_path: Path, framing: str, number: signal.Signals) -> None:
    (tmp_path / "triton").mkdir()
    server = launch("triton", tmp_path / "triton")
    stopped: list[int] = []

    def stop(snapshot: Snapshot) -> None:
        if not stopped and snapshot.elapsed_s > 1:
            stopped.append(server.describe()["pid"])
            os.kill(stopped[0], number)

    try:
        data = settings(f"digits-triton-{framing}", server.urls[framing], target_qps=100, min_duration_s=6)
        document, _ = run(data, tmp_path / "run", Quiet(stop))
    finally:
        server.stop()
    assert stopped
    assert document["verdict"] == "FAIL", document["trust"]["reasons"]
    assert_books_balance(document, tmp_path / "run")
    assert document["counts"]["ok"] > 50
    kinds = {error["kind"] for error in document["errors"]}
    assert "connect" in kinds, "most of the rest was refused"
    # A Triton on its way out refuses with a status; what it drops without a word is stale or reset; nothing is garbage.
    assert kinds <= {"connect", "reset", "stale", "status", "timeout", "unfinished", "shed"}


@pytest.fixture(scope="module")
def full_torchserve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    server = launch("torchserve", tmp_path_factory.mktemp("torchserve"), job_queue_size=1, token_auth=True)
    yield server
    server.stop()


@pytest.mark.torchserve
@pytest.mark.parametrize(
    ("framing", "words"),
    [
        pytest.param("http", "HTTP 503: ", id="HTTP says 503"),
        pytest.param("grpc", "INTERNAL: ", id="gRPC says INTERNAL"),
    ],
)
def test_a_full_job_queue_is_an_error_status(
    tmp_path: Path, full_torchserve: RunningServer, monkeypatch: pytest.MonkeyPatch, framing: str, words: str
) -> None:
    monkeypatch.setenv("TORCHSERVE_TOKEN", full_torchserve.tokens["inference"])
    data = settings(f"digits-torchserve-{framing}", full_torchserve.urls[framing], target_qps=3_000, min_duration_s=1)
    data["endpoint"]["bearer_token_env"] = "TORCHSERVE_TOKEN"
    data["constraints"] = ["p99 <= 3s", "errors < 1%"]
    document, _ = run(data, tmp_path / "run")
    assert_books_balance(document, tmp_path / "run")
    refused = [error for error in document["errors"] if error["kind"] == "status"]
    assert refused, document["errors"]
    assert all(error["detail"].startswith(words) for error in refused)
    assert sum(error["count"] for error in refused) > 20
    assert document["counts"]["ok"] > 20
    assert document["verdict"] in ("FAIL", "INVALID")
    assert [item["result"] for item in document["constraints"] if item["text"] == "errors < 1%"] == ["FAIL"]
    for file in (tmp_path / "run").rglob("*"):
        if file.is_file():
            assert full_torchserve.tokens["inference"].encode() not in file.read_bytes()


@pytest.mark.torchserve
@pytest.mark.parametrize("framing", ["http", "grpc"])
def test_a_wrong_token_is_found_before_any_load(
    tmp_path: Path, full_torchserve: RunningServer, monkeypatch: pytest.MonkeyPatch, framing: str
) -> None:
    monkeypatch.setenv("TORCHSERVE_TOKEN", "wrong")
    data = settings(f"digits-torchserve-{framing}", full_torchserve.urls[framing], target_qps=10)
    data["endpoint"]["bearer_token_env"] = "TORCHSERVE_TOKEN"
    with pytest.raises(TransportError, match=r"refuses the first sample: (HTTP 400|PERMISSION_DENIED)"):
        run(data, tmp_path / "run")


@pytest.mark.torchserve
def test_a_body_that_is_too_large_is_found_before_any_load(
    tmp_path: Path, full_torchserve: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHSERVE_TOKEN", full_torchserve.tokens["inference"])
    (tmp_path / "bodies").mkdir()
    (tmp_path / "bodies" / "large.bin").write_bytes(bytes(68 << 20))  # it is told to take 64 MiB
    data = settings("digits-torchserve-http", full_torchserve.urls["http"], target_qps=10)
    data["endpoint"]["bearer_token_env"] = "TORCHSERVE_TOKEN"
    data["samples"] = {"source": "files", "path": str(tmp_path / "bodies")}
    data["output_check"] = {}
    with pytest.raises(TransportError, match=r"refuses the first sample: HTTP 413"):
        run(data, tmp_path / "run")
