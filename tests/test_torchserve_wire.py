"""TorchServe's request and reply bodies, as pure bytes; its own server is the oracle in test_torchserve_launcher.py."""

import json
from email.message import Message
from email.parser import BytesParser
from email.policy import HTTP
from pathlib import Path

import numpy as np
import pytest

from servebench.errors import ProfileError
from servebench.load.undeclared import files_library, input_specs, specs_of_file
from servebench.profile import Samples
from servebench.protos import TORCHSERVE
from servebench.wire.tensors import TensorSpec
from servebench.wire.torchserve import TorchServeGrpc, TorchServeHttp

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


def test_two_inputs_are_one_too_many() -> None:
    with pytest.raises(ValueError, match="TorchServe takes one input a query"):
        http("raw", (IMAGE, LOGITS)).encode({"IMAGE": ARRAY, "LOGITS": ARRAY})


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
    with pytest.raises(ProfileError, match="'random' needs a server that describes its model's inputs"):
        input_specs(Samples(source="random"))
    np.savez(path, A=np.zeros(3, np.complex64))
    with pytest.raises(ProfileError, match="dtype complex64 has no KServe datatype"):
        specs_of_file(path)
    path.write_bytes(b"no zip")
    with pytest.raises(ProfileError, match="not a readable npz file"):
        specs_of_file(path)
