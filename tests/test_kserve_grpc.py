"""KServe v2 over gRPC: our messages read by Triton's own client library, and its server's replies by us."""

import contextlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from servebench.protos import KSERVE
from servebench.wire.kserve_grpc import KServeGrpc, metadata_of
from servebench.wire.tensors import DATATYPES, TensorSpec

grpc_client = pytest.importorskip("tritonclient.grpc", reason="tritonclient[grpc] is not installed")
service_pb2 = pytest.importorskip("tritonclient.grpc.service_pb2")

NUMERIC = [name for name in DATATYPES if name not in ("BYTES", "BF16")]


def protocol(*inputs: TensorSpec, **parameters: str | int | float | bool) -> KServeGrpc:
    return KServeGrpc("m", None, inputs, parameters)


def example(datatype: str) -> np.ndarray:
    if datatype == "BYTES":
        return np.array([[b"", b"a\0b", "ü".encode()]], dtype=object)
    return np.array([[0, 1, 1]]).astype(DATATYPES[datatype])


@pytest.mark.parametrize("datatype", [*NUMERIC, "BYTES"])
def test_queries_are_what_tritons_client_would_send(datatype: str) -> None:
    array = example(datatype)
    ours = service_pb2.ModelInferRequest.FromString(
        protocol(TensorSpec("X", datatype, (-1, 3)), priority=2, tag="t", ratio=0.5, flag=False).encode({"X": array}).body
    )
    theirs = grpc_client.InferInput("X", list(array.shape), datatype)
    theirs.set_data_from_numpy(array)
    assert ours.model_name == "m"
    assert ours.inputs[0] == theirs._get_tensor()
    assert ours.raw_input_contents[0] == theirs._get_content()
    assert ours.parameters["priority"].int64_param == 2
    assert ours.parameters["tag"].string_param == "t"
    assert ours.parameters["ratio"].double_param == 0.5
    assert ours.parameters["flag"].WhichOneof("parameter_choice") == "bool_param"


@pytest.mark.parametrize("datatype", [*NUMERIC, "BYTES"])
def test_replies_are_read_as_tritons_client_reads_them(datatype: str) -> None:
    array = example(datatype)
    content = grpc_client.InferInput("Y", list(array.shape), datatype)
    content.set_data_from_numpy(array)
    reply = service_pb2.ModelInferResponse(model_name="m", raw_output_contents=[content._get_content()])
    reply.outputs.add(name="Y", datatype=datatype, shape=array.shape)
    theirs = grpc_client.InferResult(reply).as_numpy("Y")
    ours = protocol().decode(0, {}, reply.SerializeToString())["Y"]
    assert ours.datatype == datatype
    assert ours.array.shape == theirs.shape
    assert ours.array.tolist() == theirs.tolist()


@pytest.mark.parametrize(
    ("datatype", "field", "values"),
    [
        ("BOOL", "bool_contents", [True, False]),
        ("INT8", "int_contents", [-1, 2]),
        ("INT64", "int64_contents", [-(2**40), 2]),
        ("UINT16", "uint_contents", [1, 65_535]),
        ("UINT64", "uint64_contents", [1, 2**63]),
        ("FP32", "fp32_contents", [1.5, -2.0]),
        ("FP64", "fp64_contents", [1e300, -2.0]),
        ("BYTES", "bytes_contents", [b"a", b""]),
    ],
)
def test_typed_contents_are_read_too(datatype: str, field: str, values: list[object]) -> None:
    reply = service_pb2.ModelInferResponse()
    output = reply.outputs.add(name="Y", datatype=datatype, shape=[2])
    getattr(output.contents, field).extend(values)
    assert protocol().decode(0, {}, reply.SerializeToString())["Y"].array.tolist() == values


def reply_with(
    shape: list[int], datatype: str = "FP32", raw: list[bytes] | None = None, names: tuple[str, ...] = ("Y",)
) -> bytes:
    reply = service_pb2.ModelInferResponse(raw_output_contents=[b"\0" * 16] if raw is None else raw)
    for name in names:
        reply.outputs.add(name=name, datatype=datatype, shape=shape)
    body: bytes = reply.SerializeToString()
    return body


@pytest.mark.parametrize(
    ("body", "message"),
    [
        pytest.param(reply_with([1, 4], raw=[b""]), "0 bytes of data, but shape .1, 4. of FP32 needs 16", id="empty tensor"),
        pytest.param(reply_with([1, 5]), "16 bytes of data, but shape .1, 5. of FP32 needs 20", id="wrong size"),
        pytest.param(reply_with([1, 4], names=("Y", "Z")), "2 outputs, but 1 raw contents", id="contents missing"),
        pytest.param(reply_with([1, 4], raw=[b"\0" * 16] * 2, names=("Y", "Y")), "'Y': is there twice", id="twice"),
        pytest.param(reply_with([1, 4], datatype="FP128"), "unknown datatype 'FP128'", id="unknown datatype"),
        pytest.param(reply_with([-1, 4]), "impossible shape", id="negative size"),
        pytest.param(reply_with([2], raw=[]), "0 values, but shape .2. needs 2", id="no contents at all"),
        pytest.param(reply_with([2], datatype="FP16", raw=[]), "no raw contents, and FP16 has no others", id="FP16 needs raw"),
        pytest.param(b"\xff\xff\xff", "not a ModelInferResponse", id="rubbish"),
    ],
)
def test_wrong_replies_are_named(body: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        protocol().decode(0, {}, body)


@given(st.binary(max_size=80), st.integers(0, 60), st.binary(max_size=6))
def test_rubbish_is_decoded_or_refused_and_nothing_else(rubbish: bytes, cut: int, graft: bytes) -> None:
    valid = reply_with([1, 4])
    for body in (rubbish, valid[:cut] + graft + valid[cut:], valid[:cut]):
        with contextlib.suppress(ValueError):
            protocol().decode(0, {}, body)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        pytest.param({}, "arrays are given for", id="missing"),
        pytest.param({"X": np.zeros(3)}, "input 'X': ", id="wrong dtype"),
    ],
)
def test_arrays_that_do_not_fit_are_named(arrays: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        protocol(TensorSpec("X", "FP32", (3,))).encode(arrays)


def test_metadata_and_batch_size() -> None:
    described = KSERVE.ModelMetadataResponse(name="m", versions=["1"], platform="python")
    described.inputs.add(name="X", datatype="FP32", shape=[-1, 8])
    config = KSERVE.ModelConfigResponse()
    config.config.max_batch_size = 16
    model = metadata_of(described, config)
    assert (model.name, model.versions, model.max_batch_size, model.batched) == ("m", ("1",), 16, True)
    assert model.inputs == (TensorSpec("X", "FP32", (-1, 8)),)
    assert metadata_of(described, None).max_batch_size is None
