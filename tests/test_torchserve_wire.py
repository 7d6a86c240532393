"""TorchServe's request and reply bodies, as pure bytes; its own server is the oracle in test_torchserve_server.py."""

import json
import struct
from email.message import Message
from email.parser import BytesParser
from email.policy import HTTP
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from servebench.engine.dialect import declared_model, launched_model
from servebench.errors import LaunchError, ProfileError
from servebench.load.undeclared import files_library, input_specs, specs_of_file
from servebench.profile import Samples, parse_profile
from servebench.protos import TORCHSERVE
from servebench.wire.tensors import ModelMetadata, TensorSpec
from servebench.wire.torchserve import TorchServeHttp
from servebench.wire.torchserve_grpc import TorchServeGrpc

IMAGE = TensorSpec("IMAGE", "FP32", (2, 2))
LOGITS = TensorSpec("LOGITS", "FP32", (3,))
ARRAY = np.array([[1, 2], [3, 4.5]], dtype=np.float32)
RAW = ARRAY.astype("<f4").tobytes()


def http(body: str, inputs: tuple[TensorSpec, ...] = (IMAGE,), outputs: tuple[TensorSpec, ...] = (LOGITS,)) -> TorchServeHttp:
    return TorchServeHttp("my model", None, inputs, outputs, body)  # type: ignore[arg-type]


def test_raw_posts_the_tensors_bytes() -> None:
    query = http("raw").encode({"IMAGE": ARRAY})
    assert query.body == RAW
    assert http("raw").target == "/predictions/my%20model"
    assert TorchServeHttp("m", "2.0", (IMAGE,), (), "raw").target == "/predictions/m/2.0"


def test_multipart_is_a_form_that_the_standard_library_reads() -> None:
    query = http("multipart").encode({"IMAGE": ARRAY})
    ((name, value),) = query.headers
    parsed: Message = BytesParser(policy=HTTP).parsebytes(f"{name}: {value}\r\n\r\n".encode() + query.body)
    (part,) = parsed.get_payload()  # type: ignore[misc]
    assert part.get_param("name", header="content-disposition") == "data"
    assert part.get_payload(decode=True) == RAW


def test_instances_is_the_v1_protocols_json() -> None:
    query = http("instances").encode({"IMAGE": ARRAY})
    assert json.loads(query.body) == {"instances": [[[1.0, 2.0], [3.0, 4.5]]]}
    assert query.headers == [("Content-Type", "application/json")]
    assert http("instances").target == "/v1/models/my%20model:predict"


def test_grpc_sends_the_bytes_as_input_data() -> None:
    protocol = TorchServeGrpc("m", "1.0", (IMAGE,), (LOGITS,))
    request = TORCHSERVE.PredictionsRequest.FromString(protocol.encode({"IMAGE": ARRAY}).body)
    assert (request.model_name, request.model_version, dict(request.input)) == ("m", "1.0", {"data": RAW})
    reply = TORCHSERVE.PredictionResponse(prediction=np.arange(3, dtype="<f4").tobytes()).SerializeToString()
    assert protocol.decode(0, {}, reply)["LOGITS"].array.tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="not a PredictionResponse"):
        protocol.decode(0, {}, b"\xff\xff")


@pytest.mark.parametrize(
    ("body", "reply", "message"),
    [
        pytest.param("raw", b"", "the reply is empty", id="empty"),
        pytest.param("raw", b"\0" * 8, "8 bytes of data, but shape .3. of FP32 needs 12", id="wrong size"),
        pytest.param("instances", b"no", "not JSON", id="not JSON"),
        pytest.param("instances", b'{"predictions": []}', 'no list "predictions" of one element', id="no prediction"),
        pytest.param("instances", b'{"predictions": [[1, 2]]}', "2 values, but shape .3. needs 3|expected", id="wrong length"),
    ],
)
def test_wrong_replies_are_named(body: str, reply: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        http(body).decode(200, {}, reply)


def test_replies_with_golden_outputs_are_tensors_and_others_only_something() -> None:
    found = http("instances").decode(200, {}, b'{"predictions": [[1, 2, 3.5]]}')
    assert found["LOGITS"].array.tolist() == [1, 2, 3.5]
    assert http("raw").decode(200, {}, np.arange(3, dtype="<f4").tobytes())["LOGITS"].array.tolist() == [0, 1, 2]
    assert http("raw", outputs=()).decode(200, {}, b"anything") == {}


# ---- several inputs ------------------------------------------------------------------------

CLICK = (TensorSpec("DENSE", "FP32", (2,)), TensorSpec("SPARSE", "INT64", (3,)))
CLICKS = {"SPARSE": np.array([7, 8, -1]), "DENSE": np.array([0.5, 1.5], dtype=np.float32)}
#: By hand: what a handler finds in its dict.
FIELDS = {"DENSE": struct.pack("<2f", 0.5, 1.5), "SPARSE": struct.pack("<3q", 7, 8, -1)}


def test_a_form_has_a_file_for_each_input() -> None:
    query = http("multipart", CLICK).encode(CLICKS)
    ((name, value),) = query.headers
    parsed: Message = BytesParser(policy=HTTP).parsebytes(f"{name}: {value}\r\n\r\n".encode() + query.body)
    parts: list[Message] = parsed.get_payload()  # type: ignore[assignment]
    assert {part.get_param("name", header="content-disposition"): part.get_payload(decode=True) for part in parts} == FIELDS
    assert [part.get_content_type() for part in parts] == ["application/octet-stream"] * 2
    assert all(part.get_filename() for part in parts)


def test_grpc_sends_the_bytes_of_each_input_by_its_name() -> None:
    message = TorchServeGrpc("m", None, CLICK, ()).encode(CLICKS).body
    assert dict(TORCHSERVE.PredictionsRequest.FromString(message).input) == FIELDS


def test_an_instance_is_an_object_of_the_inputs() -> None:
    query = http("instances", CLICK).encode(CLICKS)
    assert json.loads(query.body) == {"instances": [{"DENSE": [0.5, 1.5], "SPARSE": [7, 8, -1]}]}


@pytest.mark.parametrize(
    ("body", "inputs", "arrays", "message"),
    [
        pytest.param(
            "raw", CLICK, CLICKS, "body raw carries one input, the model has DENSE, SPARSE; set endpoint.body", id="raw"
        ),
        pytest.param(
            "multipart", CLICK, {"DENSE": CLICKS["DENSE"]}, "given for .'DENSE'., .* are .'DENSE', 'SPARSE'", id="missing"
        ),
        pytest.param(
            "multipart", CLICK, CLICKS | {"SPARSE": CLICKS["DENSE"]}, "input 'SPARSE': is float32, but INT64", id="dtype"
        ),
        pytest.param(
            "instances", CLICK, CLICKS | {"DENSE": np.array([np.nan, 0], np.float32)}, "input 'DENSE': holds NaN", id="no JSON"
        ),
        pytest.param(
            "raw", (TensorSpec("TEXT", "BYTES", (2,)),), {"TEXT": np.array(["a", "b"])}, "input 'TEXT': 2 strings", id="strings"
        ),
    ],
)
def test_what_a_request_cannot_carry_is_named(
    body: str, inputs: tuple[TensorSpec, ...], arrays: dict[str, NDArray[Any]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        http(body, inputs).encode(arrays)


@pytest.mark.parametrize("name", ['a"b', "a\r\nb", "a\\b", "\N{GREEK SMALL LETTER ALPHA}"])
def test_a_name_that_would_break_the_form_is_refused(name: str) -> None:
    inputs = (TensorSpec(name, "FP32", (2,)), CLICK[1])
    arrays = {name: CLICKS["DENSE"], "SPARSE": CLICKS["SPARSE"]}
    with pytest.raises(ValueError, match="no name for the field of a form"):
        http("multipart", inputs).encode(arrays)
    message = TorchServeGrpc("m", None, inputs, ()).encode(arrays).body
    assert TORCHSERVE.PredictionsRequest.FromString(message).input[name] == FIELDS["DENSE"]


# ---- who declares the tensors --------------------------------------------------------------

#: As TorchServe's control plane describes any model: not at all.
UNDESCRIBED = ModelMetadata("m", (), "torchserve", (), (), max_batch_size=0)


def profile(**sections: Any) -> Any:
    data: dict[str, Any] = {
        "name": "x",
        "server": {"url": "http://127.0.0.1:8080"},
        "endpoint": {"protocol": "torchserve-http", "model": "m"},
        "load": {"target_qps": 1},
        "constraints": ["p99 <= 1s"],
    }
    return parse_profile(data | sections, source="test")


def tensor(name: str, datatype: str, *shape: int) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": list(shape)}


def test_a_launcher_declares_what_the_server_does_not_describe() -> None:
    described = {
        "inputs": [tensor("DENSE", "FP32", -1, 13), tensor("IDS", "INT64", -1, -1)],
        "outputs": [tensor("LOGITS", "FP32", -1, -1, 2)],
    }
    model = launched_model(UNDESCRIBED, described)
    assert model.inputs == (TensorSpec("DENSE", "FP32", (13,)), TensorSpec("IDS", "INT64", (-1,)))
    assert model.outputs == (TensorSpec("LOGITS", "FP32", (-1, 2)),)
    assert not model.batched
    assert declared_model(profile(), model) == model
    itself = ModelMetadata("m", (), "onnx", CLICK, (), max_batch_size=8)
    assert launched_model(itself, described) == itself
    assert launched_model(UNDESCRIBED, {"name": "another"}) == UNDESCRIBED


def test_outputs_whose_bytes_say_no_shape_are_not_expected() -> None:
    described = {
        "inputs": [tensor("TILE", "FP32", -1, 1, -1, -1)],
        "outputs": [tensor("MASK", "FP32", -1, 2, -1, -1), tensor("LABEL", "BYTES", -1, 1)],
    }
    assert launched_model(UNDESCRIBED, described).outputs == ()


def test_files_that_are_bodies_are_no_tensors_whoever_declares_some(tmp_path: Path) -> None:
    declared = ModelMetadata("m", (), "torchserve", CLICK, (LOGITS,), max_batch_size=0)
    model = declared_model(profile(samples={"source": "files", "path": str(tmp_path)}), declared)
    assert (model.inputs, model.outputs) == ((TensorSpec("data", "BYTES", ()),), ())


@pytest.mark.parametrize(
    "declared",
    [
        pytest.param(5, id="no list"),
        pytest.param(["DENSE"], id="a name"),
        pytest.param([tensor("DENSE", "float32", -1, 13)], id="another's datatype"),
        pytest.param([tensor("DENSE", "FP32", -1, -2)], id="a negative size"),
        pytest.param([{"name": "DENSE", "datatype": "FP32"}], id="no shape"),
    ],
)
def test_a_launchers_nonsense_is_its_error(declared: Any) -> None:
    with pytest.raises(
        LaunchError, match=r"describes the model's inputs with .*; a tensor has name, KServe datatype and shape"
    ):
        launched_model(UNDESCRIBED, {"inputs": declared})


@pytest.mark.parametrize("source", ["random", "zero", "perf-analyzer"])
def test_without_a_declaration_there_are_no_tensors(source: str, tmp_path: Path) -> None:
    samples = {"source": source} | ({"path": str(tmp_path)} if source == "perf-analyzer" else {})
    with pytest.raises(ProfileError, match=f"^samples.source: '{source}' says no datatypes, .*; use npz, npy or files$"):
        declared_model(profile(samples=samples), UNDESCRIBED)


@pytest.mark.parametrize(
    ("body", "reply", "declared", "shape"),
    [
        pytest.param("raw", np.arange(6, dtype="<f4").tobytes(), (-1, 2), (3, 2), id="bytes"),
        pytest.param("raw", np.arange(6, dtype="<f4").tobytes(), (2, -1), (2, 3), id="bytes, the last axis"),
        pytest.param("instances", b'{"predictions": [[[0, 1], [2, 3], [4, 5]]]}', (-1, 2), (3, 2), id="nested numbers"),
        pytest.param("instances", b'{"predictions": [[[0, 1, 2], [3, 4, 5]]]}', (2, -1), (2, 3), id="nested, the last axis"),
        pytest.param("raw", np.arange(5, dtype="<f4").tobytes(), (-1, 2), None, id="not full rows"),
        pytest.param("instances", b'{"predictions": [[[0, 1], [2]]]}', (-1, 2), None, id="ragged"),
        pytest.param("instances", b'{"predictions": [[0, 1, 2]]}', (-1, 2), None, id="flat numbers"),
        pytest.param("instances", b'{"predictions": [5]}', (-1, 2), None, id="a number"),
    ],
)
def test_a_reply_says_its_open_size(body: str, reply: bytes, declared: tuple[int, ...], shape: tuple[int, ...] | None) -> None:
    protocol = http(body, outputs=(TensorSpec("LOGITS", "FP32", declared),))
    if shape is None:
        with pytest.raises(ValueError, match=r"shape|nested|list"):
            protocol.decode(200, {}, reply)
    else:
        array = protocol.decode(200, {}, reply)["LOGITS"].array
        assert (array.shape, array.ravel().tolist()) == (shape, [0, 1, 2, 3, 4, 5])


# ---- files ---------------------------------------------------------------------------------


def test_files_are_bodies_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name, content in (("b.jpg", b"two"), ("a.jpg", b"one\0"), (".hidden", b"no")):
        (tmp_path / name).write_bytes(content)
    samples = Samples(source="files", path=tmp_path)
    library = files_library(samples)
    protocol = http("raw", input_specs(samples))
    assert [protocol.encode(library.arrays(index)).body for index in range(len(library))] == [b"one\0", b"two"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ProfileError, match="holds no files"):
        files_library(Samples(source="files", path=tmp_path / "empty"))
    with pytest.raises(ProfileError, match="not a directory"):
        files_library(Samples(source="files", path=tmp_path / "a.jpg"))


def test_files_declare_the_tensors_of_an_undescribed_model(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, A=np.zeros((5, 1, 8), np.float32), B=np.zeros((5, 2), np.int64), C=np.array(["a", "b"]))
    assert specs_of_file(path) == (
        TensorSpec("A", "FP32", (1, 8)),
        TensorSpec("B", "INT64", (2,)),
        TensorSpec("C", "BYTES", ()),
    )
    assert input_specs(Samples(source="npz", path=path)) == specs_of_file(path)
    np.savez(path, A=np.zeros(3, np.complex64))
    with pytest.raises(ProfileError, match="dtype complex64 has no KServe datatype"):
        specs_of_file(path)
    for content in (b"no zip", path.read_bytes()[:100]):
        path.write_bytes(content)
        with pytest.raises(ProfileError, match="not a readable npz file"):
            specs_of_file(path)


def test_a_folder_of_arrays_declares_its_tensors(tmp_path: Path) -> None:
    samples = Samples(source="npy", path=tmp_path)
    with pytest.raises(ProfileError, match="no directory with npy files"):
        input_specs(samples)
    np.save(tmp_path / "B.npy", np.zeros((5, 2), np.int64))
    np.save(tmp_path / "A.npy", np.zeros((5, 1, 8), np.float32))
    assert input_specs(samples) == (TensorSpec("A", "FP32", (1, 8)), TensorSpec("B", "INT64", (2,)))
    (tmp_path / "C.npy").write_bytes(b"nothing")
    with pytest.raises(ProfileError, match=r"C\.npy: not a readable npy file"):
        input_specs(samples)
