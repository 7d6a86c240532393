"""config.properties, model-config.yaml and log4j2.xml, held to TorchServe's own readers and class files."""

from __future__ import annotations

import importlib.util
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from servebench_servers.torchserve_config import ENDPOINTS, TorchServeConfig
from servebench_servers.torchserve_cpu_launcher import CpuLauncher

PORTS = {endpoint: 7000 + number for number, endpoint in enumerate(ENDPOINTS)}
SERVE = "org/pytorch/serve"

#: What `config()` asks of TorchServe, by TorchServe's own keys.
ASKED: dict[str, Any] = {
    "minWorkers": 2,
    "maxWorkers": 2,
    "batchSize": 4,
    "maxBatchDelay": 20,
    "responseTimeout": 30,
    "startupTimeout": 60,
    "deviceType": "cpu",
}
#: What TorchServe 0.12.0 answered to GET /models/digits (the one element of its list), without the keys that say nothing here.
REPORTED: dict[str, Any] = ASKED | {
    "modelName": "digits",
    "modelVersion": "1.0",
    "maxRetryTimeoutInSec": 300,
    "workers": [{"id": "9000", "status": "READY", "pid": 32004, "gpu": False}],
    "jobQueueStatus": {"remainingCapacity": 50, "pendingRequests": 0},
}


def config(**changes: Any) -> TorchServeConfig:
    settings: dict[str, Any] = {
        "model": "digits",
        "batch_size": 4,
        "max_batch_delay_ms": 20,
        "workers": 2,
        "job_queue_size": 50,
        "response_timeout_s": 30,
        "startup_timeout_s": 60,
        "netty_threads": None,
        "heap_mib": 256,
        "token_auth": False,
        "model_api": False,
        "oip": False,
        "handler": {"serving": "{}"},
    }
    return TorchServeConfig(**(settings | changes))


def as_torchserve_reads(text: str, tmp_path: Path) -> Mapping[str, str]:
    """The text through the function that TorchServe's own command reads its configuration with."""
    model_server = pytest.importorskip("ts.model_server")
    file = tmp_path / "config.properties"
    file.write_text(text)
    properties: dict[str, str] = model_server.load_properties(str(file))
    return properties


@pytest.fixture(scope="module")
def jar() -> zipfile.ZipFile:
    spec = importlib.util.find_spec("ts")
    if spec is None or spec.origin is None:
        pytest.skip("needs the torchserve wheel")
    return zipfile.ZipFile(Path(spec.origin).parent / "frontend" / "model-server.jar")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        pytest.param(
            {},
            {
                "inference_address": "http://127.0.0.1:7000",
                "management_address": "http://127.0.0.1:7001",
                "metrics_address": "http://127.0.0.1:7002",
                "grpc_inference_address": "127.0.0.1",
                "grpc_inference_port": "7003",
                "grpc_management_address": "127.0.0.1",
                "grpc_management_port": "7004",
                "initial_worker_port": "7005",
            },
            id="every listener on loopback",
        ),
        pytest.param(
            {},
            {
                "load_models": "digits.mar",
                "job_queue_size": "50",
                "default_workers_per_model": "2",
                "default_response_timeout": "30",
                "metrics_mode": "prometheus",
                "disable_system_metrics": "true",
                "enable_envvars_config": "false",
                "install_py_dep_per_model": "false",
                "vmargs": "-Xmx256m",
            },
            id="what is always said",
        ),
        pytest.param(
            {},
            {
                "disable_token_authorization": "true",
                "enable_model_api": "false",
                "ts_open_inference_protocol": "false",
                "number_of_netty_threads": None,
                "cpu_launcher_enable": None,
                "cpu_launcher_args": None,
            },
            id="all options off",
        ),
        pytest.param(
            {
                **{"token_auth": True, "model_api": True, "oip": True, "netty_threads": 3},
                "cpu_launcher": CpuLauncher((2, 3, 5, 7), 2, ("--disable_iomp",)),
            },
            {
                "disable_token_authorization": "false",
                "enable_model_api": "true",
                "ts_open_inference_protocol": "true",
                "number_of_netty_threads": "3",
                "cpu_launcher_enable": "true",
                "cpu_launcher_args": "--core_list 2,3,5,7 --ncores_per_instance 2 --disable_iomp",
            },
            id="all options on",
        ),
    ],
)
def test_properties(changes: dict[str, Any], expected: dict[str, str | None], tmp_path: Path) -> None:
    read = as_torchserve_reads(config(**changes).render_properties(PORTS), tmp_path)
    assert {key: read.get(key) for key in expected} == expected


def test_properties_hold_no_path_and_nothing_to_escape() -> None:
    text = config(netty_threads=3).render_properties(PORTS)
    assert text.isascii() and "\\" not in text and "$$" not in text
    assert "/" not in text.replace("http://", "").replace("file://.*", "")


def test_model_config_as_yaml() -> None:
    assert yaml.safe_load(config().render_model_config()) == ASKED | {"handler": {"serving": "{}"}}


def test_torchserve_knows_every_key(jar: zipfile.ZipFile, tmp_path: Path) -> None:
    """An unknown key is ignored in silence; those it knows are string constants of the classes that read them."""
    manager = jar.read(f"{SERVE}/util/ConfigManager.class")
    everything = config(netty_threads=1, cpu_launcher=CpuLauncher((0,), 1))
    keys = as_torchserve_reads(everything.render_properties(PORTS), tmp_path).keys()
    # vmargs is read by TorchServe's command, which starts Java with them; here the launcher does that.
    assert [key for key in keys - {"vmargs"} if key.encode() not in manager] == []
    model = jar.read(f"{SERVE}/archive/model/ModelConfig.class")
    assert [key for key in yaml.safe_load(config().render_model_config()) if key.encode() not in model] == ["handler"]


def test_log_configuration_names_loggers_that_exist(jar: zipfile.ZipFile) -> None:
    root = ElementTree.fromstring(config().render_log4j2())
    loggers = {logger.get("name", "") for logger in root.iter("Logger")}
    classes = {name for name in loggers if name.startswith("org.pytorch.")}
    assert len(classes) == 5
    assert {f"{name.replace('.', '/')}.class" for name in classes} <= set(jar.namelist())
    own = ElementTree.fromstring(jar.read("log4j2.xml"))
    assert loggers - classes <= {logger.get("name") for logger in own.iter("Logger")}


def test_manifest_is_what_the_archiver_writes() -> None:
    """The fields that torch-model-archiver 0.12.0 wrote for a model with a configuration file."""
    manifest = config().render_manifest(handler="package.handler", archiver="servebench 1", created_on="2026-01-02T03:04:05")
    assert manifest == {
        "createdOn": "2026-01-02T03:04:05",
        "runtime": "python",
        "model": {
            "modelName": "digits",
            "handler": "package.handler",
            "modelVersion": "1.0",
            "configFile": "model-config.yaml",
        },
        "archiverVersion": "servebench 1",
    }


@pytest.mark.parametrize(
    ("asked", "reported", "expected"),
    [
        pytest.param({}, {}, [], id="as asked"),
        pytest.param({}, {"batchSize": 1}, ["batchSize is 1, asked for 4"], id="another batch size"),
        pytest.param(
            {"max_batch_delay_ms": 0},
            {"maxBatchDelay": 100},
            ["maxBatchDelay is 100, asked for 0"],
            id="what TorchServe makes of no delay",
        ),
        pytest.param({"workers": 3}, {}, ["minWorkers is 2, asked for 3", "maxWorkers is 2, asked for 3"], id="fewer workers"),
        pytest.param({}, {"responseTimeout": 120}, ["responseTimeout is 120, asked for 30"], id="another timeout"),
        pytest.param({}, {"deviceType": "gpu"}, ["deviceType is gpu, asked for cpu"], id="another device"),
        pytest.param(
            {},
            {"jobQueueStatus": {"remainingCapacity": 100, "pendingRequests": 0}},
            ["job queue size is 100, asked for 50"],
            id="another queue",
        ),
        pytest.param({}, {"jobQueueStatus": {}}, ["job queue size is None, asked for 50"], id="a queue it does not tell"),
    ],
)
def test_differences_are_named(asked: dict[str, Any], reported: dict[str, Any], expected: list[str]) -> None:
    assert config(**asked).differences(REPORTED | reported) == expected
