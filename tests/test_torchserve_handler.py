"""The digits model's TorchServe handler: its request forms, and batches as TorchServe hands them over."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from servebench_servers.models.digits import DIGITS, IMAGE, LOGITS, messages
from servebench_servers.models.digits.messages import BadRequestError, parse, render

with np.load(DIGITS.folder / "heldout.npz") as _file:
    IMAGES: NDArray[np.float32] = _file["IMAGE"]
with np.load(DIGITS.folder / "golden.npz") as _file:
    GOLDEN: NDArray[np.float32] = _file["LOGITS"]


def v2(images: NDArray[np.float32], **changes: Any) -> dict[str, Any]:
    """A KServe v2 request as JSON, with parts of its input replaced."""
    tensor = {"name": "IMAGE", "datatype": "FP32", "shape": list(images.shape), "data": images.ravel().tolist()}
    return {"inputs": [tensor | changes]}


def test_messages_are_those_of_the_hosted_model() -> None:
    assert (IMAGE.name, IMAGE.datatype, IMAGE.dims) == (messages.INPUT, "FP32", messages.IMAGE_SHAPE)
    assert LOGITS.name == messages.OUTPUT


@pytest.mark.parametrize("count", [pytest.param(1, id="one image"), pytest.param(3, id="three images")])
@pytest.mark.parametrize(
    ("form", "body"),
    [
        pytest.param("raw", lambda images: bytearray(images.tobytes()), id="raw"),
        pytest.param("instances", lambda images: {"instances": images.tolist()}, id="instances"),
        pytest.param("inputs", v2, id="KServe, flat"),
        pytest.param("inputs", lambda images: v2(images, data=images.tolist()), id="KServe, nested"),
    ],
)
def test_images_of_every_form(form: str, body: Any, count: int) -> None:
    query = parse(body(IMAGES[:count]))
    assert query.form == form
    assert query.images.dtype == np.float32
    np.testing.assert_array_equal(query.images, IMAGES[:count])


@pytest.mark.parametrize(
    ("body", "message"),
    [
        pytest.param(b"", "0 bytes are no images of 256 bytes", id="nothing"),
        pytest.param(bytes(255), "255 bytes are no images of 256 bytes", id="a byte short"),
        pytest.param("text", "send FP32 bytes", id="text"),
        pytest.param(None, "send FP32 bytes", id="a form without the field data"),
        pytest.param([1, 2], "send FP32 bytes", id="JSON, but no object"),
        pytest.param({"images": []}, 'with "instances" or "inputs"', id="an unknown key"),
        pytest.param({"instances": []}, r"shape \[0\]", id="no instance"),
        pytest.param({"instances": [[1.0] * 64]}, r"shape \[1, 64\], not \[n, 1, 8, 8\]", id="a flat image"),
        pytest.param({"instances": [[1.0], [1.0, 2.0]]}, "not an array of numbers", id="ragged"),
        pytest.param({"instances": "abc"}, "not an array of numbers", id="a word"),
        pytest.param({"instances": {"b64": "AAAA"}}, "not an array of numbers", id="an object"),
        pytest.param({"inputs": []}, "has to hold one input", id="no input"),
        pytest.param(v2(IMAGES[:1], name="PIXELS"), "has to hold one input: name IMAGE", id="another name"),
        pytest.param(v2(IMAGES[:1], datatype="FP64"), "datatype FP32", id="another type"),
        pytest.param(v2(IMAGES[:1], shape=[2, 1, 8, 8]), r"of shape \[2, 1, 8, 8\]", id="more rows than numbers"),
        pytest.param(v2(IMAGES[:1], shape=[64]), r"shape \[64\], not \[n, 1, 8, 8\]", id="another shape"),
        pytest.param(v2(IMAGES[:1], shape=["a"]), "not an array of numbers of shape", id="a shape of words"),
        pytest.param(
            {"inputs": [{"name": "IMAGE", "datatype": "FP32", "shape": [1, 1, 8, 8], "parameters": {"binary_data_size": 256}}]},
            "data as JSON numbers",
            id="KServe's binary extension",
        ),
    ],
)
def test_bad_requests(body: Any, message: str) -> None:
    with pytest.raises(BadRequestError, match=message):
        parse(body)


def test_replies_have_their_requests_form() -> None:
    logits = GOLDEN[:2]
    names = {"model": "digits", "version": "1.0"}
    reply, content_type = render(parse(IMAGES[:2].tobytes()), logits, **names)
    assert content_type == "application/octet-stream"
    np.testing.assert_array_equal(np.frombuffer(reply, "<f4").reshape(2, 10), logits)

    reply, content_type = render(parse({"instances": IMAGES[:2].tolist()}), logits, **names)
    assert content_type == "application/json"
    np.testing.assert_array_equal(np.array(json.loads(reply)["predictions"], np.float32), logits)

    reply, content_type = render(parse(v2(IMAGES[:2]) | {"id": "q-7"}), logits, **names)
    document = json.loads(reply)
    (output,) = document.pop("outputs")
    assert content_type == "application/json"
    assert document == {"model_name": "digits", "model_version": "1.0", "id": "q-7"}
    np.testing.assert_array_equal(np.array(output.pop("data"), np.float32), logits.ravel())
    assert output == {"name": "LOGITS", "datatype": "FP32", "shape": [2, 10]}
    assert "id" not in json.loads(render(parse(v2(IMAGES[:2])), logits, **names)[0])


# ---- the handler, in TorchServe's own context ----------------------------------------------


@pytest.fixture(scope="module")
def service() -> Iterator[Any]:
    """The handler behind TorchServe's `Service`, which makes batches out of requests."""
    torch = pytest.importorskip("torch")
    ts_service = pytest.importorskip("ts.service")
    handler = importlib.import_module("servebench_servers.models.digits.handler").DigitsHandler()
    manifest = {"model": {"modelName": "digits", "modelVersion": "1.0"}}
    threads = torch.get_num_threads()
    made = ts_service.Service("digits", str(DIGITS.folder), manifest, handler.handle, None, 4)
    made.context.model_yaml_config = {"handler": {"weights": "weights.pt", "torch_threads": 1}}
    handler.initialize(made.context)
    yield made
    torch.set_num_threads(threads)


def answers(service: Any, *bodies: Any) -> list[tuple[Any, int, str]]:
    """Hand one batch over; each answer with its status and content type."""
    batch = [
        {"requestId": f"id{index}".encode(), "parameters": [{"name": name, "value": value, "contentType": ""}], "headers": []}
        for index, (name, value) in enumerate(bodies)
    ]
    headers, data, ids = service.retrieve_data_for_inference(batch)
    service.context.request_ids, service.context.request_processor = ids, headers
    replies = service._entry_point(data, service.context)
    return [
        (reply, service.context.get_response_status(index)[0], service.context.get_response_content_type(index))
        for index, reply in enumerate(replies)
    ]


def test_a_batch_of_all_forms_is_answered_in_order(service: Any) -> None:
    raw, instances, form = answers(
        service,
        ("body", bytearray(IMAGES[0].tobytes())),
        ("body", {"instances": IMAGES[1:3].tolist()}),
        ("data", bytearray(IMAGES[3].tobytes())),
    )
    assert [status for _, status, _ in (raw, instances, form)] == [200, 200, 200]
    np.testing.assert_allclose(np.frombuffer(raw[0], "<f4"), GOLDEN[0], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(json.loads(instances[0])["predictions"], GOLDEN[1:3], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(np.frombuffer(form[0], "<f4"), GOLDEN[3], rtol=1e-3, atol=1e-4)
    octets = "application/octet-stream"
    assert [kind for _, _, kind in (raw, instances, form)] == [octets, "application/json", octets]


def test_a_bad_request_does_not_harm_its_neighbours(service: Any) -> None:
    good, bad, also_good = answers(
        service,
        ("body", bytearray(IMAGES[0].tobytes())),
        ("body", bytearray(b"short")),
        ("body", bytearray(IMAGES[1].tobytes())),
    )
    np.testing.assert_allclose(np.frombuffer(good[0], "<f4"), GOLDEN[0], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(np.frombuffer(also_good[0], "<f4"), GOLDEN[1], rtol=1e-3, atol=1e-4)
    assert bad[1:] == (400, "application/json")
    assert "5 bytes are no images" in json.loads(bad[0])["error"]


def test_a_batch_without_a_good_request_fails_as_a_whole(service: Any) -> None:
    exception = importlib.import_module("ts.utils.util").PredictionException
    with pytest.raises(exception, match="5 bytes are no images") as caught:
        answers(service, ("data", bytearray(b"short")), ("data", bytearray(b"short")))
    assert caught.value.error_code == 400
