"""The TorchServe launcher: its options, its life cycle on a scripted server, and why a server did not start."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from launchers import refusal
from processes import children
from pydantic import ValidationError
from servebench_servers import torchserve_install
from servebench_servers.torchserve import TorchServeLauncher, TorchServeOptions
from servebench_servers.torchserve_server import TorchServeServer, failure_cause, read_tokens, worker_ended

from servebench.errors import LaunchError

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
        pytest.param(
            {"python": "PATH", "container": {"image": "ts"}}, "python is a program of this host", id="a Python, and a container"
        ),
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


def test_unknown_model_lists_the_known_ones(tmp_path: Path) -> None:
    text = refusal(lambda: TorchServeLauncher().launch("resnet", TorchServeOptions(), tmp_path))
    assert "'resnet'" in text and "known: bert, delay, digits" in text


def test_a_python_that_will_not_do_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    options = TorchServeOptions(python=str(tmp_path / "python"))
    text = refusal(lambda: TorchServeLauncher().launch("digits", options, tmp_path / "work"))
    assert text.startswith(f"python: {tmp_path}/python: no such program; ")
    assert not (tmp_path / "work").exists()


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
    monkeypatch.setattr(torchserve_install, "torchserve_home", lambda package_file, hint: tmp_path)
    monkeypatch.setattr(torchserve_install, "check_torch", lambda version, hint: None)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()

    def launch(script: str, **options: Any) -> TorchServeServer:
        java = tmp_path / "java"
        java.write_text(script)
        java.chmod(0o755)
        return TorchServeLauncher().launch("digits", TorchServeOptions(java=java, **options), tmp_path / "work")

    return launch


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
