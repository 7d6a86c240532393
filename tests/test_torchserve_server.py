"""The real TorchServe, as the launcher hosts it: its answers in every form, its facts, its queue and batches, and its end."""

from __future__ import annotations

import hashlib
import http.client
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
import venv
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import psutil
import pytest
from launchers import HELDOUT
from numpy.typing import NDArray
from processes import alive, children, family
from servebench_servers.host import choose_ports
from servebench_servers.models.digits import DIGITS
from servebench_servers.torchserve import TorchServeLauncher, TorchServeOptions
from servebench_servers.torchserve_server import TorchServeServer

from servebench.errors import LaunchError
from servebench.protos import KSERVE, TORCHSERVE, TORCHSERVE_SERVICE

pytestmark = [
    pytest.mark.torchserve,
    pytest.mark.skipif(importlib.util.find_spec("ts") is None, reason="needs the torchserve wheel"),
]
RAW = {"Content-Type": "application/octet-stream"}
AS_JSON = {"Content-Type": "application/json"}


def temp_dir(server: TorchServeServer) -> Path:
    argument = next(text for text in server.describe()["command"] if text.startswith("-Djava.io.tmpdir="))
    return Path(argument.partition("=")[2])


def ports(server: TorchServeServer) -> set[int]:
    return {port for url in server.urls.values() if (port := urlsplit(url).port) is not None}


def ask(url: str, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None) -> tuple[int, bytes]:
    """One HTTP exchange with the standard library's client."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)
    try:
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def predict(server: TorchServeServer, images: NDArray[Any], **headers: str) -> NDArray[Any]:
    status, reply = ask(server.urls["http"], "POST", "/predictions/digits", images.tobytes(), RAW | headers)
    assert status == 200, reply
    return np.frombuffer(reply, "<f4").reshape(-1, 10)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchServeServer]:
    options = TorchServeOptions(batch_size=8, max_batch_delay_ms=20, oip=True, heap_mib=256)
    running = TorchServeLauncher().launch("digits", options, tmp_path_factory.mktemp("torchserve"))
    yield running
    running.stop()


def close_to(logits: NDArray[Any], golden: NDArray[Any]) -> None:
    np.testing.assert_allclose(logits, golden, rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(logits.argmax(axis=-1), golden.argmax(axis=-1))


def test_all_held_out_images_of_sixteen_clients_at_once(server: TorchServeServer) -> None:
    """Each client gets its own images' answers, though TorchServe mixes them."""
    log_bytes = server.log_path.stat().st_size
    with ThreadPoolExecutor(16) as threads:
        logits = np.concatenate(list(threads.map(lambda image: predict(server, image), HELDOUT["IMAGE"])))
    close_to(logits, HELDOUT["LOGITS"])
    assert (logits.argmax(axis=1) == HELDOUT["LABEL"]).mean() > 0.97
    assert server.log_path.stat().st_size == log_bytes  # nothing is logged for a request that succeeds


def test_every_form_of_request(server: TorchServeServer) -> None:
    images, golden = HELDOUT["IMAGE"][:3], HELDOUT["LOGITS"][:3]
    url = server.urls["http"]
    close_to(predict(server, images), golden)

    instances = json.dumps({"instances": images.tolist()}).encode()
    for path in ("/v1/models/digits:predict", "/predictions/digits"):
        status, reply = ask(url, "POST", path, instances, AS_JSON)
        assert status == 200
        close_to(np.array(json.loads(reply)["predictions"]), golden)

    tensor = {"name": "IMAGE", "datatype": "FP32", "shape": [3, 1, 8, 8], "data": images.ravel().tolist()}
    status, reply = ask(url, "POST", "/v2/models/digits/infer", json.dumps({"id": "7", "inputs": [tensor]}).encode(), AS_JSON)
    assert status == 200
    document = json.loads(reply)
    assert (document["id"], document["model_name"], document["outputs"][0]["name"]) == ("7", "digits", "LOGITS")
    close_to(np.array(document["outputs"][0]["data"]).reshape(document["outputs"][0]["shape"]), golden)

    part = b'--b\r\nContent-Disposition: form-data; name="data"; filename="f"\r\n\r\n' + images.tobytes() + b"\r\n--b--\r\n"
    status, reply = ask(url, "POST", "/predictions/digits", part, {"Content-Type": "multipart/form-data; boundary=b"})
    assert status == 200
    close_to(np.frombuffer(reply, "<f4").reshape(3, 10), golden)


def test_a_bad_request_is_refused_over_both_protocols(server: TorchServeServer) -> None:
    status, reply = ask(server.urls["http"], "POST", "/predictions/digits", b"short", RAW)
    assert status == 400 and b"5 bytes are not rows of 256 bytes" in reply

    grpc = pytest.importorskip("grpc")
    with pytest.raises(grpc.RpcError) as caught:
        grpc_predict(server, b"short")
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "5 bytes are not rows of 256 bytes" in caught.value.details()


def grpc_call(server: TorchServeServer, method: str, request: Any, reply: Any, metadata: Any = ()) -> Any:
    grpc = pytest.importorskip("grpc")
    with grpc.insecure_channel(server.urls["grpc"].removeprefix("grpc://")) as channel:
        call = channel.unary_unary(method, request.__class__.SerializeToString, reply.FromString)
        return call(request, timeout=30, metadata=metadata)


def grpc_predict(server: TorchServeServer, content: bytes, metadata: Any = ()) -> bytes:
    request = TORCHSERVE.PredictionsRequest(model_name="digits", input={"data": content})
    reply = grpc_call(server, f"/{TORCHSERVE_SERVICE}/Predictions", request, TORCHSERVE.PredictionResponse, metadata)
    prediction: bytes = reply.prediction
    return prediction


def test_predictions_over_grpc(server: TorchServeServer) -> None:
    log_bytes = server.log_path.stat().st_size
    for row in (0, 200, 359):
        prediction = grpc_predict(server, HELDOUT["IMAGE"][row].tobytes())
        close_to(np.frombuffer(prediction, "<f4"), HELDOUT["LOGITS"][row])
    assert server.log_path.stat().st_size == log_bytes


def test_open_inference_protocol(server: TorchServeServer) -> None:
    """Over HTTP its health, over gRPC (messages of KServe, service of TorchServe) an inference."""
    status, reply = ask(server.urls["http"], "GET", "/v2")
    assert status == 200 and json.loads(reply)["version"] == server.describe()["version"]

    request = KSERVE.ModelInferRequest(model_name="digits", id="q7")
    tensor = request.inputs.add(name="IMAGE", datatype="FP32", shape=[2, 1, 8, 8])
    tensor.contents.fp32_contents.extend(HELDOUT["IMAGE"][:2].ravel())
    method = "/org.pytorch.serve.grpc.openinference.GRPCInferenceService/ModelInfer"
    answer = grpc_call(server, method, request, KSERVE.ModelInferResponse)
    assert (answer.id, answer.outputs[0].name) == ("q7", "LOGITS")
    close_to(np.array(answer.outputs[0].contents.fp32_contents).reshape(*answer.outputs[0].shape), HELDOUT["LOGITS"][:2])


def test_model_api_is_off(server: TorchServeServer) -> None:
    for method, path in (("POST", "/models?url=digits.mar"), ("DELETE", "/models/digits")):
        assert ask(server.urls["management"], method, path)[0] == 405


def test_metrics_count_requests(server: TorchServeServer) -> None:
    def total() -> float:
        status, page = ask(server.urls["metrics"], "GET", "/metrics")
        assert status == 200
        lines = [line for line in page.decode().splitlines() if line.startswith("ts_inference_requests_total{")]
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    before = total()
    for row in range(5):
        predict(server, HELDOUT["IMAGE"][row])
    assert total() - before == 5


def test_description_agrees_with_the_server_and_the_files(server: TorchServeServer) -> None:
    facts = json.loads(json.dumps(server.describe()))
    assert facts["weights"]["origin"] == "shipped, trained on scikit-learn digits, seed 2026"
    assert facts["weights"]["sha256"] == hashlib.sha256(DIGITS.weights_path.read_bytes()).hexdigest()
    files = {path.name: path.read_text() for path in server.config_files()}
    assert (files["config.properties"], files["model-config.yaml"]) == (facts["config"], facts["model_config"])
    (described,) = json.loads(ask(server.urls["management"], "GET", "/models/digits")[1])
    assert (described["batchSize"], described["maxBatchDelay"], len(described["workers"])) == (8, 20, 1)
    log = server.log_path.read_text()
    # The handler's own words: torch and numpy are what it runs, not what we believe.
    computing = f"torch {facts['torch']} on cpu in fp32 with 1 thread(s)"
    assert f"{computing}, numpy {facts['numpy']}, Python environment {sys.prefix}" in log
    assert f"Torchserve version: {facts['version']}" in log
    assert "Max heap size: 256 M" in log
    assert facts["distribution"] == f"torchserve {facts['version']}"


def test_listens_on_loopback_only(server: TorchServeServer) -> None:
    listening = [c.laddr for p in family(server) for c in p.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    assert {address.port for address in listening} == ports(server)
    assert {address.ip.removeprefix("::ffff:") for address in listening} == {"127.0.0.1"}


def test_a_second_server_with_tokens_a_short_queue_and_its_end(server: TorchServeServer, tmp_path: Path) -> None:
    cpu = min(os.sched_getaffinity(0))
    options = TorchServeOptions(token_auth=True, model_api=True, job_queue_size=1, cpus=[cpu])
    second = TorchServeLauncher().launch("digits", options, tmp_path / "work")
    try:
        assert set(second.tokens) == {"inference", "management"}
        authorization = {use: f"Bearer {token}" for use, token in second.tokens.items()}
        check_tokens(second, authorization)
        check_short_queue(second, authorization["inference"])
        processes = family(second)
        assert len(processes) == 2 and all(process.cpu_affinity() == [cpu] for process in processes)
        directory = temp_dir(second)
        assert (directory / "key_file.json").stat().st_mode & 0o077 == 0
    finally:
        second.stop()
    assert second.exit_code() is not None
    assert not any(alive(process) for process in processes)
    assert not directory.exists()
    choose_ports({str(port): port for port in ports(second)})  # all free again
    second.stop()
    kept = [path.read_bytes() for path in (tmp_path / "work").rglob("*") if path.is_file()]
    said = json.dumps(second.describe()).encode()
    assert len(kept) >= 5 and not any(token.encode() in text for token in second.tokens.values() for text in [*kept, said])
    close_to(predict(server, HELDOUT["IMAGE"][:1]), HELDOUT["LOGITS"][:1])  # the first is untouched


def check_tokens(server: TorchServeServer, authorization: dict[str, str]) -> None:
    image, golden = HELDOUT["IMAGE"][:1], HELDOUT["LOGITS"][:1]
    assert ask(server.urls["http"], "POST", "/predictions/digits", image.tobytes(), RAW)[0] == 400
    wrong = RAW | {"Authorization": authorization["management"]}
    assert ask(server.urls["http"], "POST", "/predictions/digits", image.tobytes(), wrong)[0] == 400
    close_to(predict(server, image, Authorization=authorization["inference"]), golden)

    grpc = pytest.importorskip("grpc")
    with pytest.raises(grpc.RpcError) as caught:
        grpc_predict(server, image.tobytes())
    assert caught.value.code() == grpc.StatusCode.PERMISSION_DENIED
    prediction = grpc_predict(server, image.tobytes(), [("authorization", authorization["inference"])])
    close_to(np.frombuffer(prediction, "<f4").reshape(1, 10), golden)

    management = server.urls["management"]
    allowed = {"Authorization": authorization["management"]}
    assert ask(management, "GET", "/models/digits")[0] == 400
    assert ask(management, "GET", "/models/digits", headers=allowed)[0] == 200
    assert ask(management, "DELETE", "/models/none", headers=allowed)[0] == 404  # not 405: the model API is on


def check_short_queue(server: TorchServeServer, authorization: str) -> None:
    """Of eight large requests at once, one is worked on, one waits, and most others are refused: 503, over gRPC INTERNAL."""
    many = np.tile(HELDOUT["IMAGE"], (10, 1, 1, 1)).tobytes()
    headers = RAW | {"Authorization": authorization}
    with ThreadPoolExecutor(8) as threads:
        replies = list(threads.map(lambda _: ask(server.urls["http"], "POST", "/predictions/digits", many, headers), range(8)))
    statuses = [status for status, _ in replies]
    assert set(statuses) == {200, 503}, statuses
    for status, reply in replies:
        if status == 200:
            close_to(np.frombuffer(reply, "<f4").reshape(-1, 10), np.tile(HELDOUT["LOGITS"], (10, 1)))

    grpc = pytest.importorskip("grpc")

    def code(_: int) -> Any:
        try:
            return grpc_predict(server, many, [("authorization", authorization)]) and grpc.StatusCode.OK
        except grpc.RpcError as error:
            return error.code()

    with ThreadPoolExecutor(8) as threads:
        assert set(threads.map(code, range(8))) == {grpc.StatusCode.OK, grpc.StatusCode.INTERNAL}


def test_another_environments_torchserve(tmp_path: Path) -> None:
    """An environment that sees the installed packages, but not servebench, which is installed in another way."""
    folder = tmp_path / "environment"
    venv.create(folder, symlinks=True)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    (site_packages / "packages.pth").write_text(sysconfig.get_path("purelib"))
    python = folder / "bin" / "python"
    assert subprocess.run([python, "-c", "import servebench"], cwd="/", stderr=subprocess.PIPE, check=False).returncode == 1

    options = TorchServeOptions(python=str(python), heap_mib=256)
    running = TorchServeLauncher().launch("digits", options, tmp_path / "work")
    try:
        close_to(predict(running, HELDOUT["IMAGE"][:3]), HELDOUT["LOGITS"][:3])
        facts = running.describe()
        assert facts["distribution"] == f"torchserve {facts['version']} of {python}"
        assert {process.cmdline()[0] for process in family(running)[1:]} == {str(python)}
        computing = f"torch {facts['torch']} on cpu in fp32 with 1 thread(s), numpy {facts['numpy']}"
        assert f"{computing}, Python environment {folder}\n" in running.log_path.read_text()
    finally:
        running.stop()


def test_corrupt_weights_fail_the_launch_and_leave_nothing(tmp_path: Path) -> None:
    before = children()
    weights = tmp_path / "mine.pt"
    weights.write_bytes(b"not weights at all")
    with pytest.raises(LaunchError) as caught:
        TorchServeLauncher().launch("digits", TorchServeOptions(weights=weights, startup_timeout_s=60), tmp_path / "work")
    text = str(caught.value)
    assert text.startswith("a worker of torchserve ended before the model was loaded: ValueError: ")
    assert "does not hold the digits network's weights" in text and "\n" not in text
    assert "does not hold the digits network's weights" in caught.value.log_tail
    assert children() == before


def test_batches_by_delay_and_by_size_and_a_killed_server_is_swept(tmp_path: Path) -> None:
    weights = Path(shutil.copy(DIGITS.weights_path, tmp_path / "mine.pt"))
    options = TorchServeOptions(weights=weights, workers=2, batch_size=8, max_batch_delay_ms=1_000, request_log=True)
    killed = TorchServeLauncher().launch("digits", options, tmp_path / "work")
    try:
        check_batching(killed, HELDOUT["IMAGE"][0])
    except BaseException:
        killed.stop()
        raise
    processes, directory = family(killed), temp_dir(killed)
    assert len(processes) == 3
    assert killed.describe()["weights"]["origin"] == str(weights)
    assert "ACCESS_LOG" in killed.log_path.read_text()  # TorchServe's own log configuration
    assert [path.name for path in killed.config_files()] == ["config.properties", "model-config.yaml"]
    with zipfile.ZipFile(tmp_path / "work" / "model_store" / "digits.mar") as archive:
        assert archive.read("weights.pt") == weights.read_bytes()
    processes[0].kill()
    os.waitid(os.P_PID, processes[0].pid, os.WEXITED | os.WNOWAIT)  # the end of it, left for stop to collect
    assert directory.exists()
    started_s = time.monotonic()
    killed.stop()
    assert time.monotonic() - started_s < 5  # workers that have nothing to finish are not waited for
    assert killed.exit_code() == -9
    assert not any(alive(process) for process in processes)
    assert not directory.exists()


def check_batching(server: TorchServeServer, image: NDArray[Any]) -> None:
    """A request alone waits for company as long as it may; the eighth of eight ends the wait of all."""
    started_s = time.monotonic()
    predict(server, image)
    assert time.monotonic() - started_s >= 1.0
    started_s = time.monotonic()
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda _: predict(server, image), range(8)))
    assert time.monotonic() - started_s < 1.0
