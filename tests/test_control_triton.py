"""The control plane of a real Triton over both its protocols, and runs that load and unload a model by it."""

import asyncio
import importlib.util
import os
import signal
import ssl
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from e2e import SERVER_CPUS, Quiet, facts, profile_data, run

from servebench.control.base import RefusedError
from servebench.control.kserve import KServeControl
from servebench.control.kserve_grpc import KServeGrpcControl
from servebench.errors import ProfileError, RunError, ServebenchError
from servebench.launcher import RunningServer, find_launcher
from servebench.record.progress import Snapshot

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(importlib.util.find_spec("pytriton") is None, reason="needs the nvidia-pytriton wheel"),
]

T = TypeVar("T")
Control = KServeControl | KServeGrpcControl
FRAMINGS = ["http", "grpc"]

# A model that is loaded and unloaded in no time, beside the one that is launched.
MODEL = "echo"
CONFIG = """
name: "echo"
backend: "python"
max_batch_size: 4
input [{name: "X" data_type: TYPE_FP32 dims: [2]}]
output [{name: "Y" data_type: TYPE_FP32 dims: [2]}]
instance_group [{kind: KIND_CPU}]
"""
CODE = """
import triton_python_backend_utils as triton

class TritonPythonModel:
    def execute(self, requests):
        tensors = [triton.get_input_tensor_by_name(request, "X") for request in requests]
        return [triton.InferenceResponse([triton.Tensor("Y", tensor.as_numpy())]) for tensor in tensors]
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    launcher = find_launcher("triton")
    options = launcher.Options.model_validate({"cpus": SERVER_CPUS})
    running = launcher.launch("digits", options, tmp_path_factory.mktemp("triton"))
    write_model(running)
    yield running
    running.stop()


def write_model(server: RunningServer, config: str = CONFIG) -> None:
    """Put our model into the server's repository, where it lies unloaded."""
    folder = server.config_files()[0].parent.parent / MODEL
    (folder / "1").mkdir(parents=True, exist_ok=True)
    (folder / "config.pbtxt").write_text(config)
    (folder / "1" / "model.py").write_text(CODE)


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[Any]:
    """NVIDIA's own client: what it sees is the truth."""
    tritonclient = pytest.importorskip("tritonclient.http")
    with tritonclient.InferenceServerClient(server.urls["http"].removeprefix("http://")) as connected:
        yield connected


@pytest.fixture
def loaded(client: Any) -> None:
    """The model is there."""
    client.load_model(MODEL)


@pytest.fixture
def unloaded(client: Any) -> None:
    """The model is not there."""
    client.unload_model(MODEL)
    while state(client) not in ("UNAVAILABLE", ""):
        pass


def ask(server: RunningServer, framing: str, question: Callable[[Control], Awaitable[T]]) -> T:
    async def main() -> T:
        control: Control
        if framing == "grpc":
            control = KServeGrpcControl(server.urls["grpc"], metadata=[], ca_file=None)
        else:
            tls = ssl.create_default_context()
            control = KServeControl(server.urls["http"], headers={}, ssl_context=tls, metrics_url=server.urls["metrics"])
        try:
            return await question(control)
        finally:
            await control.close()

    return asyncio.run(main())


def state(client: Any) -> str:
    """What Triton's index says of the model."""
    (entry,) = [entry for entry in client.get_model_repository_index() if entry["name"] == MODEL]
    found: str = entry.get("state", "")
    return found


# ---- the control plane ---------------------------------------------------------------------


@pytest.mark.parametrize("framing", FRAMINGS)
def test_a_model_is_unloaded_and_loaded_again(server: RunningServer, client: Any, loaded: None, framing: str) -> None:
    async def there_and_back(control: Control) -> None:
        assert await control.ready() and await control.model_ready(MODEL) and await control.model_ready(MODEL, "1")
        await control.unload(MODEL)
        assert state(client) == "UNAVAILABLE"  # not "UNLOADING"
        assert not await control.model_ready(MODEL)
        assert not (await control.activity(MODEL)).ready
        with pytest.raises(RefusedError, match=r"'echo' is not on the server at .*; it has: digits, echo"):
            await control.discover(MODEL)
        await control.unload(MODEL)  # nothing to do
        await control.load(MODEL)
        assert client.is_model_ready(MODEL) and await control.model_ready(MODEL)

    ask(server, framing, there_and_back)


@pytest.mark.parametrize("framing", FRAMINGS)
def test_both_protocols_tell_the_same_of_a_model(server: RunningServer, client: Any, loaded: None, framing: str) -> None:
    found = ask(server, framing, lambda control: control.discover(MODEL))
    assert found.server["name"] == client.get_server_metadata()["name"]
    config = client.get_model_config(MODEL)
    assert found.config is not None and found.config["max_batch_size"] == config["max_batch_size"] == found.model.max_batch_size
    assert [spec.name for spec in found.model.inputs] == [one["name"] for one in config["input"]]


@pytest.mark.parametrize("framing", FRAMINGS)
def test_a_model_that_is_broken_in_the_repository(server: RunningServer, client: Any, loaded: None, framing: str) -> None:
    """Triton's words reach us, while the model of before goes on serving: the index says READY."""
    write_model(server, CONFIG + "dynamic_batching { preferred_batch_size: 64 }")
    try:
        with pytest.raises(RefusedError) as caught:
            ask(server, framing, lambda control: control.load(MODEL))
    finally:
        write_model(server)
    text = str(caught.value)
    assert text.startswith(f"{server.urls[framing]}: cannot load 'echo' (")
    assert "failed to load 'echo', failed to poll from model repository); the server's log says what is wrong with it" in text
    assert "\n" not in text
    assert state(client) == "READY" and client.is_model_ready(MODEL)


@pytest.mark.parametrize("framing", FRAMINGS)
def test_activity_counts_what_triton_counted(server: RunningServer, client: Any, loaded: None, framing: str) -> None:
    import numpy as np
    from tritonclient.http import InferInput

    tensor = InferInput("X", [3, 2], "FP32")
    tensor.set_data_from_numpy(np.zeros((3, 2), np.float32))
    before = ask(server, framing, lambda control: control.activity(MODEL))
    for _ in range(4):
        client.infer(MODEL, [tensor])
    after = ask(server, framing, lambda control: control.activity(MODEL))
    counts = ("requests", "failed", "inferences", "executions", "queued")
    assert [getattr(after, name) - getattr(before, name) for name in counts] == [4, 0, 12, 4, 4]
    statistics = client.get_inference_statistics(MODEL)["model_stats"][0]["inference_stats"]
    assert after.queue_ns == statistics["queue"]["ns"] > (before.queue_ns or 0)
    assert after.ready and after.pending == (0 if framing == "http" else None)


# ---- runs ----------------------------------------------------------------------------------


def profile(running: RunningServer, framing: str = "http", *, load_model: bool = True, **changes: Any) -> dict[str, Any]:
    """A short run on a server that runs elsewhere; the model is loaded for it."""
    load = {"target_qps": 100, "min_duration_s": 1}
    data = profile_data(running.urls[framing], constraints=["p50 <= 1s"], load=load)
    data["server"]["load_model"] = load_model
    data["endpoint"]["model"] = MODEL
    return data | changes


def actions(document: dict[str, Any]) -> list[tuple[str, str, bool]]:
    for note in document["server"]["control"]:
        assert note["seconds"] >= 0
    return [(note["action"], note["model"], "error" in note) for note in document["server"]["control"]]


THERE_AND_BACK = [("load", "echo", False), ("unload", "echo", False)]


@pytest.mark.parametrize("framing", FRAMINGS)
def test_a_run_loads_its_model_and_unloads_it_again(
    server: RunningServer, client: Any, unloaded: None, tmp_path: Path, framing: str
) -> None:
    document, _ = run(profile(server, framing), tmp_path / "run")
    assert document["verdict"] == "PASS", document["trust"]
    assert actions(document) == THERE_AND_BACK
    assert state(client) == "UNAVAILABLE"


def test_a_model_that_was_loaded_already_stays(server: RunningServer, client: Any, loaded: None, tmp_path: Path) -> None:
    document, _ = run(profile(server), tmp_path / "run")
    assert document["verdict"] == "PASS", document["trust"]
    assert actions(document) == []
    assert state(client) == "READY"


def test_without_load_model_nothing_is_loaded(server: RunningServer, client: Any, unloaded: None, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="is not on the server"):
        run(profile(server, load_model=False), tmp_path / "run")
    assert state(client) == "UNAVAILABLE"


def test_a_run_that_cannot_begin_unloads_the_model(server: RunningServer, client: Any, unloaded: None, tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="batch_size"):
        run(profile(server, samples={"batch_size": 10_000}), tmp_path / "run")
    assert state(client) == "UNAVAILABLE"


def test_a_run_that_breaks_off_unloads_the_model_and_keeps_what_it_measured(
    server: RunningServer, client: Any, unloaded: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any, **more: Any) -> None:
        raise RunError("no more luck")

    monkeypatch.setattr("servebench.engine.run.merge_errors", full)
    with pytest.raises(RunError, match=r"^no more luck$"):
        run(profile(server), tmp_path / "run")
    assert state(client) == "UNAVAILABLE"
    kept = facts(tmp_path / "run")
    assert (kept["state"], kept["stop_reason"], actions(kept)) == ("failed", "no more luck", THERE_AND_BACK)
    assert (tmp_path / "run" / "queries.parquet").exists()


def test_an_interrupted_run_unloads_the_model(server: RunningServer, client: Any, unloaded: None, tmp_path: Path) -> None:
    def interrupt(snapshot: Snapshot) -> None:
        if not sent and snapshot.issued > 20:
            sent.append(snapshot.issued)
            os.kill(os.getpid(), signal.SIGINT)

    sent: list[int] = []
    data = profile(server)
    data["load"]["min_duration_s"] = 20
    document, _ = run(data, tmp_path / "run", Quiet(interrupt))
    assert sent and document["state"] == "interrupted"
    assert actions(document) == THERE_AND_BACK
    assert state(client) == "UNAVAILABLE"


class InterruptsAt(Quiet):
    """An observer who presses Ctrl-C when a phase begins."""

    def __init__(self, phase: str) -> None:
        super().__init__()
        self._phase = phase

    def phase(self, name: str, *, duration_s: float | None = None) -> None:
        super().phase(name, duration_s=duration_s)
        if name == self._phase:
            os.kill(os.getpid(), signal.SIGINT)


def test_an_interrupt_while_the_model_is_loaded_unloads_it(
    server: RunningServer, client: Any, unloaded: None, tmp_path: Path
) -> None:
    """Triton would go on loading it, and keep it."""
    observer = InterruptsAt("load echo")
    with pytest.raises(KeyboardInterrupt):
        run(profile(server), tmp_path / "run", observer)
    assert observer.phases[-1] == "unload echo"
    assert state(client) == "UNAVAILABLE"
    assert not (tmp_path / "run").exists()


def test_an_interrupt_while_the_model_is_unloaded_does_not_keep_it(
    server: RunningServer, client: Any, unloaded: None, tmp_path: Path
) -> None:
    """What was measured is complete by then."""
    observer = InterruptsAt("unload echo")
    document, _ = run(profile(server), tmp_path / "run", observer)
    assert observer.phases[-1] == "interrupted: leaving the server as it was found (again to stop at once)"
    assert (document["state"], document["verdict"]) == ("complete", "PASS")
    assert actions(document) == THERE_AND_BACK
    assert state(client) == "UNAVAILABLE"


def test_a_server_that_is_gone_when_the_model_is_to_be_unloaded(
    server: RunningServer, client: Any, unloaded: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was measured stays, and the notes say what is left behind."""

    async def refuse(self: KServeControl, model: str) -> None:
        raise RefusedError("gone for good")

    monkeypatch.setattr(KServeControl, "unload", refuse)
    document, _ = run(profile(server), tmp_path / "run")
    assert document["verdict"] == "PASS"
    assert actions(document) == [("load", "echo", False), ("unload", "echo", True)]
    assert document["server"]["control"][1]["error"] == "gone for good"
    with pytest.raises(ServebenchError) as caught:
        client.unload_model(MODEL)
        run(profile(server, samples={"batch_size": 10_000}), tmp_path / "other")
    assert str(caught.value).endswith("; and the server could not be left as it was found: gone for good")
    assert isinstance(caught.value, ProfileError)
