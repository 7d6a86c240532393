"""Every bundled model on both real servers, through every protocol: what comes back is what the same torch module answers.

`make test` covers the small models and one transformer (and `digits` in the launchers' tests), `make test-models`
all of them. The servers are asked by clients that are not ours: the standard library's, tritonclient, grpcio.

The module is called in the server's precision, with as many threads, and where it is known with the same batch: then
the arithmetic is the same. That the precision itself is right is another test, against fp32.
"""

from __future__ import annotations

import functools
import http.client
import importlib
import importlib.util
import json
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple
from urllib.parse import urlsplit

import numpy as np
import pytest
from servebench_servers.models import MODELS, samples
from servebench_servers.models.serving.settings import Array
from servebench_servers.torchserve import TorchServeLauncher, TorchServeOptions
from servebench_servers.triton import TritonLauncher, TritonOptions
from servebench_servers.triton_config import DynamicBatching

from servebench.engine.hosting import launcher_options
from servebench.launcher import RunningServer
from servebench.profile import bundled_profiles, load_profile
from servebench.protos import TORCHSERVE, TORCHSERVE_SERVICE

needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")

FULL_BATCH = 4
#: Of fp16 convolutions, for which torch has no fast code on CPUs: a row of resnet50 takes 2.6 s, of unet 4.3 s.
SLOW_BATCH = 2


class Tolerances(NamedTuple):
    """How far outputs may be apart, relative to the largest one."""

    same_batch: float  #: served, and from the module: less than there is between precisions
    #: The same where the server made the batch: sums in another order, and int8 scales inputs by the batch's largest.
    any_batch: float
    fp32: float  #: from the module, and from itself in fp32: units of the precision times what layers add up


TOLERANCES = {
    "fp32": Tolerances(1e-5, 1e-5, 0),
    "bf16": Tolerances(1e-3, 2**-6, 0.05),
    "fp16": Tolerances(1e-4, 2**-9, 0.01),
    "int8": Tolerances(1e-3, 0.1, 0.15),
}


@dataclass(frozen=True)
class Case:
    """A model with options, rows to ask it, inputs by name, and how many of them are a full batch."""

    model: str
    rows: Callable[[], dict[str, Array]]
    options: dict[str, Any] = field(default_factory=dict)
    batch: int = FULL_BATCH

    @property
    def precision(self) -> str:
        precision: str = self.options.get("precision", "fp32")
        return precision

    @property
    def each(self) -> list[slice]:
        """Every row by itself."""
        return [slice(row, row + 1) for row in range(self.batch)]

    @functools.cached_property
    def inputs(self) -> dict[str, Array]:
        return self.rows()

    def directly(self, precision: str, batches: Sequence[slice]) -> list[Array]:
        """What the same torch module answers to each of these batches; weights from the launcher's seed."""
        hosted = MODELS[self.model]
        if not hosted.uses_torch:
            return [next(iter(self.inputs.values()))[rows] for rows in batches]
        torch = pytest.importorskip("torch")
        torch_model = importlib.import_module("servebench_servers.models.serving.torch_model")
        torch.manual_seed(7)
        network = importlib.import_module(f"servebench_servers.models.{self.model}.network").build(
            **hosted.options.model_validate(self.options.get("model_options", {})).model_dump()
        )
        if hosted.weights_path is not None:
            network.load_state_dict(torch.load(hosted.weights_path, weights_only=True))
        network = torch_model.in_precision(network.eval(), precision)
        dtype = torch_model.TORCH_DTYPES[precision]
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as the servers' processes do
        answers = []
        with torch.inference_mode():
            for rows in batches:
                tensors = (torch.from_numpy(array[rows]) for array in self.inputs.values())
                output = network(*(one.to(dtype) if one.is_floating_point() else one for one in tensors))
                answers.append(output.float().numpy())
        torch.set_num_threads(threads)
        return answers

    @functools.cached_property
    def _expected(self) -> dict[int, Array]:
        """Of each row by itself, by its number; of the full batch at -1."""
        return dict(zip([*range(self.batch), -1], self.directly(self.precision, [*self.each, slice(self.batch)]), strict=True))

    def expected(self, rows: slice) -> Array:
        """What the module answers to one row or to the full batch."""
        return self._expected[rows.start if rows.stop == rows.start + 1 else -1]

    def check(self, answer: Array, rows: slice, *, alone: bool = True) -> None:
        """``alone``: the rows were a batch of their own."""
        expected = self.expected(rows)
        assert answer.shape == expected.shape
        tolerances = TOLERANCES[self.precision]
        atol = (tolerances.same_batch if alone else tolerances.any_batch) * np.abs(self._expected[-1]).max()
        np.testing.assert_allclose(answer, expected, rtol=0, atol=atol)

    @property
    def launch_options(self) -> dict[str, Any]:
        seed = {"weights_seed": 7} if MODELS[self.model].uses_torch else {}
        return {"device": "cpu", "startup_timeout_s": 120, **seed, **self.options}


def tokens(count: int = FULL_BATCH, length: int = 12) -> dict[str, Array]:
    drawn = samples.questions(count, length, length)
    return {name: np.stack([sample[name] for sample in drawn]) for name in drawn[0]}


def clicks() -> dict[str, Array]:
    drawn = samples.clicks(FULL_BATCH)
    return {name: np.stack([sample[name] for sample in drawn]) for name in drawn[0]}


def heldout() -> dict[str, Array]:
    with np.load(MODELS["digits"].folder / "heldout.npz") as file:
        return {"IMAGE": file["IMAGE"][:FULL_BATCH]}


def echo(width: int) -> Callable[[], dict[str, Array]]:
    return lambda: {"INPUT": samples.echo_rows(width)["INPUT"][:FULL_BATCH]}


SMALL = [
    Case("identity", echo(5)),
    Case("delay", echo(4), {"model_options": {"a_ms": 2, "b_ms": 0.5}}),
    Case("bert", tokens),
]
LARGE = [
    Case("digits", heldout),
    Case("resnet50", lambda: samples.images(FULL_BATCH, 3, 224)),
    Case("dlrm", clicks),
    Case("unet", lambda: samples.images(FULL_BATCH, 1, 188)),
    Case("bert", tokens, {"model_options": {"size": "large"}}),
    Case("resnet50", lambda: samples.images(FULL_BATCH, 3, 224), {"precision": "bf16"}),
    Case("resnet50", lambda: samples.images(SLOW_BATCH, 3, 224), {"precision": "fp16"}, SLOW_BATCH),
    Case("bert", tokens, {"precision": "bf16"}),
    Case("bert", tokens, {"precision": "fp16"}),
    Case("bert", tokens, {"precision": "int8"}),
    Case("dlrm", clicks, {"precision": "bf16"}),
    Case("dlrm", clicks, {"precision": "int8"}),
    Case("unet", lambda: samples.images(FULL_BATCH, 1, 188), {"precision": "bf16"}),
    Case("unet", lambda: samples.images(SLOW_BATCH, 1, 188), {"precision": "fp16"}, SLOW_BATCH),
]


def parameters() -> list[Any]:
    listed = []
    for cases, extra in ((SMALL, [pytest.mark.small_models]), (LARGE, [pytest.mark.models, pytest.mark.timeout(600)])):
        for case in cases:
            words = (str(value) for value in (case.options.get("model_options") or {}).values())
            name = "-".join([case.model, *words, case.precision])
            listed.append(pytest.param(case, marks=extra, id=name))
    return listed


# ---- the cases themselves ------------------------------------------------------------------


def test_every_model_is_asked_in_the_precisions_of_its_profiles() -> None:
    asked = {(case.model, case.precision) for case in SMALL + LARGE}
    assert {model for model, _ in asked} == set(MODELS)
    for name in bundled_profiles():
        profile = load_profile(name)
        if profile.server.launch in ("triton", "torchserve"):
            _, options = launcher_options(profile)
            assert (profile.endpoint.model, options.precision) in asked
    makefile = Path(__file__).parent.parent / "Makefile"
    assert '-m "models or small_models"' in makefile.read_text(encoding="utf-8")


@needs_torch
@pytest.mark.parametrize("case", [one for one in parameters() if one.values[0].precision != "fp32"])
def test_a_precision_is_not_fp32_but_near_it(case: Case) -> None:
    """So the comparisons below would notice a server that computes in another precision."""
    rows = slice(0, case.batch)
    (exact,) = case.directly("fp32", [rows])
    difference = np.abs(case.expected(rows) - exact).max() / np.abs(exact).max()
    tolerances = TOLERANCES[case.precision]
    assert tolerances.same_batch < difference < tolerances.fp32


# ---- Triton --------------------------------------------------------------------------------


def infer(client: Any, module: Any, case: Case, rows: slice, **how: Any) -> Array:
    """One request with tritonclient's HTTP or gRPC client."""
    hosted = MODELS[case.model]
    tensors = []
    for spec in hosted.inputs:
        array = np.ascontiguousarray(case.inputs[spec.name][rows])
        tensors.append(module.InferInput(spec.name, list(array.shape), spec.datatype))
        tensors[-1].set_data_from_numpy(array, **how)
    wanted = [module.InferRequestedOutput(hosted.output.name, **({"binary_data": False} if how else {}))]
    answer: Array = client.infer(case.model, tensors, outputs=wanted).as_numpy(hosted.output.name)
    return answer


def executions(client: Any, model: str, *, rows: int) -> int:
    """How many batches Triton made of ``rows`` rows. It counts them when they are answered, which may be a moment after."""
    deadline_s = time.monotonic() + 10
    while time.monotonic() < deadline_s:
        (statistics,) = client.get_inference_statistics(model)["model_stats"]
        if statistics["inference_count"] == rows:
            count: int = statistics["execution_count"]
            return count
    pytest.fail(f"{statistics['inference_count']} rows were answered, not {rows}")


@needs_torch
@pytest.mark.triton
@pytest.mark.parametrize("case", parameters())
def test_on_triton(case: Case, tmp_path: Path) -> None:
    over_http = pytest.importorskip("tritonclient.http")
    over_grpc = pytest.importorskip("tritonclient.grpc")
    pytest.importorskip("pytriton")
    options = TritonOptions.model_validate(
        {"max_batch_size": case.batch, "dynamic_batching": {"max_queue_delay_us": 200_000}, **case.launch_options}
    )
    server = TritonLauncher().launch(case.model, options, tmp_path)
    try:
        with (
            over_http.InferenceServerClient(urlsplit(server.urls["http"]).netloc, network_timeout=60) as http_client,
            over_grpc.InferenceServerClient(urlsplit(server.urls["grpc"]).netloc) as grpc_client,
        ):
            for rows in (slice(0, 1), slice(0, case.batch)):
                case.check(infer(http_client, over_http, case, rows), rows)
                case.check(infer(http_client, over_http, case, rows, binary_data=False), rows)
                case.check(infer(grpc_client, over_grpc, case, rows), rows)

            with ThreadPoolExecutor(case.batch) as threads:  # grpcio's client is for many threads
                answers = list(threads.map(lambda rows: infer(grpc_client, over_grpc, case, rows), case.each))
            for rows, answer in zip(case.each, answers, strict=True):
                case.check(answer, rows, alone=False)
            # Six requests by themselves, of one row and of a full batch; then some of one row, which Triton joins.
            assert executions(http_client, case.model, rows=3 + 3 * case.batch + case.batch) < 6 + case.batch
    finally:
        server.stop()


@pytest.mark.small_models
@pytest.mark.triton
def test_sequences_of_different_lengths_share_a_batch_on_triton(tmp_path: Path) -> None:
    over_http, over_grpc = pytest.importorskip("tritonclient.http"), pytest.importorskip("tritonclient.grpc")
    pytest.importorskip("pytriton")
    cases = [Case("identity", echo(length)) for length in (3, 9, 17)]
    options = TritonOptions(max_batch_size=len(cases), dynamic_batching=DynamicBatching(max_queue_delay_us=2_000_000))
    server = TritonLauncher().launch("identity", options, tmp_path)
    row = slice(0, 1)
    try:
        with (
            over_grpc.InferenceServerClient(urlsplit(server.urls["grpc"]).netloc) as client,
            ThreadPoolExecutor(len(cases)) as threads,
        ):
            answers = list(threads.map(lambda case: infer(client, over_grpc, case, row), cases))
        with over_http.InferenceServerClient(urlsplit(server.urls["http"]).netloc) as client:
            assert executions(client, "identity", rows=len(cases)) == 1
    finally:
        server.stop()
    for case, answer in zip(cases, answers, strict=True):
        case.check(answer, row)


@needs_torch
@pytest.mark.models
@pytest.mark.triton
def test_triton_answers_what_a_model_refuses_with_the_reason(tmp_path: Path) -> None:
    module, utils = pytest.importorskip("tritonclient.grpc"), pytest.importorskip("tritonclient.utils")
    pytest.importorskip("pytriton")
    server = TritonLauncher().launch("bert", TritonOptions(device="cpu", weights_seed=7), tmp_path)
    try:
        with (
            module.InferenceServerClient(urlsplit(server.urls["grpc"]).netloc) as client,
            pytest.raises(utils.InferenceServerException, match="513 tokens, at most 512 are possible"),
        ):
            infer(client, module, Case("bert", functools.partial(tokens, 1, 513)), slice(0, 1))
    finally:
        server.stop()


# ---- TorchServe ----------------------------------------------------------------------------


@dataclass(frozen=True)
class TorchServeClient:
    """Every form of request, with the standard library and grpcio."""

    server: RunningServer
    case: Case
    FORMS: ClassVar = ("raw", "multipart", "instances", "inputs", "grpc", "grpc_by_name")

    def ask(self, form: str, rows: slice) -> Array:
        arrays = {name: np.ascontiguousarray(array[rows]) for name, array in self.case.inputs.items()}
        reply = getattr(self, form)(arrays)
        shape = self.case.expected(rows).shape
        if isinstance(reply, bytes):
            return np.frombuffer(reply, "<f4").reshape(shape)
        return np.array(reply, np.float32).reshape(shape)

    def post(self, path: str, body: bytes, content_type: str) -> bytes:
        connection = http.client.HTTPConnection(urlsplit(self.server.urls["http"]).netloc, timeout=120)
        try:
            connection.request("POST", path, body, {"Content-Type": content_type})
            response = connection.getresponse()
            reply = response.read()
            assert response.status == 200, reply[:300]
            return reply
        finally:
            connection.close()

    def raw(self, arrays: Mapping[str, Array]) -> bytes:
        body = b"".join(array.tobytes() for array in arrays.values())
        return self.post(f"/predictions/{self.case.model}", body, "application/octet-stream")

    def multipart(self, arrays: Mapping[str, Array]) -> bytes:
        parts = [
            f'--b\r\nContent-Disposition: form-data; name="{name}"; filename="f"\r\n\r\n'.encode() + array.tobytes() + b"\r\n"
            for name, array in arrays.items()
        ]
        return self.post(f"/predictions/{self.case.model}", b"".join(parts) + b"--b--\r\n", "multipart/form-data; boundary=b")

    def instances(self, arrays: Mapping[str, Array]) -> Any:
        rows: list[Any]
        if len(arrays) == 1:
            rows = next(iter(arrays.values())).tolist()
        else:
            count = len(next(iter(arrays.values())))
            rows = [{name: array[row].tolist() for name, array in arrays.items()} for row in range(count)]
        reply = self.post(f"/v1/models/{self.case.model}:predict", json.dumps({"instances": rows}).encode(), "application/json")
        return json.loads(reply)["predictions"]

    def inputs(self, arrays: Mapping[str, Array]) -> Any:
        tensors = [
            {"name": spec.name, "datatype": spec.datatype, "shape": list(array.shape), "data": array.ravel().tolist()}
            for spec, array in zip(MODELS[self.case.model].inputs, arrays.values(), strict=True)
        ]
        reply = self.post(f"/v2/models/{self.case.model}/infer", json.dumps({"inputs": tensors}).encode(), "application/json")
        (output,) = json.loads(reply)["outputs"]
        assert output["name"] == MODELS[self.case.model].output.name
        return np.array(output["data"]).reshape(output["shape"])

    def grpc(self, arrays: Mapping[str, Array]) -> bytes:
        return self._predictions({"data": b"".join(array.tobytes() for array in arrays.values())})

    def grpc_by_name(self, arrays: Mapping[str, Array]) -> bytes:
        return self._predictions({name: array.tobytes() for name, array in arrays.items()})

    def _predictions(self, content: dict[str, bytes]) -> bytes:
        grpc = pytest.importorskip("grpc")
        request = TORCHSERVE.PredictionsRequest(model_name=self.case.model, input=content)
        with grpc.insecure_channel(urlsplit(self.server.urls["grpc"]).netloc) as channel:
            call = channel.unary_unary(
                f"/{TORCHSERVE_SERVICE}/Predictions",
                TORCHSERVE.PredictionsRequest.SerializeToString,
                TORCHSERVE.PredictionResponse.FromString,
            )
            prediction: bytes = call(request, timeout=120).prediction
            return prediction


@needs_torch
@pytest.mark.torchserve
@pytest.mark.parametrize("case", parameters())
def test_on_torchserve(case: Case, tmp_path: Path) -> None:
    pytest.importorskip("ts")
    options = TorchServeOptions.model_validate({"batch_size": case.batch, "max_batch_delay_ms": 100, **case.launch_options})
    server = TorchServeLauncher().launch(case.model, options, tmp_path)
    try:
        client = TorchServeClient(server, case)
        # Bytes alone do not say how many rows they are where a model leaves sizes open.
        open_sizes = any(-1 in spec.dims for spec in MODELS[case.model].inputs)
        for form in client.FORMS:
            case.check(client.ask(form, slice(0, 1)), slice(0, 1))
            if not open_sizes or form in ("instances", "inputs"):
                case.check(client.ask(form, slice(0, case.batch)), slice(0, case.batch))
        with ThreadPoolExecutor(case.batch) as threads:  # that is what TorchServe joins
            answers = list(threads.map(lambda rows: client.ask("raw", rows), case.each))
        for rows, answer in zip(case.each, answers, strict=True):
            case.check(answer, rows, alone=False)
    finally:
        server.stop()
