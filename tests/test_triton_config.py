"""config.pbtxt as Triton's own protobuf schema reads it, and the comparison with what a server reports."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError
from servebench_servers.devices import InstanceGroup
from servebench_servers.models import TensorSpec
from servebench_servers.triton_config import DynamicBatching, TritonModelConfig

IMAGE = TensorSpec("IMAGE", "FP32", (1, 8, 8))
LOGITS = TensorSpec("LOGITS", "FP32", (10,))

# What Triton 2.51 answered to GET /v2/models/digits/config, without the keys that say nothing here.
REPORTED: dict[str, Any] = {
    "name": "digits",
    "backend": "python",
    "max_batch_size": 16,
    "dynamic_batching": {"preferred_batch_size": [16], "max_queue_delay_microseconds": 500, "priority_levels": 0},
    "instance_group": [{"name": "digits_0", "kind": "KIND_CPU", "count": 2, "gpus": []}],
}


def config(**changes: Any) -> TritonModelConfig:
    settings: dict[str, Any] = {
        "name": "digits",
        "inputs": (IMAGE,),
        "outputs": (LOGITS,),
        "max_batch_size": 16,
        "dynamic_batching": DynamicBatching(max_queue_delay_us=500),
        "instances_per_device": 2,
        "parameters": {},
    }
    return TritonModelConfig(**(settings | changes))


def as_triton_reads(rendered: str) -> dict[str, Any]:
    """The text through Triton's published ModelConfig schema, as a dict of what was set."""
    text_format = pytest.importorskip("google.protobuf.text_format")
    json_format = pytest.importorskip("google.protobuf.json_format")
    pytest.importorskip("grpc")
    from tritonclient.grpc import model_config_pb2

    message = text_format.Parse(rendered, model_config_pb2.ModelConfig())
    values: dict[str, Any] = json_format.MessageToDict(message, preserving_proto_field_name=True)
    return values


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        pytest.param({"max_batch_size": 1}, {"max_batch_size": 1}, id="no server-side batch"),
        pytest.param({"backend": "pytorch"}, {"backend": "pytorch", "name": "digits"}, id="another backend"),
        pytest.param({"instances_per_device": 3}, {"instance_group": [{"count": 3, "kind": "KIND_CPU"}]}, id="three instances"),
        pytest.param(
            {"groups": (InstanceGroup("KIND_GPU", (0, 2)),)},
            {"instance_group": [{"count": 2, "kind": "KIND_GPU", "gpus": [0, 2]}]},
            id="on two GPUs",
        ),
        pytest.param(
            {"groups": (InstanceGroup("KIND_MODEL"),) * 2},
            {"instance_group": [{"count": 2, "kind": "KIND_MODEL"}] * 2},
            id="on two devices that Triton does not know",
        ),
        pytest.param(
            {"inputs": (TensorSpec("TOKENS", "INT64", (-1,)),), "ragged": True},
            {"input": [{"name": "TOKENS", "data_type": "TYPE_INT64", "dims": ["-1"], "allow_ragged_batch": True}]},
            id="requests of different sizes together",
        ),
        pytest.param({"dynamic_batching": None}, {"dynamic_batching": None}, id="no dynamic batching"),
        pytest.param({"dynamic_batching": DynamicBatching()}, {"dynamic_batching": {}}, id="batching without a delay"),
        pytest.param(
            {"dynamic_batching": DynamicBatching(preferred_batch_size=[4, 8], max_queue_delay_us=2_000)},
            # 64-bit integers are strings in protobuf's JSON.
            {"dynamic_batching": {"preferred_batch_size": [4, 8], "max_queue_delay_microseconds": "2000"}},
            id="preferred sizes and a delay",
        ),
        pytest.param(
            {"inputs": (TensorSpec("TEXT", "BYTES", (1,)), TensorSpec("MASK", "BOOL", (-1, 4)))},
            {
                "input": [
                    {"name": "TEXT", "data_type": "TYPE_STRING", "dims": ["1"]},
                    {"name": "MASK", "data_type": "TYPE_BOOL", "dims": ["-1", "4"]},
                ]
            },
            id="several inputs, strings, an open size",
        ),
        pytest.param(
            {"parameters": {"path": 'a "quoted" \\ päth\n'}},
            {"parameters": {"path": {"string_value": 'a "quoted" \\ päth\n'}}},
            id="characters that need quoting",
        ),
    ],
)
def test_triton_reads_what_was_asked(changes: dict[str, Any], expected: dict[str, Any]) -> None:
    read = as_triton_reads(config(**changes).render())
    assert {key: read.get(key) for key in expected} == expected


def test_the_whole_configuration_of_a_model() -> None:
    assert as_triton_reads(config().render()) == {
        "name": "digits",
        "backend": "python",
        "max_batch_size": 16,
        "input": [{"name": "IMAGE", "data_type": "TYPE_FP32", "dims": ["1", "8", "8"]}],
        "output": [{"name": "LOGITS", "data_type": "TYPE_FP32", "dims": ["10"]}],
        "instance_group": [{"count": 2, "kind": "KIND_CPU"}],
        "dynamic_batching": {"max_queue_delay_microseconds": "500"},
    }


@pytest.mark.parametrize(
    ("asked", "reported", "expected"),
    [
        pytest.param({}, {}, [], id="as asked: Triton spells out the preferred size that was left empty"),
        pytest.param({}, {"max_batch_size": 4}, ["max_batch_size is 4, asked for 16"], id="another batch size"),
        pytest.param(
            {},
            {"instance_group": [{"kind": "KIND_CPU", "count": 1}]},
            ["instance count is 1, asked for 2"],
            id="fewer instances",
        ),
        pytest.param(
            {},
            {"instance_group": [{"kind": "KIND_GPU", "count": 2}]},
            ["instance kind is ['KIND_GPU'], asked for ['KIND_CPU']"],
            id="another device",
        ),
        pytest.param(
            {},
            {"dynamic_batching": {"max_queue_delay_microseconds": "0"}},
            ["max_queue_delay_microseconds is 0, asked for 500"],
            id="another delay, as protobuf's JSON spells it",
        ),
        pytest.param(
            {"dynamic_batching": DynamicBatching(preferred_batch_size=[4], max_queue_delay_us=500)},
            {},
            ["preferred_batch_size is [16], asked for [4]"],
            id="other preferred sizes",
        ),
        pytest.param(
            {"dynamic_batching": None}, {}, ["dynamic_batching is True, asked for False"], id="batching nobody asked for"
        ),
        pytest.param({}, {"dynamic_batching": None}, ["dynamic_batching is False, asked for True"], id="batching lost"),
    ],
)
def test_differences_are_named(asked: dict[str, Any], reported: dict[str, Any], expected: list[str]) -> None:
    assert config(**asked).differences(REPORTED | reported) == expected


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"preferred_batch_size": [0]}, id="a batch of none"),
        pytest.param({"max_queue_delay_us": -1}, id="a negative delay"),
        pytest.param({"max_queue_delay_microseconds": 5}, id="an unknown key"),
    ],
)
def test_batching_refuses(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        DynamicBatching(**settings)
