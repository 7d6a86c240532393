"""The KServe codec against tritonclient (another implementation), recorded Triton replies, and rubbish."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import unquote

import ml_dtypes
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tritonclient.http import InferenceServerClient, InferInput, InferResult

from servebench.wire.kserve import (
    HEADER_LENGTH,
    decode_infer,
    decode_outputs,
    encode_infer,
    error_text,
    infer_path,
    model_path,
    parse_metadata,
)
from servebench.wire.tensors import DATATYPES, Array, TensorSpec, byte_strings

JSON_DATATYPES = sorted(set(DATATYPES) - {"FP16", "BF16"})


def numpy_arrays(datatype: str, *, for_json: bool = False) -> st.SearchStrategy[Array]:
    """Tensors of 0 to 3 axes, empty ones among them."""
    shapes = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)
    if datatype == "BYTES":
        text = st.text(max_size=12).filter(lambda value: "\ud800" not in value).map(str.encode)
        elements = text if for_json else st.one_of(st.binary(max_size=12), text, st.sampled_from([b"", b"\0", b"a\0\0"]))
        return hnp.arrays(object, shapes, elements=elements, fill=st.nothing())
    special = {} if not for_json else {"allow_nan": False, "allow_infinity": False}
    floats = DATATYPES[datatype].kind == "f"
    return hnp.arrays(DATATYPES[datatype], shapes, elements=special if floats else None)


def tensors(*, for_json: bool = False) -> st.SearchStrategy[tuple[str, Array]]:
    datatypes = st.sampled_from(JSON_DATATYPES if for_json else sorted(DATATYPES))
    return datatypes.flatmap(lambda datatype: st.tuples(st.just(datatype), numpy_arrays(datatype, for_json=for_json)))


def several(*, for_json: bool = False) -> st.SearchStrategy[list[tuple[str, Array]]]:
    return st.lists(tensors(for_json=for_json), min_size=1, max_size=4)


def named(items: list[tuple[str, Array]]) -> tuple[list[TensorSpec], dict[str, Array]]:
    specs = [TensorSpec(f"t{index}é", datatype, array.shape) for index, (datatype, array) in enumerate(items)]
    return specs, {spec.name: array for spec, (_, array) in zip(specs, items, strict=True)}


def split_body(body: bytes, headers: list[tuple[str, str]]) -> tuple[dict[str, Any], bytes]:
    length = int(dict(headers).get(HEADER_LENGTH, len(body)))
    return json.loads(body[:length]), body[length:]


def tritonclient_body(
    specs: list[TensorSpec], arrays: dict[str, Array], *, binary: bool, **request: Any
) -> tuple[dict[str, Any], bytes]:
    inputs = []
    for spec in specs:
        # tritonclient takes BF16 as ml_dtypes.bfloat16, we keep the raw bits
        array = arrays[spec.name].view(ml_dtypes.bfloat16) if spec.datatype == "BF16" else arrays[spec.name]
        tensor = InferInput(spec.name, list(array.shape), spec.datatype)
        inputs.append(tensor.set_data_from_numpy(array, binary_data=binary))
    body, length = InferenceServerClient.generate_request_body(inputs, **request)
    return json.loads(body[:length]), body[length:] if length else b""


def reply(items: list[tuple[str, Array]], *, tensor_format: str = "binary") -> tuple[dict[str, str], bytes]:
    """A server's reply with these outputs: a request's tensors travel in the same form as a reply's."""
    specs, arrays = named(items)
    body, headers = encode_infer(specs, arrays, tensor_format=tensor_format)  # type: ignore[arg-type]
    header, blobs = split_body(body, headers)
    text = json.dumps({"model_name": "m", "model_version": "1", "outputs": header["inputs"]}).encode()
    fields = {"content-type": dict(headers)["Content-Type"]}
    if tensor_format == "binary":
        fields[HEADER_LENGTH] = str(len(text))
    return fields, text + blobs


def same(found: Array, expected: Array) -> bool:
    if expected.dtype == object:
        return found.shape == expected.shape and byte_strings(found) == byte_strings(expected)
    return found.shape == expected.shape and found.dtype == expected.dtype and found.tobytes() == expected.tobytes()


# --- requests -----------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(several())
def test_binary_request_is_tritonclients(items: list[tuple[str, Array]]) -> None:
    specs, arrays = named(items)
    body, headers = encode_infer(specs, arrays, tensor_format="binary")
    ours, blobs = split_body(body, headers)
    theirs, their_blobs = tritonclient_body(specs, arrays, binary=True)
    assert ours == theirs
    assert blobs == their_blobs


@settings(max_examples=100, deadline=None)
@given(several(for_json=True))
def test_json_request_is_tritonclients(items: list[tuple[str, Array]]) -> None:
    specs, arrays = named(items)
    body, headers = encode_infer(specs, arrays, tensor_format="json")
    theirs, _ = tritonclient_body(specs, arrays, binary=False)
    del theirs["parameters"]  # it asks for binary outputs even when it sends JSON; we ask for what we send
    assert json.loads(body) == theirs
    assert headers == [("Content-Type", "application/json")]


def test_request_parameters_are_tritonclients() -> None:
    specs, arrays = named([("FP32", np.ones((1, 2), np.float32))])
    parameters = {"priority": 2, "timeout": 1500, "tenant": "blue", "share": 0.25, "flag": True}
    body, headers = encode_infer(specs, arrays, parameters=parameters)
    ours, _ = split_body(body, headers)
    custom = {name: parameters[name] for name in ("tenant", "share", "flag")}
    theirs, _ = tritonclient_body(specs, arrays, binary=True, priority=2, timeout=1500, parameters=custom)
    assert ours == theirs
    assert ours["parameters"] == {**parameters, "binary_data_output": True}


def test_big_endian_strided_and_fixed_width_arrays_are_sent_as_the_protocol_says() -> None:
    specs = [TensorSpec("x", "INT32", (2, 2)), TensorSpec("s", "BYTES", (2,)), TensorSpec("u", "BYTES", (1,))]
    arrays = {"x": np.array([[1, 2], [3, 4]], ">i4").T, "s": np.array([b"ab", b""]), "u": np.array(["é"])}
    body, headers = encode_infer(specs, arrays)
    _, blobs = split_body(body, headers)
    assert blobs == (
        b"\1\0\0\0\3\0\0\0\2\0\0\0\4\0\0\0"  # row-major after the transposition
        b"\2\0\0\0ab\0\0\0\0"
        b"\2\0\0\0\xc3\xa9"
    )


ONE = np.ones(1, np.float32)


@pytest.mark.parametrize(
    ("specs", "arrays", "options", "message"),
    [
        pytest.param([("x", "FP32")], {}, {}, "['x']", id="input missing"),
        pytest.param([("x", "FP32")], {"x": ONE, "y": ONE}, {}, "'y'", id="input unknown"),
        pytest.param([("x", "FP32")], {"x": np.ones(1)}, {}, "input 'x': is float64, but FP32 needs float32", id="dtype"),
        pytest.param([("x", "BYTES")], {"x": ONE}, {}, "needs strings", id="numbers for strings"),
        pytest.param([("x", "BYTES")], {"x": np.array([3], object)}, {}, "BYTES element is int", id="object that is no text"),
        pytest.param([("x", "FP32")], {"x": ONE}, {"parameters": {"binary_data_output": False}}, "set by", id="reserved"),
        pytest.param([("x", "FP32")], {"x": ONE}, {"parameters": {"p": float("nan")}}, "'p' is nan", id="parameter not JSON"),
        pytest.param([("x", "FP16")], {"x": np.ones(1, "f2")}, {"tensor_format": "json"}, "FP16 has no JSON", id="FP16 json"),
        pytest.param([("x", "BF16")], {"x": np.ones(1, "u2")}, {"tensor_format": "json"}, "BF16 has no JSON", id="BF16 json"),
        pytest.param([("x", "FP32")], {"x": ONE * np.nan}, {"tensor_format": "json"}, "NaN or infinity", id="NaN json"),
        pytest.param([("x", "FP64")], {"x": np.array([np.inf])}, {"tensor_format": "json"}, "infinity", id="infinity json"),
        pytest.param([("x", "BYTES")], {"x": np.array([b"\xff"])}, {"tensor_format": "json"}, "not UTF-8", id="bytes json"),
    ],
)
def test_what_cannot_be_sent(specs: list[tuple[str, str]], arrays: dict[str, Array], options: Any, message: str) -> None:
    with pytest.raises(ValueError) as error:
        encode_infer([TensorSpec(name, datatype, (-1,)) for name, datatype in specs], arrays, **options)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("model", "version", "path"),
    [
        pytest.param("echo", None, "/v2/models/echo/infer", id="plain"),
        pytest.param("echo", "3", "/v2/models/echo/versions/3/infer", id="version"),
        pytest.param("a b/é?#%", "1/2", "/v2/models/a%20b%2F%C3%A9%3F%23%25/versions/1%2F2/infer", id="reserved characters"),
    ],
)
def test_path(model: str, version: str | None, path: str) -> None:
    assert infer_path(model, version) == path
    assert unquote(path.split("/")[3]) == model


@pytest.mark.parametrize("model", ["", ".", ".."])
def test_path_refuses_what_proxies_resolve_away(model: str) -> None:
    with pytest.raises(ValueError, match="part of a path"):
        model_path(model)


# --- replies ------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(several())
def test_binary_reply_reads_as_with_tritonclient(items: list[tuple[str, Array]]) -> None:
    headers, body = reply(items)
    found = decode_infer(200, headers, body)
    theirs = InferResult.from_response_body(body, header_length=int(headers[HEADER_LENGTH]))
    specs, arrays = named(items)
    assert list(found) == [spec.name for spec in specs]
    for spec in specs:
        assert same(found[spec.name], arrays[spec.name])
        expected = theirs.as_numpy(spec.name)
        if spec.datatype == "BF16":
            expected = expected.view(np.uint16)
        assert same(found[spec.name], expected)


@settings(max_examples=100, deadline=None)
@given(several(for_json=True))
def test_json_reply_reads_as_with_tritonclient(items: list[tuple[str, Array]]) -> None:
    headers, body = reply(items, tensor_format="json")
    found = decode_infer(200, headers, body)
    theirs = InferResult.from_response_body(body)
    specs, arrays = named(items)
    for spec in specs:
        # -0.0 and subnormals come back bit for bit: JSON carries the shortest text that reads as the same double
        assert same(found[spec.name], arrays[spec.name])
        expected = theirs.as_numpy(spec.name)
        if spec.datatype == "BYTES":
            expected = np.array([str(item).encode() for item in expected.ravel()], object).reshape(expected.shape)
        assert same(found[spec.name], expected)


def test_replies_recorded_from_triton() -> None:
    """Triton 2.51 (nvidia-pytriton 0.7.0, Python backend): echoed inputs, as its HTTP frontend wrote them."""
    body = (
        b'{"model_name":"echo","model_version":"1","outputs":[{"name":"output_s","datatype":"BYTES","shape":[1,2],"parameters":'
        b'{"binary_data_size":11}},{"name":"output_b","datatype":"BOOL","shape":[1,3],"parameters":{"binary_data_size":3}},'
        b'{"name":"output_h","datatype":"FP16","shape":[1,2],"parameters":{"binary_data_size":4}},{"name":"output_i64",'
        b'"datatype":"INT64","shape":[1,2],"parameters":{"binary_data_size":16}}]}'
        b"\x03\x00\x00\x00a\x00b\x00\x00\x00\x00\x01\x00\x01\x00<\x00@\xff\xff\xff\xff\xff\xff\xff\xff\x02\x00\x00\x00\x00\x00\x00\x00"
    )
    headers = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": "411", "Content-Length": "445"}
    found = decode_infer(200, headers, body)
    assert {name: array.tolist() for name, array in found.items()} == {
        "output_s": [[b"a\0b", b""]],
        "output_b": [[True, False, True]],
        "output_h": [[1.0, 2.0]],
        "output_i64": [[-1, 2]],
    }
    # Triton writes NaN and infinities into JSON, and widens FP32 to a double's digits.
    json_body = (
        b'{"model_name":"echo","model_version":"1","outputs":[{"name":"output_fp32","datatype":"FP32","shape":[1,4],'
        b'"data":[NaN,Infinity,-Infinity,0.10000000149011612]}]}'
    )
    (array,) = decode_infer(200, {"Content-Type": "application/json"}, json_body).values()
    np.testing.assert_array_equal(array, np.array([[np.nan, np.inf, -np.inf, 0.1]], np.float32), strict=True)


def test_fixed_size_outputs_are_views_of_the_body() -> None:
    headers, body = reply([("FP32", np.ones((4, 4), np.float32))])
    (array,) = decode_infer(200, headers, body).values()
    assert np.shares_memory(array, np.frombuffer(body, np.uint8))


def test_datatype_is_the_servers_word() -> None:
    headers, body = reply([("BF16", np.array([0x3F80], np.uint16)), ("UINT16", np.array([7], np.uint16))])
    assert [output.datatype for output in decode_outputs(200, headers, body).values()] == ["BF16", "UINT16"]


def test_empty_tensors_need_no_length_header() -> None:
    # Triton leaves the header out when no output has any bytes (seen on 2.51).
    body = b'{"outputs":[{"name":"y","datatype":"FP32","shape":[0,4],"parameters":{"binary_data_size":0}}]}'
    assert decode_infer(200, {"Content-Type": "application/json"}, body)["y"].shape == (0, 4)


def output(**fields: Any) -> dict[str, Any]:
    tensor = {"name": "y", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]} | fields
    return {name: value for name, value in tensor.items() if value is not ...}


def binary(size: Any, **fields: Any) -> dict[str, Any]:
    return output(**{"data": ..., "parameters": {"binary_data_size": size}} | fields)


F16 = np.arange(4, dtype="<f4").tobytes()


@pytest.mark.parametrize(
    ("outputs", "blobs", "message"),
    [
        pytest.param([binary(0)], b"", "output 'y': 0 bytes of data, but shape [1, 4] of FP32 needs 16", id="empty"),
        pytest.param([binary(12)], F16[:12], "12 bytes of data, but shape [1, 4] of FP32 needs 16", id="short"),
        pytest.param([binary(16, shape=[1, 5])], F16, "shape [1, 5] of FP32 needs 20", id="shape against bytes"),
        pytest.param([binary(16)], F16[:9], "binary_data_size is 16, but only 9 bytes", id="truncated"),
        pytest.param(
            [binary(16), binary(16, name="z")], F16, "output 'z': binary_data_size is 16, but only 0", id="second gone"
        ),
        pytest.param([binary(16)], F16 + b"??", "2 bytes left over after the last output", id="left over"),
        pytest.param([binary(-1)], F16, "binary_data_size is -1", id="negative size"),
        pytest.param([binary(True)], F16, "binary_data_size is True", id="boolean size"),
        pytest.param([binary("16")], F16, "binary_data_size is '16'", id="size as text"),
        pytest.param([binary(16, data=[1])], F16, "both JSON and binary", id="both forms"),
        pytest.param([output(data=...)], b"", "output 'y': has no data", id="no data"),
        pytest.param([output(data=..., parameters={})], b"", "has no data", id="no data, with parameters"),
        pytest.param([output(data=..., parameters=3)], b"", "parameters is 3, expected an object", id="parameters"),
        pytest.param([binary(3, datatype="BOOL", shape=[3])], b"\0\1\2", "BOOL bytes other than 0 and 1", id="BOOL of 2"),
        pytest.param([binary(2, datatype="BYTES", shape=[1])], b"\1\0", "cannot hold 1 BYTES", id="no room for a length"),
        pytest.param([binary(5, datatype="BYTES", shape=[1])], b"\2\0\0\0a", "element 0 of 1 is cut short", id="string cut"),
        pytest.param(
            [binary(8, datatype="BYTES", shape=[2])], b"\4\0\0\0aaaa", "element 1 of 2 is cut", id="second string gone"
        ),
        pytest.param(
            [binary(6, datatype="BYTES", shape=[1])], b"\1\0\0\0ab", "1 bytes left over after 1 BYTES", id="long blob"
        ),
        pytest.param([output(data=[1, 2, 3])], b"", "3 values, but shape [1, 4] needs 4", id="too few values"),
        pytest.param([output(data=[[1, 2], [3, 4]])], b"", "not nested as its shape", id="nested otherwise"),
        pytest.param([output(data=[[1, 2, 3], [4]], shape=[2, 2])], b"", "not nested as its shape", id="uneven rows"),
        pytest.param([output(data=[[1, 2, 3, [4]]])], b"", "not nested as its shape", id="ragged"),
        pytest.param([output(data=[[1]], shape=[])], b"", "not nested as its shape", id="scalar nested"),
        pytest.param([output(data="abcd")], b"", "data is not a list", id="data as text"),
        pytest.param([output(data=[1, 2, 3, "4"])], b"", "type str, but FP32 needs int or float", id="text among numbers"),
        pytest.param([output(data=[1, 2, 3, True])], b"", "type bool, but FP32", id="boolean among numbers"),
        pytest.param([output(data=[1, 2, 3, None])], b"", "type NoneType", id="null among numbers"),
        pytest.param([output(data=[1, 2, 3, 1e39])], b"", "outside FP32's range", id="beyond FP32"),
        pytest.param([output(data=[1, 2, 3, 10**400])], b"", "outside FP32's range", id="beyond every float"),
        pytest.param([output(datatype="INT8", data=[1, 2, 3, 128])], b"", "INT8's range of -128 to 127", id="beyond INT8"),
        pytest.param([output(datatype="UINT64", data=[1, 2, 3, -1])], b"", "UINT64's range", id="below UINT64"),
        pytest.param([output(datatype="INT8", data=[1, 2, 3, 4.0])], b"", "type float, but INT8", id="float for integer"),
        pytest.param([output(datatype="BOOL", data=[1, 0, 1, 0])], b"", "type int, but BOOL", id="numbers for BOOL"),
        pytest.param([output(datatype="BYTES", data=["\ud800", "", "", ""])], b"", "surrogate", id="lone surrogate"),
        pytest.param([output(datatype="FP16")], b"", "FP16 has no JSON form", id="FP16 in JSON"),
        pytest.param(
            [output(datatype="STRING")], b"", "output 'y': datatype is 'STRING', known are BOOL", id="unknown datatype"
        ),
        pytest.param([output(datatype=["FP32"])], b"", "datatype is ['FP32']", id="datatype list"),
        pytest.param([output(shape=...)], b"", "shape is None", id="no shape"),
        pytest.param([output(shape=[1, -1])], b"", "expected a list of integers from 0", id="open size in a reply"),
        pytest.param([output(shape=[True, 4])], b"", "shape is [True, 4]", id="boolean size in shape"),
        pytest.param([output(shape=[4.0])], b"", "shape is [4.0]", id="float in shape"),
        pytest.param([output(shape=[1] * 33)], b"", "33 axes", id="too many axes"),
        pytest.param([output(shape=[0, 2**63], data=[])], b"", "shape is [0, 9223372036854775808]", id="axis too long"),
        pytest.param([output(shape=[0, 2**62, 2**62], data=[])], b"", "is not possible", id="impossible shape"),
        pytest.param([output(name=...)], b"", "name is None", id="no name"),
        pytest.param([output(), output()], b"", "output 'y' comes twice", id="twice"),
        pytest.param([7], b"", "an output is 7, expected an object", id="output that is no object"),
        pytest.param({"y": 1}, b"", "outputs are {'y': 1}, expected a list", id="outputs that are no list"),
        pytest.param(None, b"", "outputs are None", id="no outputs"),
    ],
)
def test_malformed_outputs(outputs: Any, blobs: bytes, message: str) -> None:
    header = json.dumps({"outputs": outputs}).encode()
    with pytest.raises(ValueError) as error:
        decode_infer(200, {HEADER_LENGTH.lower(): str(len(header))}, header + blobs)
    assert message in str(error.value)


GOOD = json.dumps({"outputs": [output()]}).encode()


@pytest.mark.parametrize(
    ("status", "headers", "body", "message"),
    [
        pytest.param(503, {}, b'{"error":"queue\\nfull"}', "HTTP status 503: queue full", id="error status"),
        pytest.param(500, {}, b"", "HTTP status 500: (empty body)", id="error without body"),
        pytest.param(204, {}, b"", "HTTP status 204", id="success without reply"),
        pytest.param(200, {}, b'{"error":"late failure"}', "HTTP status 200, but an error: late failure", id="error in a 200"),
        pytest.param(200, {}, b"", "the reply is not JSON", id="empty body"),
        pytest.param(200, {}, b"[" * 100_000, "nested too deeply", id="deep nesting"),
        pytest.param(200, {}, b'{"outputs":["caf\xc3"]}', "not UTF-8", id="not UTF-8"),
        pytest.param(200, {}, b"[]", "the reply is [], expected an object", id="array"),
        pytest.param(200, {}, GOOD + b"\1\2", "not JSON", id="blobs without the length header"),
        pytest.param(200, {HEADER_LENGTH: str(len(GOOD) + 1)}, GOOD, "but the body has only", id="length beyond the body"),
        pytest.param(200, {HEADER_LENGTH: "-5"}, GOOD, "is '-5', expected a number of bytes", id="negative length"),
        pytest.param(200, {HEADER_LENGTH: "1_0"}, GOOD, "expected a number of bytes", id="length that only Python reads"),
        pytest.param(200, {HEADER_LENGTH: "٣"}, GOOD, "expected a number of bytes", id="length in other digits"),
        pytest.param(200, {HEADER_LENGTH: "7"}, GOOD, "not JSON", id="length inside the JSON"),
        pytest.param(200, {"Content-Encoding": "gzip"}, GOOD, "Content-Encoding 'gzip'", id="compressed"),
        pytest.param(
            200,
            {},
            json.dumps({"outputs": [binary(16)]}).encode(),
            "output 'y': binary_data_size is 16, but the reply has no Inference-Header-Content-Length header",
            id="binary data without the length header",
        ),
    ],
)
def test_malformed_replies(status: int, headers: dict[str, str], body: bytes, message: str) -> None:
    with pytest.raises(ValueError) as error:
        decode_infer(status, headers, body)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def accept_or_value_error(headers: dict[str, str], body: bytes) -> None:
    try:
        found = decode_infer(200, headers, body)
    except ValueError as error:
        assert len(str(error)) < 2000
        assert "\n" not in str(error)
    else:
        assert all(isinstance(array, np.ndarray) for array in found.values())


@settings(max_examples=300, deadline=None)
@given(several(), st.data())
def test_mutated_bytes_are_read_or_refused(items: list[tuple[str, Array]], data: st.DataObject) -> None:
    headers, body = reply(items)
    start = data.draw(st.integers(0, len(body)))
    stop = data.draw(st.integers(start, min(len(body), start + 8)))
    headers[HEADER_LENGTH] = data.draw(st.sampled_from([headers[HEADER_LENGTH], str(len(body)), "0", "x"]))
    accept_or_value_error(headers, body[:start] + data.draw(st.binary(max_size=8)) + body[stop:])


@settings(max_examples=300, deadline=None)
@given(st.booleans().flatmap(lambda for_json: several(for_json=for_json)), st.data())
def test_mutated_fields_are_read_or_refused(items: list[tuple[str, Array]], data: st.DataObject) -> None:
    as_json = all(datatype in JSON_DATATYPES for datatype, _ in items) and data.draw(st.booleans())
    try:
        headers, body = reply(items, tensor_format="json" if as_json else "binary")
    except ValueError:
        assume(False)
    document, blobs = split_body(body, list(headers.items()))
    tensor = data.draw(st.sampled_from(document["outputs"]))
    key = data.draw(st.sampled_from(["name", "datatype", "shape", "data", "parameters", "binary_data_size"]))
    value = data.draw(JSON_VALUES | st.sampled_from(sorted(DATATYPES)) | st.lists(st.integers(0, 2**65), max_size=4))
    if key == "binary_data_size":
        tensor["parameters"] = {key: value}
    else:
        tensor[key] = value
    text = json.dumps(document).encode()
    accept_or_value_error({HEADER_LENGTH: str(len(text))}, text + blobs)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200), st.sampled_from([{}, {HEADER_LENGTH: "0"}, {HEADER_LENGTH: "10"}]))
def test_rubbish_is_refused(body: bytes, headers: dict[str, str]) -> None:
    accept_or_value_error(headers, body)


# --- error bodies -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "text"),
    [
        pytest.param(
            b'{"error":"sending FP16 data via JSON is not supported. Please use the binary data format for output"}',
            "sending FP16 data via JSON is not supported. Please use the binary data format for output",
            id="Triton 2.51",
        ),
        pytest.param(b'{"error":"bad row\\nsecond line"}', "bad row second line", id="two lines"),
        pytest.param(b"<html>\r\n<b>502</b>\tBad Gateway</html>", "<html> <b>502</b> Bad Gateway</html>", id="a proxy's page"),
        pytest.param(b'{"error":{"code":3}}', '{"error":{"code":3}}', id="error that is no text"),
        pytest.param(b'{"error":"\\u001b[31mred\\u0000"}', "[31mred", id="control characters"),
        pytest.param(b"\xff\xfe caf\xc3\xa9", "\ufffd\ufffd café", id="not UTF-8"),
        pytest.param(b" \n", "(empty body)", id="blank"),
        pytest.param(b"", "(empty body)", id="empty"),
        pytest.param(b"x" * 10_000, "x" * 299 + "…", id="long"),
        pytest.param(b'{"error":"' + b"y" * 10_000 + b'"}', "y" * 299 + "…", id="long message"),
        pytest.param(b"[" * 50_000, "[" * 299 + "…", id="deep nesting"),
    ],
)
def test_error_text(body: bytes, text: str) -> None:
    assert error_text(body) == text


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=400))
def test_error_text_is_one_bounded_line(body: bytes) -> None:
    text = error_text(body)
    assert 0 < len(text) <= 300
    assert text.isprintable()


# --- metadata -----------------------------------------------------------------------------

METADATA = (
    b'{"name":"echo","versions":["1"],"platform":"python","inputs":[{"name":"input_fp32","datatype":"FP32","shape":[-1,4]},'
    b'{"name":"input_s","datatype":"BYTES","shape":[-1,2]}],"outputs":[{"name":"output_fp32","datatype":"FP32","shape":[-1,4]}]}'
)


def test_metadata_recorded_from_triton() -> None:
    metadata = parse_metadata(METADATA, b'{"name":"echo","backend":"python","max_batch_size":8}')
    assert (metadata.name, metadata.versions, metadata.platform, metadata.max_batch_size) == ("echo", ("1",), "python", 8)
    assert metadata.inputs == (TensorSpec("input_fp32", "FP32", (-1, 4)), TensorSpec("input_s", "BYTES", (-1, 2)))
    assert metadata.outputs == (TensorSpec("output_fp32", "FP32", (-1, 4)),)


@pytest.mark.parametrize(
    ("shapes", "config", "batched"),
    [
        pytest.param([[-1, 4]], b'{"max_batch_size":8}', True, id="configured"),
        pytest.param([[-1, 4]], b'{"max_batch_size":0}', False, id="configured without: -1 is just an open size"),
        pytest.param([[-1, 4]], b"{}", False, id="left out of the configuration: protobuf's 0"),
        pytest.param([[-1, 4], [-1]], None, True, id="no configuration, every input leads with -1"),
        pytest.param([[-1, 4], [2]], None, False, id="no configuration, one input does not"),
        pytest.param([[4, -1]], None, False, id="no configuration, -1 elsewhere"),
        pytest.param([], None, False, id="no inputs"),
    ],
)
def test_batch_axis(shapes: list[list[int]], config: bytes | None, batched: bool) -> None:
    inputs = [{"name": f"x{index}", "datatype": "FP32", "shape": shape} for index, shape in enumerate(shapes)]
    assert parse_metadata(json.dumps({"name": "m", "inputs": inputs}).encode(), config).batched is batched


X = {"name": "x", "datatype": "FP32", "shape": [-1]}


@pytest.mark.parametrize(
    ("metadata", "config", "message"),
    [
        pytest.param(b"<html>", None, "model metadata is not JSON", id="not JSON"),
        pytest.param({"inputs": []}, None, "name is None, expected a string", id="no name"),
        pytest.param({"name": "m", "versions": 1}, None, "versions is 1", id="versions"),
        pytest.param({"name": "m", "inputs": X}, None, "inputs is {", id="inputs that are no list"),
        pytest.param({"name": "m", "inputs": [X, X]}, None, "two inputs have the same name", id="name twice"),
        pytest.param({"name": "m", "inputs": [{**X, "datatype": "FP8"}]}, None, "input 'x': datatype is 'FP8'", id="datatype"),
        pytest.param({"name": "m", "outputs": [{**X, "shape": [-2]}]}, None, "integers from -1", id="shape"),
        pytest.param({"name": "m"}, b"nothing here", "model config is not JSON", id="config not JSON"),
        pytest.param({"name": "m"}, b'{"max_batch_size":"8"}', "max_batch_size is '8'", id="max_batch_size as text"),
    ],
)
def test_malformed_metadata(metadata: Any, config: bytes | None, message: str) -> None:
    body = metadata if isinstance(metadata, bytes) else json.dumps(metadata).encode()
    with pytest.raises(ValueError) as error:
        parse_metadata(body, config)
    assert message in str(error.value)
