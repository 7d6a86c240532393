"""The management API of a real TorchServe that wants tokens, and runs that scale a model by it."""

import asyncio
import importlib.util
import json
import ssl
import zipfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import pytest
from e2e import CLIENT_CPUS, SERVER_CPUS, Quiet, run

from servebench.control.base import RefusedError
from servebench.control.torchserve import TorchServeControl
from servebench.errors import ProfileError, ServebenchError, TransportError
from servebench.launcher import RunningServer, find_launcher
from servebench.profile import load_profile

pytestmark = [
    pytest.mark.torchserve,
    pytest.mark.skipif(importlib.util.find_spec("ts") is None, reason="needs the torchserve wheel"),
]

T = TypeVar("T")
TLS = ssl.create_default_context()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    launcher = find_launcher("torchserve")
    options = launcher.Options.model_validate({"token_auth": True, "model_api": True, "cpus": SERVER_CPUS})
    folder = tmp_path_factory.mktemp("torchserve")
    running = launcher.launch("digits", options, folder)
    write_second_archive(folder / "model_store")
    yield running
    running.stop()


def write_second_archive(store: Path) -> None:
    """The launched model's archive once more, for a model called "second"."""
    with zipfile.ZipFile(store / "digits.mar") as archive, zipfile.ZipFile(store / "second.mar", "w") as copy:
        for name in archive.namelist():
            content = archive.read(name)
            if name == "MAR-INF/MANIFEST.json":
                manifest = json.loads(content)
                manifest["model"]["modelName"] = "second"
                content = json.dumps(manifest).encode()
            copy.writestr(name, content)


def ask(server: RunningServer, question: Callable[[TorchServeControl], Awaitable[T]], token: str | None = None) -> T:
    async def main() -> T:
        control = TorchServeControl(
            server.urls["management"],
            token=token or server.tokens["management"],
            ssl_context=TLS,
            metrics_url=server.urls["metrics"],
        )
        try:
            return await question(control)
        finally:
            await control.close()

    return asyncio.run(main())


def workers(server: RunningServer) -> tuple[int, int, int]:
    """As TorchServe says it: the least, the most, and how many there are."""
    described = ask(server, lambda control: control.describe("digits"))
    return described["minWorkers"], described["maxWorkers"], len(described["workers"])


# ---- the control plane ---------------------------------------------------------------------


def test_a_model_is_registered_scaled_and_unregistered(server: RunningServer) -> None:
    async def life(control: TorchServeControl) -> None:
        assert await control.ready() and await control.model_ready("digits")
        assert not await control.model_ready("second")
        await control.register("second.mar", workers=1)
        assert await control.model_ready("second") and await control.model_ready("second", "1.0")
        with pytest.raises(RefusedError, match=r"cannot register 'second.mar' \(HTTP 409: Model version 1.0 is already regis"):
            await control.register("second.mar")
        await control.scale("second", 2, 2, "1.0")
        assert (await control.activity("second")).workers == ("READY", "READY")
        await control.unregister("second")
        with pytest.raises(RefusedError, match=r"\(HTTP 404: Model not found: second\); it has: digits$"):
            await control.describe("second")
        with pytest.raises(RefusedError, match=r"cannot unregister 'second' \(HTTP 404: Model not found: second\)"):
            await control.unregister("second")

    ask(server, life)


@pytest.mark.parametrize("use", ["inference", "nonsense", "none"])
def test_another_token_than_the_management_apis(server: RunningServer, use: str) -> None:
    """TorchServe says the same of a wrong token and of none; we say what to give."""
    token = server.tokens.get(use, use)
    with pytest.raises(RefusedError) as caught:
        ask(server, lambda control: control.discover("digits"), token)
    assert str(caught.value).endswith("; give its management token (server.management_token_env)")
    assert "HTTP 400: Token Authorization failed." in str(caught.value) and token not in str(caught.value)
    assert not ask(server, lambda control: control.ready(), token)


def test_activity_counts_what_was_asked(server: RunningServer) -> None:
    async def predict() -> int:
        headers = {"Authorization": f"Bearer {server.tokens['inference']}"}
        async with (
            aiohttp.ClientSession(server.urls["http"], headers=headers) as session,
            session.post("/predictions/digits", data=b"\0" * 256) as response,
        ):
            return response.status

    before = ask(server, lambda control: control.activity("digits"))
    assert [asyncio.run(predict()) for _ in range(3)] == [200, 200, 200]
    after = ask(server, lambda control: control.activity("digits"))
    assert (after.requests or 0) - (before.requests or 0) == 3
    assert (after.ready, after.pending, after.workers) == (True, 0, ("READY",))


# ---- runs ----------------------------------------------------------------------------------


@pytest.fixture
def tokens(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for use, token in server.tokens.items():
        monkeypatch.setenv(f"TEST_{use.upper()}_TOKEN", token)


def profile(running: RunningServer, **server: Any) -> dict[str, Any]:
    """The bundled profile, short, for a TorchServe that runs elsewhere."""
    data = load_profile("digits-torchserve-http").model_dump(mode="json")
    data["server"] = {
        "url": running.urls["http"],
        "management_url": running.urls["management"],
        "management_token_env": "TEST_MANAGEMENT_TOKEN",
        **server,
    }
    data["endpoint"]["bearer_token_env"] = "TEST_INFERENCE_TOKEN"
    data["load"] |= {"warmup_s": 0, "target_qps": 30, "min_duration_s": 1, "min_query_count": 30}
    data["client"]["cpus"] = CLIENT_CPUS
    data["constraints"] = ["p50 <= 1s"]
    return data


SCALED = [
    {"action": "scale", "min_workers": 2, "max_workers": 2, "model": "digits"},
    {"action": "scale", "min_workers": 1, "max_workers": 1, "model": "digits"},
]


def actions(document: dict[str, Any]) -> list[dict[str, Any]]:
    return [{key: value for key, value in note.items() if key != "seconds"} for note in document["server"]["control"]]


def test_a_run_scales_the_model_and_back(server: RunningServer, tokens: None, tmp_path: Path) -> None:
    document, _ = run(profile(server, workers=2), tmp_path / "run")
    assert document["verdict"] == "PASS", document["trust"]
    assert actions(document) == SCALED
    assert [worker["status"] for worker in document["server"]["model_config"]["workers"]] == ["READY", "READY"]
    assert workers(server) == (1, 1, 1)
    kept = b"".join(path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file())
    assert not any(token.encode() in kept for token in server.tokens.values())


def test_a_run_that_fails_scales_back(server: RunningServer, tokens: None, tmp_path: Path) -> None:
    data = profile(server, workers=2)
    data["samples"] |= {"batch_size": 100_000}
    with pytest.raises(ServebenchError):
        run(data, tmp_path / "run")
    assert workers(server) == (1, 1, 1)


def test_a_run_describes_the_model_of_a_server_elsewhere(server: RunningServer, tokens: None, tmp_path: Path) -> None:
    """As many workers as there are already: nothing is done, nor undone."""
    document, _ = run(profile(server, workers=1), tmp_path / "run")
    assert document["verdict"] == "PASS", document["trust"]
    assert actions(document) == []
    assert (document["server"]["model_config"]["modelName"], document["server"]["launch"]) == ("digits", None)


def test_a_run_with_the_wrong_token_or_none(
    server: RunningServer, tokens: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    observer = Quiet()
    with pytest.raises(TransportError, match=r"give its management token"):
        run(profile(server, management_token_env="TEST_INFERENCE_TOKEN", workers=2), tmp_path / "run", observer)
    assert observer.phases == ["asking the server about the model"]
    monkeypatch.delenv("TEST_MANAGEMENT_TOKEN")
    with pytest.raises(
        ProfileError, match=r"^server.management_token_env: the environment variable TEST_MANAGEMENT_TOKEN is not"
    ):
        run(profile(server), tmp_path / "run", observer := Quiet())
    assert not (tmp_path / "run").exists() and observer.phases == []
    assert workers(server) == (1, 1, 1)
