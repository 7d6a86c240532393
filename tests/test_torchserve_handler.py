"""What a bundled model answers on TorchServe: its request forms, and batches as TorchServe hands them over."""

from __future__ import annotations

import importlib
import json
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from servebench_servers.models.digits import DIGITS, IMAGE, LOGITS
from servebench_servers.models.hosted import Settings, TensorSpec
from servebench_servers.models.serving.messages import BadRequestError, parse, render

with np.load(DIGITS.folder / "heldout.npz") as _file:
    IMAGES: NDArray[np.float32] = _file["IMAGE"]
with np.load(DIGITS.folder / "golden.npz") as _file:
    GOLDEN: NDArray[np.float32] = _file["LOGITS"]

#: Several inputs of closed sizes, and several that share an open one.
CLICK = (TensorSpec("DENSE", "FP32", (2,)), TensorSpec("SPARSE", "INT64", (1,)))
TOKENS = (TensorSpec("IDS", "INT64", (-1,)), TensorSpec("MASK", "INT64", (-1,)))
TILE = (TensorSpec("TILE", "FP32", (1, -1, -1)),)


def v2(images: NDArray[np.float32], **changes: Any) -> dict[str, Any]:
    """A KServe v2 request as JSON, with parts of its input replaced."""
    tensor = {"name": "IMAGE", "datatype": "FP32", "shape": list(images.shape), "data": images.ravel().tolist()}
    return {"inputs": [tensor | changes]}


@pytest.mark.parametrize("count", [pytest.param(1, id="one image"), pytest.param(3, id="three images")])
@pytest.mark.parametrize(
    ("form", "body"),
    [
        pytest.param("raw", lambda images: {"body": bytearray(images.tobytes())}, id="raw"),
        pytest.param("raw", lambda images: {"data": images.tobytes()}, id="raw, as a field"),
        pytest.param("raw", lambda images: {"IMAGE": images.tobytes()}, id="raw, as a field of its name"),
        pytest.param("instances", lambda images: {"body": {"instances": images.tolist()}}, id="instances"),
        pytest.param("inputs", lambda images: {"body": v2(images)}, id="KServe, flat"),
        pytest.param("inputs", lambda images: {"body": v2(images, data=images.tolist())}, id="KServe, nested"),
    ],
)
def test_images_of_every_form(form: str, body: Any, count: int) -> None:
    request = parse(body(IMAGES[:count]), [IMAGE])
    assert request.form == form
    (images,) = request.arrays
    assert images.dtype == np.float32
    np.testing.assert_array_equal(images, IMAGES[:count])


TWO_CLICKS = struct.pack("<4f2q", 0.5, 1.5, 2.5, 3.5, 7, 8)  # by hand: two rows of DENSE, then two of SPARSE


@pytest.mark.parametrize(
    "row",
    [
        pytest.param({"body": TWO_CLICKS}, id="one after the other"),
        pytest.param({"DENSE": TWO_CLICKS[:16], "SPARSE": TWO_CLICKS[16:]}, id="by name"),
        pytest.param(
            {"body": {"instances": [{"DENSE": [0.5, 1.5], "SPARSE": [7]}, {"SPARSE": [8], "DENSE": [2.5, 3.5]}]}},
            id="objects",
        ),
        pytest.param(
            {
                "body": {
                    "inputs": [
                        {"name": "SPARSE", "datatype": "INT64", "shape": [2, 1], "data": [7, 8]},
                        {"name": "DENSE", "datatype": "FP32", "shape": [2, 2], "data": [[0.5, 1.5], [2.5, 3.5]]},
                    ]
                }
            },
            id="KServe, in another order",
        ),
    ],
)
def test_two_inputs_in_every_form(row: dict[str, Any]) -> None:
    dense, sparse = parse(row, CLICK).arrays
    assert (dense.dtype, sparse.dtype) == (np.float32, np.int64)
    assert (dense.tolist(), sparse.tolist()) == ([[0.5, 1.5], [2.5, 3.5]], [[7], [8]])


@pytest.mark.parametrize("length", [1, 2, 3, 100, 511])
def test_open_sizes_follow_from_the_number_of_bytes(length: int) -> None:
    ids, mask = np.arange(length), np.ones(length, np.int64)
    found = parse({"body": ids.tobytes() + mask.tobytes()}, TOKENS).arrays
    assert [array.tolist() for array in found] == [[ids.tolist()], [mask.tolist()]]
    tile = np.arange(length * length, dtype=np.float32)
    (found_tile,) = parse({"body": tile.tobytes()}, TILE).arrays
    assert found_tile.shape == (1, 1, length, length)
    np.testing.assert_array_equal(found_tile.ravel(), tile)


@pytest.mark.parametrize(
    ("row", "inputs", "message"),
    [
        pytest.param({"body": b""}, [IMAGE], r"0 bytes are not rows of 256 bytes of FP32 \[1, 8, 8\]", id="nothing"),
        pytest.param({"body": bytes(255)}, [IMAGE], "255 bytes are not rows of 256 bytes", id="a byte short"),
        pytest.param({"body": "text"}, [IMAGE], "send the bytes of IMAGE", id="text"),
        pytest.param({}, [IMAGE], "send the bytes of IMAGE", id="a form without the field data"),
        pytest.param({"body": [1, 2]}, [IMAGE], "send the bytes of IMAGE", id="JSON, but no object"),
        pytest.param({"body": {"images": []}}, [IMAGE], 'with "instances" or "inputs"', id="an unknown key"),
        pytest.param({"body": {"instances": []}}, [IMAGE], r"shape \[0\]", id="no instance"),
        pytest.param({"body": {"instances": [[1.0] * 64]}}, [IMAGE], r"shape \[1, 64\], not \[n, 1, 8, 8\]", id="a flat image"),
        pytest.param({"body": {"instances": [[1.0], [1.0, 2.0]]}}, [IMAGE], "not an array of numbers", id="ragged"),
        pytest.param({"body": {"instances": "abc"}}, [IMAGE], "not an array of numbers", id="a word"),
        pytest.param({"body": {"instances": [[True]]}}, [IMAGE], "not an array of numbers", id="truth values"),
        pytest.param({"body": {"instances": {"b64": "AAAA"}}}, [IMAGE], "not an array of numbers", id="an object"),
        pytest.param({"body": {"inputs": []}}, [IMAGE], "has to hold IMAGE", id="no input"),
        pytest.param({"body": {"inputs": 5}}, [IMAGE], "has to hold IMAGE", id="inputs that are no list"),
        pytest.param({"body": v2(IMAGES[:1], name="PIXELS")}, [IMAGE], "has to hold IMAGE", id="another name"),
        pytest.param({"body": v2(IMAGES[:1], datatype="FP64")}, [IMAGE], "datatype FP32", id="another type"),
        pytest.param(
            {"body": v2(IMAGES[:1], shape=[2, 1, 8, 8])}, [IMAGE], r"of shape \[2, 1, 8, 8\]", id="more rows than numbers"
        ),
        pytest.param({"body": v2(IMAGES[:1], shape=[64])}, [IMAGE], r"shape \[64\], not \[n, 1, 8, 8\]", id="another shape"),
        pytest.param({"body": v2(IMAGES[:1], shape=["a"])}, [IMAGE], "not an array of numbers of shape", id="words as shape"),
        pytest.param(
            {
                "body": {
                    "inputs": [
                        {"name": "IMAGE", "datatype": "FP32", "shape": [1, 1, 8, 8], "parameters": {"binary_data_size": 256}}
                    ]
                }
            },
            [IMAGE],
            "data as JSON numbers",
            id="KServe's binary extension",
        ),
        pytest.param({"body": {"inputs": [*v2(IMAGES[:1])["inputs"], {}]}}, [IMAGE], "nothing else", id="one input too many"),
        pytest.param({"body": {"instances": [[1, 2]]}}, CLICK, "objects with DENSE, SPARSE", id="arrays for several inputs"),
        pytest.param(
            {"body": {"instances": [{"DENSE": [1, 2], "SPARSE": [1.5]}]}}, CLICK, "SPARSE: not an array", id="half a category"
        ),
        pytest.param({"body": {"instances": [{"DENSE": [1, 2]}]}}, CLICK, "SPARSE: not an array", id="an input left out"),
        pytest.param(
            {"DENSE": bytes(16), "SPARSE": bytes(8)}, CLICK, r"\[2, 1\] rows, not equally many", id="rows of one input only"
        ),
        pytest.param(
            {"DENSE": bytes(8)}, CLICK, "found the fields DENSE; send bytes for each of DENSE, SPARSE", id="a field left out"
        ),
        pytest.param(
            {"DENSE": bytes(8), "SPARSE": "7"}, CLICK, "found the fields DENSE, SPARSE; send bytes", id="a field of text"
        ),
        pytest.param({"body": bytes(24)}, TOKENS, "24 bytes are not one row", id="half a token"),
        pytest.param({"body": bytes(4 * 5)}, TILE, "20 bytes are not one row", id="no square"),
    ],
)
def test_bad_requests(row: dict[str, Any], inputs: Any, message: str) -> None:
    with pytest.raises(BadRequestError, match=message):
        parse(row, inputs)


def test_replies_have_their_requests_form() -> None:
    logits = GOLDEN[:2]
    names = {"model": "digits", "version": "1.0"}

    def reply_to(body: Any) -> tuple[bytes, str]:
        return render(parse({"body": body}, [IMAGE]), logits, LOGITS, **names)

    reply, content_type = reply_to(IMAGES[:2].tobytes())
    assert content_type == "application/octet-stream"
    np.testing.assert_array_equal(np.frombuffer(reply, "<f4").reshape(2, 10), logits)

    reply, content_type = reply_to({"instances": IMAGES[:2].tolist()})
    assert content_type == "application/json"
    np.testing.assert_array_equal(np.array(json.loads(reply)["predictions"], np.float32), logits)

    reply, content_type = reply_to(v2(IMAGES[:2]) | {"id": "q-7"})
    document = json.loads(reply)
    (output,) = document.pop("outputs")
    assert content_type == "application/json"
    assert document == {"model_name": "digits", "model_version": "1.0", "id": "q-7"}
    np.testing.assert_array_equal(np.array(output.pop("data"), np.float32), logits.ravel())
    assert output == {"name": "LOGITS", "datatype": "FP32", "shape": [2, 10]}
    assert "id" not in json.loads(reply_to(v2(IMAGES[:2]))[0])


# ---- the handler, in TorchServe's own context ----------------------------------------------


@pytest.fixture(scope="module")
def service() -> Iterator[Any]:
    """The handler behind TorchServe's `Service`, which makes batches out of requests."""
    torch = pytest.importorskip("torch")
    ts_service = pytest.importorskip("ts.service")
    module = importlib.import_module("servebench_servers.models.serving.handler")
    predictor = importlib.import_module("servebench_servers.models.serving.torch_model").torch_predictor
    build = importlib.import_module("servebench_servers.models.digits.network").build
    handler = module.ModelHandler()
    manifest = {"model": {"modelName": "digits", "modelVersion": "1.0"}}
    settings = Settings("digits", DIGITS.inputs, DIGITS.output, uses_torch=True, pads=False, weights="weights.pt")
    threads = torch.get_num_threads()
    made = ts_service.Service("digits", str(DIGITS.folder), manifest, handler.handle, None, 4)
    made.context.model_yaml_config = {"handler": {"serving": settings.to_json()}}
    with pytest.MonkeyPatch.context() as patch:  # here `network` does not lie beside the handler
        patch.setattr(module, "load_predictor", lambda *args, package: predictor(build, *args))
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
    assert "5 bytes are not rows of 256 bytes" in json.loads(bad[0])["error"]


def test_a_batch_without_a_good_request_fails_as_a_whole(service: Any) -> None:
    exception = importlib.import_module("ts.utils.util").PredictionException
    with pytest.raises(exception, match="5 bytes are not rows") as caught:
        answers(service, ("data", bytearray(b"short")), ("data", bytearray(b"short")))
    assert caught.value.error_code == 400


@pytest.mark.parametrize(
    ("devices", "gpu_id", "device"),
    [
        pytest.param(("cpu",), None, "cpu", id="the CPU"),
        pytest.param(("cuda:0", "cuda:2"), 2, "cuda:2", id="the GPU that TorchServe hands out"),
        pytest.param(("cuda:0",), None, "cuda:0", id="no word from TorchServe"),
        pytest.param(("mps",), 0, "mps", id="a device without a number"),
        pytest.param(("hpu", "hpu"), None, "hpu", id="one that its driver hands out"),
    ],
)
def test_a_workers_device(devices: tuple[str, ...], gpu_id: int | None, device: str) -> None:
    pytest.importorskip("ts.utils.util")
    handler = importlib.import_module("servebench_servers.models.serving.handler")
    assert handler.worker_device(devices, gpu_id) == device
