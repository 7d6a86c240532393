"""TorchScript for Triton's PyTorch backend: the traced network is the network, and its configuration what the backend asks for.

No libtorch backend runs here. What it asks for is taken from its sources (`libtorch.cc`, release 24.12) and
documentation: ``1/model.pt``, a ``forward`` of tensors, and names that are arguments of ``forward``, or
``NAME__0``, or else in the order of the arguments.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from servebench_servers.devices import Inventory
from servebench_servers.models import MODELS, samples
from servebench_servers.models.options import prepare
from servebench_servers.models.serving.settings import Array
from servebench_servers.triton import TritonOptions, model_config, write_torchscript_model
from servebench_servers.triton_config import DynamicBatching
from servebench_servers.triton_torchscript import check_traceable, write_torchscript

from servebench.errors import LaunchError

torch = pytest.importorskip("torch")
tracing = importlib.import_module("servebench_servers.models.tracing")

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

SEED, FULL_BATCH = 7, 4
SMALL_DLRM = {"model_options": {"max_rows": 10}}
LARGE = pytest.mark.models
TORCH_MODELS = ["digits", "dlrm", "bert", *(pytest.param(name, marks=LARGE) for name in ("resnet50", "unet"))]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def hosting(model: str, **options: Any) -> Any:
    return prepare(model, TritonOptions(device="cpu", weights_seed=SEED, **options), server="Triton")


def direct(model: str, **options: Any) -> Any:
    """The module itself, weights drawn as the launcher's seed says, or those that ship."""
    torch.manual_seed(SEED)
    network = importlib.import_module(f"servebench_servers.models.{model}.network").build(**options)
    if (shipped := MODELS[model].weights_path) is not None:
        network.load_state_dict(torch.load(shipped, weights_only=True))
    return network.eval()


def tokens(length: int) -> list[Array]:
    drawn = samples.questions(FULL_BATCH, length, length)
    rows = [np.stack([sample[name] for sample in drawn]) for name in drawn[0]]
    rows[1][1, length // 2 :] = 0  # padding, which is not looked at
    return rows


def clicks() -> list[Array]:
    drawn = samples.clicks(FULL_BATCH)
    return [np.stack([sample[name] for sample in drawn]) for name in drawn[0]]


def heldout() -> list[Array]:
    with np.load(MODELS["digits"].folder / "heldout.npz") as file:
        return [file["IMAGE"][:FULL_BATCH]]


def image(channels: int, size: int) -> list[Array]:
    return list(samples.images(FULL_BATCH, channels, size).values())


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """A model's network, traced, saved, and loaded again."""

    @functools.cache
    def load(model: str) -> Any:
        asked = hosting(model, **(SMALL_DLRM if model == "dlrm" else {}))
        path = tmp_path_factory.mktemp(model) / "model.pt"
        tracing.trace(asked.settings, asked.weights).save(path)
        loaded = torch.jit.load(path)
        path.unlink()  # bert's is large
        return loaded

    return load


@pytest.mark.parametrize(
    ("model", "options", "inputs"),
    [
        pytest.param("digits", {}, heldout(), id="digits"),
        pytest.param("dlrm", {"max_rows": 10}, clicks(), id="dlrm"),
        pytest.param("resnet50", {}, image(3, 224), id="resnet50", marks=LARGE),
        pytest.param("unet", {}, image(1, 188), id="unet", marks=LARGE),
        pytest.param("unet", {}, image(1, 204), id="unet, a larger tile than the traced one", marks=LARGE),
        pytest.param("bert", {"size": "base"}, tokens(12), id="bert, longer than traced"),
        pytest.param("bert", {"size": "base"}, tokens(5), id="bert, shorter than traced"),
    ],
)
def test_the_traced_network_answers_as_the_network(
    traced: Callable[[str], Any], model: str, options: dict[str, Any], inputs: list[Array]
) -> None:
    network = direct(model, **options)
    for rows in (1, FULL_BATCH):
        tensors = [torch.from_numpy(array[:rows].copy()) for array in inputs]
        with torch.inference_mode():
            expected, found = network(*tensors), traced(model)(*tensors)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("model", TORCH_MODELS)
def test_the_file_is_what_the_backend_loads(traced: Callable[[str], Any], model: str) -> None:
    loaded = traced(model)
    first, *arguments = loaded.forward.schema.arguments
    assert first.name == "self"
    assert [argument.type.kind() for argument in arguments] == ["TensorType"] * len(MODELS[model].inputs)
    # On whichever device it is loaded: the backend moves weights, and nothing else.
    graph = loaded.inlined_graph  # owns the nodes
    kinds = {str(node.output().type()) for node in graph.findAllNodes("prim::Constant")}
    assert "int" in kinds and not kinds & {"Device", "Tensor"}


@pytest.mark.parametrize(
    ("model", "precision", "inputs"),
    [
        pytest.param("digits", "bf16", heldout(), id="bf16"),
        pytest.param("digits", "fp16", heldout(), id="fp16"),
        pytest.param("digits", "int8", heldout(), id="int8"),
        pytest.param("dlrm", "bf16", clicks(), id="two inputs, one of them whole numbers"),
    ],
)
def test_precision_is_part_of_the_file(tmp_path: Path, model: str, precision: str, inputs: list[Array]) -> None:
    """The answers are those of the Python backend in that precision, from and to tensors as they travel."""
    options: dict[str, Any] = SMALL_DLRM if model == "dlrm" else {}
    asked = hosting(model, precision=precision, **options)
    write_torchscript(asked, tmp_path / "model.pt", timeout_s=120)
    traced = torch.jit.load(tmp_path / "model.pt")
    torch_model = importlib.import_module("servebench_servers.models.serving.torch_model")
    network = torch_model.in_precision(direct(model, **options.get("model_options", {})), precision)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.float32}[precision]
    tensors = [torch.from_numpy(array) for array in inputs]
    with torch.inference_mode():
        found = traced(*tensors)
        exact = direct(model, **options.get("model_options", {}))(*tensors)
        cast = [tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in tensors]
        expected = network(*cast).float()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(exact.abs().max()))
    assert not torch.equal(found, exact)


def test_a_network_that_bakes_its_example_in_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Baking(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return x if x.sum() > 0 else -x

    monkeypatch.setattr(tracing.importlib, "import_module", lambda name: type("network", (), {"build": Baking}))
    with pytest.raises(ValueError, match="might cause the trace to be incorrect"):
        tracing.trace(hosting("resnet50").settings, None)


def config_of(model: str, **options: Any) -> dict[str, Any]:
    """A rendered configuration as Triton's own schema reads it."""
    text_format = pytest.importorskip("google.protobuf.text_format")
    json_format = pytest.importorskip("google.protobuf.json_format")
    pytest.importorskip("grpc")
    from tritonclient.grpc import model_config_pb2

    asked = TritonOptions(backend="torchscript", **options)
    present = Inventory({"cuda": 2}, "a test")
    rendered = model_config(prepare(model, asked, server="Triton", present=present), asked).render()
    message = text_format.Parse(rendered, model_config_pb2.ModelConfig())
    values: dict[str, Any] = json_format.MessageToDict(message, preserving_proto_field_name=True)
    return values


def test_the_whole_configuration() -> None:
    options = {"dynamic_batching": DynamicBatching(max_queue_delay_us=300), "instance_count": 3, "torch_threads": 2}
    assert config_of("digits", device="cuda:1", max_batch_size=8, **options) == {
        "name": "digits",
        "backend": "pytorch",
        "max_batch_size": 8,
        "input": [{"name": "IMAGE", "data_type": "TYPE_FP32", "dims": ["1", "8", "8"]}],
        "output": [{"name": "LOGITS", "data_type": "TYPE_FP32", "dims": ["10"]}],
        "instance_group": [{"count": 3, "kind": "KIND_GPU", "gpus": [1]}],
        "dynamic_batching": {"max_queue_delay_microseconds": "300"},
        "parameters": {"INTRA_OP_THREAD_COUNT": {"string_value": "2"}},
    }


@pytest.mark.parametrize("model", TORCH_MODELS)
def test_names_stand_for_the_arguments_in_their_order(traced: Callable[[str], Any], model: str) -> None:
    """A name that was an argument's, or numbered, would have the backend look for the others by name or number as well."""
    config = config_of(model, device="cpu")
    inputs = [tensor["name"] for tensor in config["input"]]
    arguments = [argument.name for argument in traced(model).forward.schema.arguments]
    assert inputs == [spec.name for spec in MODELS[model].inputs]
    assert not set(inputs) & set(arguments)
    assert not any("__" in name for name in [*inputs, *(tensor["name"] for tensor in config["output"])])
    # Ragged inputs arrive flat there.
    assert not any("allow_ragged_batch" in tensor for tensor in config["input"])
    assert {tensor["data_type"] for tensor in config["input"]} <= {"TYPE_FP32", "TYPE_INT64"}


def test_the_repository_holds_the_model_and_nothing_of_python(tmp_path: Path) -> None:
    asked = TritonOptions(backend="torchscript", device="cpu")
    digits = prepare("digits", asked, server="Triton")
    left = tmp_path / "digits" / "1" / "model.py"  # the backend would prefer to run this
    left.parent.mkdir(parents=True)
    left.touch()
    config = model_config(digits, asked)
    write_torchscript_model(digits, config, tmp_path, timeout_s=60)
    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert files == ["digits/1/model.pt", "digits/config.pbtxt"]
    assert (tmp_path / "digits" / "config.pbtxt").read_text() == config.render()


def refusal(asked: Any) -> str:
    with pytest.raises(LaunchError) as caught:
        check_traceable(asked)
    return str(caught.value)


def test_what_the_backend_cannot_host() -> None:
    assert refusal(hosting("delay")) == "backend: delay is no torch network, so it has no torchscript; use python"
    elsewhere = prepare("digits", TritonOptions(device="xpu"), server="Triton", present=Inventory({"xpu": 1}, "a test"))
    assert refusal(elsewhere) == "backend: torchscript computes on cpu or cuda, not on xpu"
    check_traceable(hosting("digits"))


def test_weights_of_something_else_are_named(tmp_path: Path) -> None:
    weights = tmp_path / "mine.pt"
    torch.save({"conv1.weight": torch.zeros(16, 1, 3, 3)}, weights)
    with pytest.raises(LaunchError) as caught:
        write_torchscript(hosting("digits", weights=weights), tmp_path / "model.pt", timeout_s=60)
    text = "digits cannot be traced to TorchScript: ValueError: mine.pt does not hold the digits network's weights: missing"
    assert str(caught.value).startswith(text) and "\n" not in str(caught.value)
    assert not (tmp_path / "model.pt").exists()


def test_tracing_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=r"was not traced to TorchScript within 0\.01 s; raise startup_timeout_s"):
        write_torchscript(hosting("digits"), tmp_path / "model.pt", timeout_s=0.01)
