"""The bundled models are the published ones: parameters, shapes, arithmetic; and how their processes serve them."""

from __future__ import annotations

import importlib
import json
import math
import sys
import time
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from servebench_servers.models import MODELS, samples
from servebench_servers.models.delay import network as delay
from servebench_servers.models.hosted import Settings, TensorSpec
from servebench_servers.models.options import HostingOptions, prepare
from servebench_servers.models.serving import TORCHSERVE_FILES, TRITON_FILES
from servebench_servers.models.serving.batching import answer_all
from servebench_servers.models.serving.settings import Array

from servebench.engine.hosting import launcher_options
from servebench.profile import Profile, bundled_profiles, load_profile

torch = pytest.importorskip("torch")
torch_model = importlib.import_module("servebench_servers.models.serving.torch_model")


def network_of(name: str) -> Any:
    return importlib.import_module(f"servebench_servers.models.{name}.network")


resnet50, bert, dlrm, unet, digits = (network_of(name) for name in ("resnet50", "bert", "dlrm", "unet", "digits"))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def parameters(network: Any) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


# ---- architectures -------------------------------------------------------------------------


def test_parameter_counts_are_the_published_ones() -> None:
    """Counted without memory for them; the sources are beside the numbers."""
    with torch.device("meta"):
        assert parameters(resnet50.build()) == 25_557_032  # torchvision, ResNet50_Weights
        assert parameters(bert.build("base")) == 108_893_186  # transformers, BertForQuestionAnswering of bert-base-uncased
        assert parameters(bert.build("large")) == 334_094_338  # the same of bert-large-uncased
        assert parameters(unet.build()) == 31_030_658  # the paper's figure 1 in Keras, as many have published
        # MLPerf Inference, recommendation/dlrm: 187,767,399 rows of 128, and its two stacks of layers.
        stacks = sum(i * o + o for i, o in [(13, 512), (512, 256), (256, 128)])
        stacks += sum(i * o + o for i, o in [(479, 1024), (1024, 1024), (1024, 512), (512, 256), (256, 1)])
        assert parameters(dlrm.build(40_000_000)) == 187_767_399 * 128 + stacks
        assert parameters(dlrm.build(10_000)) == 21_525_377  # as its page says


def test_resnet50_does_the_published_arithmetic() -> None:
    """4.089 G multiply-adds (torchvision's ``_ops``) is v1.5; with the strides of v1 it would be 3.8 G."""
    flops = importlib.import_module("torch.utils.flop_counter").FlopCounterMode(display=False)
    with torch.device("meta"), flops:
        logits = resnet50.build()(torch.empty(1, 3, 224, 224))
    assert logits.shape == (1, 1000)
    assert round(flops.get_total_flops() / 2 / 1e9, 3) == 4.089


def test_resnet50_has_torchvisions_names() -> None:
    with torch.device("meta"):
        state = resnet50.build().state_dict()
    assert len(state) == 320  # 53 convolutions, 53 x 5 of batch normalisation, 2 of the classifier
    assert state["layer1.0.downsample.0.weight"].shape == (256, 64, 1, 1)
    assert state["layer4.2.conv3.weight"].shape == (2048, 512, 1, 1)
    assert state["fc.weight"].shape == (1000, 2048)
    assert {"conv1.weight", "bn1.running_var", "layer2.0.downsample.1.num_batches_tracked", "layer3.5.bn2.bias"} <= set(state)


def test_unet_gives_the_papers_map_for_the_papers_tile() -> None:
    with torch.device("meta"):
        assert unet.build()(torch.empty(1, 1, 572, 572)).shape == (1, 2, 388, 388)


def test_unet_tiles_seamlessly() -> None:
    """The paper's overlap-tile strategy: what a tile says of a pixel does not depend on where the tile is cut."""
    torch.manual_seed(1)
    network = unet.build().eval()
    image = torch.rand(1, 1, 204, 204)
    with torch.inference_mode():
        whole = network(image)
        part = network(image[:, :, 16:, 16:])
    assert (whole.shape, part.shape) == ((1, 2, 20, 20), (1, 2, 4, 4))
    torch.testing.assert_close(part, whole[:, :, 16:, 16:], rtol=1e-4, atol=1e-5)


def test_unet_crops_the_middle() -> None:
    """Mirrored kernels see a mirrored image as the others see the image, if what is passed on is cut evenly on both sides."""
    torch.manual_seed(1)
    network = unet.build().eval()
    image = torch.rand(1, 1, 188, 188)
    with torch.inference_mode():
        expected = network(image).flip(2, 3)
        for module in network.modules():
            if hasattr(module, "weight"):
                module.weight.copy_(module.weight.flip(2, 3))
        torch.testing.assert_close(network(image.flip(2, 3)), expected, rtol=1e-4, atol=1e-5)


def small_bert(layers: int = 2) -> Any:
    torch.manual_seed(2)
    return bert.BertForQuestionAnswering(layers, 48, 4).eval()


def as_torchs_own(layer: Any) -> Any:
    """The same weights in torch's own encoder layer."""
    twin = torch.nn.TransformerEncoderLayer(48, 4, 192, activation="gelu", layer_norm_eps=1e-12, batch_first=True).eval()
    of = layer.state_dict()
    names = ("query", "key", "value")
    twin.load_state_dict(
        {
            "self_attn.in_proj_weight": torch.cat([of[f"attention.self.{name}.weight"] for name in names]),
            "self_attn.in_proj_bias": torch.cat([of[f"attention.self.{name}.bias"] for name in names]),
            "self_attn.out_proj.weight": of["attention.output.dense.weight"],
            "self_attn.out_proj.bias": of["attention.output.dense.bias"],
            "linear1.weight": of["intermediate.dense.weight"],
            "linear1.bias": of["intermediate.dense.bias"],
            "linear2.weight": of["output.dense.weight"],
            "linear2.bias": of["output.dense.bias"],
            "norm1.weight": of["attention.output.LayerNorm.weight"],
            "norm1.bias": of["attention.output.LayerNorm.bias"],
            "norm2.weight": of["output.LayerNorm.weight"],
            "norm2.bias": of["output.LayerNorm.bias"],
        }
    )
    return twin


def test_bert_computes_what_torchs_encoder_does() -> None:
    network = small_bert()
    for parameter in network.parameters():  # biases and norms that would show if one were left out
        torch.nn.init.normal_(parameter, std=0.3)
    ids = torch.randint(0, 30_522, (3, 7))
    types = torch.randint(0, 2, (3, 7))
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [1] * 2 + [0] * 5])
    state = network.state_dict()
    x = state["bert.embeddings.word_embeddings.weight"][ids] + state["bert.embeddings.token_type_embeddings.weight"][types]
    x = x + state["bert.embeddings.position_embeddings.weight"][:7]
    norm = "bert.embeddings.LayerNorm"
    x = torch.nn.functional.layer_norm(x, (48,), state[f"{norm}.weight"], state[f"{norm}.bias"], 1e-12)
    for number in range(2):
        x = as_torchs_own(network.get_submodule(f"bert.encoder.layer.{number}"))(x, src_key_padding_mask=mask == 0)
    expected = torch.nn.functional.linear(x, state["qa_outputs.weight"], state["qa_outputs.bias"])
    seen = mask.bool()
    torch.testing.assert_close(network(ids, mask, types)[seen], expected[seen], rtol=1e-4, atol=1e-5)


def test_bert_loads_published_state_dicts(tmp_path: Path) -> None:
    """They carry a pooler and position numbers, which the answer does not depend on."""
    network = small_bert(layers=1)
    state = network.state_dict()
    extra = {"bert.pooler.dense.weight": torch.zeros(48, 48), "bert.embeddings.position_ids": torch.arange(512)}
    torch.save(state | extra, tmp_path / "weights.pt")
    settings = replace(settings_of("bert"), weights="weights.pt", options={})
    loaded = torch_model.load_network(lambda: bert.BertForQuestionAnswering(1, 48, 4), settings, tmp_path)
    torch.testing.assert_close(loaded.state_dict(), state)
    torch.save(state | {"classifier.weight": torch.zeros(2)}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="does not hold the bert network's weights"):
        torch_model.load_network(lambda: bert.BertForQuestionAnswering(1, 48, 4), settings, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"INPUT_IDS": 30_522}, "INPUT_IDS: found 30522 to 30522, possible are 0 to 30521", id="unknown token"),
        pytest.param({"INPUT_IDS": -1}, "possible are 0 to 30521", id="negative token"),
        pytest.param({"TOKEN_TYPE_IDS": 2}, "TOKEN_TYPE_IDS: found 2 to 2, possible are 0 to 1", id="unknown text"),
    ],
)
def test_bert_refuses_tokens_without_weights(change: dict[str, int], message: str) -> None:
    arrays = [np.full((1, 3), change.get(spec.name, 0)) for spec in MODELS["bert"].inputs]
    with pytest.raises(ValueError, match=message):
        bert.BertForQuestionAnswering.check_inputs(*arrays)


def test_bert_refuses_more_tokens_than_positions() -> None:
    arrays = [np.zeros((1, 513), np.int64)] * 3
    with pytest.raises(ValueError, match="513 tokens, at most 512"):
        bert.BertForQuestionAnswering.check_inputs(*arrays)
    with pytest.raises(ValueError, match="same shape"):
        bert.BertForQuestionAnswering.check_inputs(arrays[0], arrays[1], arrays[2][:, :5])


@pytest.mark.parametrize("size", [172, 187, 189, 200])
def test_unet_refuses_sizes_that_do_not_halve(size: int) -> None:
    with pytest.raises(ValueError, match=f"a side of {size} pixels"):
        unet.UNet.check_inputs(np.zeros((1, 1, 188, size), np.float32))
    unet.UNet.check_inputs(np.zeros((1, 1, 188, 204), np.float32))


def test_dlrm_computes_the_papers_formula() -> None:
    """Naumov et al. 2019, section 2: both stacks, and the dot products of all pairs of different features, by hand."""
    torch.manual_seed(3)
    network = dlrm.Dlrm([5, 7, 3]).double().eval()
    for table in network.emb_l:
        torch.nn.init.normal_(table.weight)
    state = {name: tensor.numpy() for name, tensor in network.state_dict().items()}

    def stack(name: str, x: Array, last: Any) -> Array:
        layers = sorted(int(key.split(".")[1]) for key in state if key.startswith(name) and key.endswith("weight"))
        for layer in layers:
            x = state[f"{name}.{layer}.weight"] @ x + state[f"{name}.{layer}.bias"]
            x = last(x) if layer == layers[-1] else np.maximum(x, 0)
        return x

    dense, sparse = np.linspace(-1, 1, 13), [4, 9, 40]  # 9 of 7 rows is row 2, 40 of 3 is row 1
    x = stack("bot_l", dense, lambda values: np.maximum(values, 0))
    features = [x, *(state[f"emb_l.{table}.weight"][row] for table, row in enumerate([4, 2, 1]))]
    products = [features[i] @ features[j] for i in range(4) for j in range(i)]
    expected = stack("top_l", np.concatenate([x, products]), lambda z: 1 / (1 + np.exp(-z)))
    with torch.inference_mode():
        found = network(torch.tensor(dense[None]), torch.tensor([sparse]))
    np.testing.assert_allclose(found.numpy()[0], expected, rtol=1e-9)


# ---- weights and precision -----------------------------------------------------------------


def settings_of(model: str, **options: Any) -> Settings:
    return prepare(model, HostingOptions(device="cpu", **options), server="X").settings


def test_a_seed_gives_the_same_weights_and_leaves_torchs_own_alone(tmp_path: Path) -> None:
    def weights(seed: int) -> Any:
        network = torch_model.load_network(dlrm.build, settings_of("dlrm", weights_seed=seed, **small), tmp_path)
        return network.state_dict()["bot_l.0.weight"]

    small = {"model_options": {"max_rows": 10}}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = weights(1)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(first, weights(1)) and not torch.equal(first, weights(2))


@pytest.mark.parametrize(
    ("precision", "error"),
    [
        pytest.param("bf16", 2**-8 * 8, id="bf16 has 8 bits of precision"),
        pytest.param("fp16", 2**-11 * 8, id="fp16 has 11"),
        pytest.param("int8", 2**-7 * 8, id="int8 has 7"),
    ],
)
def test_precisions_differ_as_much_as_they_must(precision: str, error: float) -> None:
    """From fp32: not nothing, and not beyond a few units of the precision, relative to the largest logit."""
    settings = replace(settings_of("digits"), precision=precision)
    with np.load(MODELS["digits"].folder / "heldout.npz") as file:
        images = file["IMAGE"]
    exact, _ = torch_model.torch_predictor(digits.build, replace(settings, precision="fp32"), MODELS["digits"].folder, "cpu")
    rough, about = torch_model.torch_predictor(digits.build, settings, MODELS["digits"].folder, "cpu")
    assert f"on cpu in {precision} with 1 thread(s)" in about
    right, found = exact([images]), rough([images])
    assert found.dtype == np.float32
    difference = np.abs(found - right).max() / np.abs(right).max()
    assert 1e-6 < difference < error
    assert (found.argmax(axis=1) == right.argmax(axis=1)).mean() > 0.99


def test_threads_come_from_the_settings() -> None:
    settings = replace(settings_of("digits"), torch_threads=2)
    torch_model.torch_predictor(digits.build, settings, MODELS["digits"].folder, "cpu")
    assert torch.get_num_threads() == 2


def test_settings_survive_their_journey() -> None:
    settings = settings_of("bert", torch_threads=3, weights_seed=4, precision="int8")
    assert Settings.from_json(settings.to_json()) == settings


# ---- delay ---------------------------------------------------------------------------------


class FakeTime:
    """A clock that sleeps 0.3 ms short, as a signal would have it, then never again."""

    def __init__(self) -> None:
        self.now_ns = 10**12
        self.naps_s: list[float] = []

    def monotonic_ns(self) -> int:
        return self.now_ns

    def sleep(self, seconds: float) -> None:
        short_s = 0.0 if self.naps_s else 0.0003
        self.naps_s.append(seconds)
        self.now_ns += round((seconds - short_s) * 1e9)


@pytest.mark.parametrize(("rows", "due_ms"), [(1, 8.5), (4, 10.0), (16, 16.0)])
def test_delay_takes_a_plus_b_times_n(monkeypatch: pytest.MonkeyPatch, rows: int, due_ms: float) -> None:
    clock = FakeTime()
    monkeypatch.setattr(delay, "time", clock)
    batch = np.random.default_rng(1).random((rows, 4), np.float32)
    assert delay.build(a_ms=8, b_ms=0.5)([batch]) is batch
    assert clock.now_ns - 10**12 == due_ms * 1_000_000
    assert len(clock.naps_s) == 2


def test_delay_sleeps_on_the_real_clock_without_cpu() -> None:
    answer, batch = delay.build(a_ms=5, b_ms=0.5), np.zeros((4, 4), np.float32)
    late_ms = []
    cpu_s = time.thread_time()
    for _ in range(20):
        started_ns = time.monotonic_ns()
        answer([batch])
        late_ms.append((time.monotonic_ns() - started_ns) / 1e6 - 7)
    assert time.thread_time() - cpu_s < 0.2 * 20 * 0.007
    assert min(late_ms) >= 0  # never early
    assert sorted(late_ms)[5] < 0.3  # and on time whenever the machine lets it


# ---- batches -------------------------------------------------------------------------------

ROWS = Settings("rows", (TensorSpec("X", "FP32", (-1,)),), TensorSpec("Y", "FP32", (-1,)), uses_torch=False, pads=False)


def rows_of(*shapes: tuple[int, ...]) -> list[list[Array]]:
    random = np.random.default_rng(7)
    return [[random.random(shape, np.float32)] for shape in shapes]


def test_queries_of_one_shape_are_one_batch_and_each_gets_its_rows() -> None:
    seen: list[tuple[int, ...]] = []

    def double(inputs: Any) -> Array:
        seen.append(inputs[0].shape)
        doubled: Array = inputs[0] * 2
        return doubled

    queries = rows_of((1, 3), (2, 5), (2, 3), (1, 5))
    answers = answer_all(queries, double, ROWS)
    assert seen == [(3, 3), (3, 5)]
    for (query,), answer in zip(queries, answers, strict=True):
        np.testing.assert_array_equal(answer, query * 2)


def test_padded_queries_are_one_batch_and_answers_are_cut_back() -> None:
    seen = []

    def running_sum(inputs: Any) -> Array:
        seen.append(inputs[0])
        summed: Array = inputs[0].cumsum(axis=1)
        return summed

    queries = rows_of((1, 3), (2, 5), (1, 1))
    answers = answer_all(queries, running_sum, replace(ROWS, pads=True))
    assert [array.shape for array in seen] == [(4, 5)]
    assert (seen[0][0, 3:] == 0).all() and (seen[0][3, 1:] == 0).all()
    for (query,), answer in zip(queries, answers, strict=True):
        np.testing.assert_array_equal(answer, query.cumsum(axis=1))


def test_a_refused_query_does_not_harm_its_neighbours() -> None:
    def picky(inputs: Any) -> Array:
        if (inputs[0] < 0).any():
            raise ValueError("negative")
        answer: Array = inputs[0]
        return answer

    queries = rows_of((1, 2), (1, 2), (1, 2))
    queries[1][0][0, 0] = -1
    first, refused, last = answer_all(queries, picky, ROWS)
    assert isinstance(refused, ValueError) and str(refused) == "negative"
    np.testing.assert_array_equal(first, queries[0][0])
    np.testing.assert_array_equal(last, queries[2][0])


def test_padding_does_not_change_what_bert_answers() -> None:
    network = small_bert()
    queries = [[array[None] for array in sample.values()] for sample in samples.questions(5, 3, 20)]

    def predict(inputs: Any) -> Array:
        with torch.inference_mode():
            answer: Array = network(*map(torch.from_numpy, inputs)).numpy()
            return answer

    settings = settings_of("bert")
    together = answer_all(queries, predict, settings)
    assert len({query[0].shape for query in queries}) > 1
    for query, answer in zip(queries, together, strict=True):
        np.testing.assert_allclose(answer, predict(query), rtol=1e-4, atol=1e-5)


# ---- Triton's process ----------------------------------------------------------------------


class FakeTensor:
    def __init__(self, name: str, array: Array) -> None:
        self.name = name
        self.array = array

    def as_numpy(self) -> Array:
        return self.array


class TritonError(Exception):
    INVALID_ARG = 3

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        assert code == self.INVALID_ARG


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """A rendered repository's model.py as Triton's stub imports it, with the stub's module played by lists and tuples."""
    pb_utils: Any = types.ModuleType("triton_python_backend_utils")
    pb_utils.get_input_tensor_by_name = lambda request, name: request[name]
    pb_utils.Tensor = FakeTensor
    pb_utils.TritonError = TritonError
    pb_utils.InferenceResponse = lambda tensors=(), error=None: error or {tensor.name: tensor.array for tensor in tensors}
    pb_utils.Logger = types.SimpleNamespace(log_info=lambda text: None)
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", pb_utils)
    monkeypatch.syspath_prepend(str(tmp_path))
    version = tmp_path / "repository" / "1"
    version.mkdir(parents=True)
    for file in MODELS["digits"].serving_files(TRITON_FILES):
        (version / file.name).write_bytes(file.read_bytes())
    (version / "weights.pt").write_bytes((MODELS["digits"].folder / "weights.pt").read_bytes())
    yield importlib.import_module("repository.1.model")
    for name in [name for name in sys.modules if name.startswith("repository")]:
        del sys.modules[name]


def initialize_arguments(tmp_path: Path) -> dict[str, str]:
    parameters = {"serving": {"string_value": settings_of("digits").to_json()}}
    return {
        "model_config": json.dumps({"parameters": parameters}),
        "model_repository": str(tmp_path / "repository"),
        "model_version": "1",
        "model_instance_name": "digits_0_0",
        "model_instance_kind": "CPU",
        "model_instance_device_id": "0",
    }


def test_triton_gives_each_request_of_a_batch_its_own_rows(backend: Any, tmp_path: Path) -> None:
    with np.load(MODELS["digits"].folder / "heldout.npz") as file:
        images = file["IMAGE"]
    with np.load(MODELS["digits"].folder / "golden.npz") as file:
        golden = file["LOGITS"]
    model = backend.TritonPythonModel()
    model.initialize(initialize_arguments(tmp_path))
    bounds = [(0, 1), (1, 4), (4, 20)]
    answers = model.execute([{"IMAGE": FakeTensor("IMAGE", images[start:end])} for start, end in bounds])
    assert len(answers) == 3
    for (start, end), answer in zip(bounds, answers, strict=True):
        assert list(answer) == ["LOGITS"]
        np.testing.assert_allclose(answer["LOGITS"], golden[start:end], rtol=1e-3, atol=1e-4)


def test_triton_answers_a_refused_query_with_its_reason(backend: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = backend.TritonPythonModel()
    model.initialize(initialize_arguments(tmp_path))

    def refuse(inputs: Any) -> Array:
        raise ValueError("no such digit")

    monkeypatch.setattr(model, "_predict", refuse)
    (answer,) = model.execute([{"IMAGE": FakeTensor("IMAGE", np.zeros((1, 1, 8, 8), np.float32))}])
    assert isinstance(answer, TritonError) and str(answer) == "no such digit"


def test_numpy_2_is_refused_in_the_serving_process(backend: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(np, "__version__", "2.0.0")
    with pytest.raises(RuntimeError, match="needs numpy<2"):
        backend.TritonPythonModel().initialize(initialize_arguments(tmp_path))


@pytest.mark.parametrize(
    ("devices", "kind", "number", "name", "device"),
    [
        pytest.param(("cpu",), "CPU", "0", "digits_0_1", "cpu", id="the CPU"),
        pytest.param(("cuda:1", "cuda:3"), "GPU", "3", "digits_0_1", "cuda:3", id="the GPU that Triton hands out"),
        pytest.param(("xpu:0", "xpu:1"), "MODEL", "0", "my_model_2_1_0", "xpu:1", id="the group's device"),
        pytest.param(("mps",), "MODEL", "0", "digits_0_1", "mps", id="the only one"),
    ],
)
def test_an_instances_device(backend: Any, devices: tuple[str, ...], kind: str, number: str, name: str, device: str) -> None:
    args = {"model_instance_kind": kind, "model_instance_device_id": number, "model_instance_name": name}
    assert backend.instance_device(devices, args) == device


def test_the_serving_files_are_all_that_a_process_imports() -> None:
    """What lies beside a model in a repository or archive is enough: nothing else of servebench is named."""
    folder = Path(torch_model.__file__).parent
    assert {file.name for file in folder.glob("*.py")} == {*TRITON_FILES, *TORCHSERVE_FILES, "__init__.py"}
    for model in MODELS.values():
        for file in {*model.serving_files(TRITON_FILES), *model.serving_files(TORCHSERVE_FILES)}:
            lines = [line for line in file.read_text().splitlines() if line.startswith(("from ", "import "))]
            assert not [line for line in lines if "servebench" in line or line.startswith("from ..")], file


# ---- samples -------------------------------------------------------------------------------


def test_the_shipped_samples_are_what_the_command_makes(tmp_path: Path) -> None:
    result = CliRunner().invoke(samples.main, ["--out", str(tmp_path)], catch_exceptions=False)
    assert result.exit_code == 0
    shipped = MODELS["bert"].folder.parent
    made = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file())
    assert len(made) == 26
    for path in made:
        if path.suffix == ".npz":
            with np.load(tmp_path / path) as new, np.load(shipped / path) as old:
                assert new.files == old.files
                assert all(np.array_equal(new[name], old[name]) for name in new.files)
        else:
            assert (tmp_path / path).read_bytes() == (shipped / path).read_bytes()
    assert len(list((shipped / "bert/short").glob("*"))) == len(list((tmp_path / "bert/short").glob("*"))) == 16


def test_bodies_hold_the_same_samples_as_the_other_files() -> None:
    folder = MODELS["bert"].folder
    steps = json.loads((folder / "short.json").read_text())["data"]
    for number, step in enumerate(steps):
        tokens = np.frombuffer((folder / "short" / f"{number:03}.bin").read_bytes(), np.int64).reshape(3, -1)
        assert [tensor["content"] for tensor in step.values()] == tokens.tolist()
        bert.BertForQuestionAnswering.check_inputs(*tokens[:, None])
        assert 8 <= tokens.shape[1] <= 32 and tokens[0, 0] == 101 and tokens[0, -1] == 102
    with np.load(MODELS["dlrm"].folder / "clicks.npz") as file:
        assert math.isfinite(file["DENSE"].max()) and file["SPARSE"].max() < 40_000_000


# ---- profiles ------------------------------------------------------------------------------

#: MLPerf Inference's server constraints: mlperf.conf, ``<model>.Server.target_latency`` (ms at the 99th percentile).
MLPERF_BOUNDS_MS = {"resnet50": 15, "bert": 130, "dlrm": 60}


def profiles_of(model: str) -> list[Profile]:
    return [profile for name in bundled_profiles() if (profile := load_profile(name)).endpoint.model == model]


@pytest.mark.parametrize("model", MODELS)
def test_every_model_has_profiles_that_its_launchers_take(model: str) -> None:
    profiles = profiles_of(model)
    assert {profile.server.launch for profile in profiles} == {"triton", "torchserve"}
    for profile in profiles:
        assert profile.name in bundled_profiles()
        _, options = launcher_options(profile)
        assert isinstance(options, HostingOptions)
        prepare(model, options.model_copy(update={"device": "cpu"}), server="X")
        assert profile.samples.path is not None and profile.samples.path.exists()


@pytest.mark.parametrize(("model", "bound_ms"), MLPERF_BOUNDS_MS.items())
def test_mlperfs_constraint_of_a_model_has_a_profile(model: str, bound_ms: int) -> None:
    (profile,) = [profile for profile in profiles_of(model) if profile.name.endswith("-mlperf")]
    assert f"p99 <= {bound_ms}ms" in [str(constraint) for constraint in profile.constraints]
    assert profile.load.arrivals == "mlperf"
