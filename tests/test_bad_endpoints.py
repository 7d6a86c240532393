"""Input that would go wrong only once queries are under way, or silently: it must be refused before anything starts."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import trustme

from servebench.engine.dialect import require_packages
from servebench.engine.preparation import check_ca_file, query_headers
from servebench.errors import ProfileError
from servebench.profile import Profile, load_profile, parse_profile


def profile(**sections: Any) -> Profile:
    data = {
        "name": "x",
        "server": {"url": "http://127.0.0.1:1"},
        "endpoint": {"model": "m"},
        "load": {"target_qps": 1},
        "constraints": ["p99 <= 1s"],
    }
    return parse_profile(data | sections, source="test")


GRPC = {"server": {"url": "grpc://127.0.0.1:1"}}


def endpoint(protocol: str = "kserve-http", **settings: Any) -> Profile:
    server = GRPC if protocol.endswith("grpc") else {}
    return profile(endpoint={"model": "m", "protocol": protocol, **settings}, **server)


# --- headers and tokens ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("protocol", "headers", "words"),
    [
        pytest.param("kserve-http", {"a b": "1"}, "'a b' is not a header name", id="name"),
        pytest.param("kserve-http", {"X": "1\r\nY: 2"}, "header X: the value holds a line break", id="line break"),
        pytest.param("kserve-http", {"X": "\u4e2d"}, "header X: the value holds", id="outside Latin-1"),
        *(
            pytest.param("kserve-http", {name: "5"}, f"header {name} is set by the client itself", id=name)
            for name in ("Content-Length", "transfer-encoding", "HOST")
        ),
        pytest.param("kserve-grpc", {"a b": "1"}, "'a b' is not a name of gRPC metadata", id="metadata name"),
        pytest.param("kserve-grpc", {"x": "1\n2"}, "metadata x: the value holds", id="metadata line break"),
        pytest.param("kserve-grpc", {"content-type": "5"}, "content-type is not metadata", id="gRPC's own"),
    ],
)
def test_headers_that_cannot_be_sent(protocol: str, headers: dict[str, str], words: str) -> None:
    with pytest.raises(ProfileError, match=f"^endpoint.headers: {re.escape(words)}"):
        query_headers(endpoint(protocol, headers=headers))


@pytest.mark.parametrize("protocol", ["kserve-http", "kserve-grpc"])
def test_a_token_that_cannot_be_sent_is_not_shown(monkeypatch: pytest.MonkeyPatch, protocol: str) -> None:
    asked = endpoint(protocol, bearer_token_env="TOKEN")
    monkeypatch.setenv("TOKEN", "s3cret")
    assert query_headers(asked) == [("Authorization", "Bearer s3cret")]
    monkeypatch.setenv("TOKEN", "s3cret\n")
    with pytest.raises(ProfileError, match=r"^endpoint.headers or the token: ") as refused:
        query_headers(asked)
    assert "s3cret" not in str(refused.value)


def test_a_file_without_certificates(tmp_path: Path) -> None:
    path = tmp_path / "ca.pem"
    path.write_text("name: no certificate\n")
    for bad in (path, tmp_path):
        with pytest.raises(ProfileError, match=f"^endpoint.ca_file: {re.escape(str(bad))}: no PEM file of certificates: "):
            check_ca_file(endpoint(ca_file=str(bad)).endpoint)
    trustme.CA().cert_pem.write_to_path(path)
    check_ca_file(endpoint(ca_file=str(path)).endpoint)


# --- settings that would do nothing, or break a promise ---------------------------------------


@pytest.mark.parametrize(
    ("protocol", "name"),
    [("kserve-grpc", "max_connections"), ("torchserve-grpc", "warm_connections"), ("kserve-http", "channels")],
)
def test_client_settings_of_the_other_framing(protocol: str, name: str) -> None:
    sections: dict[str, Any] = {"endpoint": {"model": "m", "protocol": protocol}, "client": {name: 2}}
    sections |= GRPC if protocol.endswith("grpc") else {}
    with pytest.raises(ProfileError, match=f"^test: client.{name}: means nothing over "):
        profile(**sections)


@pytest.mark.parametrize("name", ["timeout_s", "drain_timeout_s"])
@pytest.mark.parametrize(
    "constraint", ["p50 <= 3s", "service.p99 < 3s", "within(3s) >= 99%", "goodput(3s) >= 1/s", "max <= 3s"]
)
def test_replies_are_awaited_for_as_long_as_they_may_take(name: str, constraint: str) -> None:
    with pytest.raises(ProfileError, match=f"^test: load.{name}: 2.9 is less than the bound of .*; give replies 3 s or more$"):
        profile(load={"target_qps": 1, name: 2.9}, constraints=["p10 <= 1s", constraint])
    profile(load={"target_qps": 1, name: 3}, constraints=[constraint])
    profile(load={"target_qps": 1, name: 2.9}, constraints=["delay.p99 <= 3s", "errors < 1%"])


def test_a_key_that_stands_twice(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text("name: x\nserver: {launch: stub}\nendpoint: {model: m}\nload: {target_qps: 1}\nconstraints: [p50 <= 1us]\n")
    load_profile(str(path))
    path.write_text(path.read_text() + "constraints: [p99 <= 1s]\n")
    with pytest.raises(ProfileError, match=r"not YAML: the key 'constraints' stands twice in .*, line 6"):
        load_profile(str(path))
    path.write_text(path.read_text().removesuffix("constraints: [p99 <= 1s]\n"))
    with pytest.raises(ProfileError, match=r"--set .*the value is not YAML"):
        load_profile(str(path), ["load={target_qps: 1, target_qps: 2}"])


def test_yaml_that_merges_mappings_still_does(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(
        "name: x\nserver: {launch: stub}\nendpoint: {model: m}\nload: {<<: {target_qps: 1, warmup_s: 3}, warmup_s: 4}\n"
        "constraints: [p50 <= 1s]\n"
    )
    assert load_profile(str(path)).load.warmup_s == 4


# --- packages that are not installed ----------------------------------------------------------


@pytest.mark.parametrize(
    ("protocol", "module"),
    [("kserve-grpc", "grpc"), ("kserve-grpc", "hpack"), ("torchserve-grpc", "google.protobuf"), ("torchserve-grpc", "hpack")],
)
def test_grpc_without_its_packages(monkeypatch: pytest.MonkeyPatch, protocol: str, module: str) -> None:
    require_packages(endpoint(protocol).endpoint)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ProfileError, match=r"needs grpcio, hpack and protobuf; install them with: pip install"):
        require_packages(endpoint(protocol).endpoint)


@pytest.mark.parametrize("protocol", ["kserve-http", "torchserve-http"])
def test_http_needs_none_of_them(protocol: str) -> None:
    """In a process of its own, to which the packages of gRPC are not there."""
    code = (
        "import sys\n"
        "for name in ('grpc', 'hpack', 'h2', 'google.protobuf', 'google'): sys.modules[name] = None\n"
        "from servebench.engine.dialect import query_protocol, require_packages\n"
        "from servebench.profile import Endpoint\n"
        "from servebench.wire.tensors import ModelMetadata\n"
        f"endpoint = Endpoint(model='m', protocol={protocol!r})\n"
        "require_packages(endpoint)\n"
        "print(query_protocol(endpoint, ModelMetadata('m', (), '', (), ())).target)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == {"kserve-http": "/v2/models/m/infer\n", "torchserve-http": "/predictions/m\n"}[protocol], done.stderr
