"""Which devices a name means, on machines that this one is not: the mapping is a function of what is there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from servebench_servers import devices
from servebench_servers.devices import ACCELERATORS, InstanceGroup, Inventory, check_precision, choose, detect, place
from servebench_servers.models import MODELS
from servebench_servers.models.options import HostingOptions, prepare

from servebench.errors import LaunchError, ProfileError

TORCH = "torch 9.9"


def machine(**counts: int) -> Inventory:
    return Inventory(counts, TORCH)


@pytest.mark.parametrize(
    ("name", "present", "label", "torch_names", "groups", "torchserve"),
    [
        pytest.param(
            "cpu", machine(cuda=2), "cpu", ("cpu",), [("KIND_CPU", ())], ("cpu", ()), id="cpu, though there is better"
        ),
        pytest.param("auto", machine(), "cpu", ("cpu",), [("KIND_CPU", ())], ("cpu", ()), id="auto without accelerators"),
        pytest.param(
            "auto",
            machine(cuda=2, mps=1),
            "cuda:0,1",
            ("cuda:0", "cuda:1"),
            [("KIND_GPU", (0, 1))],
            ("gpu", (0, 1)),
            id="auto takes all GPUs",
        ),
        pytest.param(
            "cuda:3,1",
            machine(cuda=4),
            "cuda:3,1",
            ("cuda:3", "cuda:1"),
            [("KIND_GPU", (3, 1))],
            ("gpu", (3, 1)),
            id="some GPUs",
        ),
        # torch calls AMD's GPUs cuda, too; Triton does not know them.
        pytest.param(
            "rocm",
            machine(rocm=2),
            "rocm:0,1",
            ("cuda:0", "cuda:1"),
            [("KIND_MODEL", ())] * 2,
            ("gpu", (0, 1)),
            id="AMD",
        ),
        pytest.param("xpu:1", machine(xpu=2), "xpu:1", ("xpu:1",), [("KIND_MODEL", ())], ("gpu", (1,)), id="Intel"),
        pytest.param("auto", machine(hpu=2), "hpu", ("hpu",) * 2, [("KIND_MODEL", ())] * 2, ("cpu", ()), id="Gaudi"),
        pytest.param("neuron", machine(neuron=1), "neuron", ("xla",), [("KIND_MODEL", ())], ("cpu", ()), id="Neuron"),
        pytest.param("mps", machine(mps=1), "mps", ("mps",), [("KIND_MODEL", ())], ("gpu", (0,)), id="Apple"),
    ],
)
def test_names_of_a_device(
    name: str,
    present: Inventory,
    label: str,
    torch_names: tuple[str, ...],
    groups: list[tuple[str, tuple[int, ...]]],
    torchserve: tuple[str, tuple[int, ...]],
) -> None:
    placement = choose(name, present)
    assert placement.label == label
    assert placement.torch_devices == torch_names
    assert placement.instance_groups == tuple(InstanceGroup(kind, gpus) for kind, gpus in groups)
    assert (placement.torchserve_device_type, placement.torchserve_device_ids) == torchserve
    assert placement.count == len(torch_names)


def test_auto_says_what_it_chose_and_why() -> None:
    assert choose("auto", machine()).reason == "auto: torch 9.9 sees no accelerator"
    assert choose("auto", machine(cuda=2)).reason == "auto: torch 9.9 sees 2 cuda"


@pytest.mark.parametrize(
    ("name", "present", "message"),
    [
        pytest.param("cuda", machine(), "there is no cuda device; torch 9.9 sees no accelerator", id="no GPU"),
        pytest.param("cuda:0,2", machine(cuda=2), "there is no cuda:2; torch 9.9 sees 2 cuda", id="one too many"),
        pytest.param("rocm", machine(cuda=1), "there is no rocm device; torch 9.9 sees 1 cuda", id="of another make"),
        pytest.param("hpu", machine(), "no hpu device", id="no Gaudi"),
    ],
)
def test_devices_that_are_not_there_are_refused(name: str, present: Inventory, message: str) -> None:
    with pytest.raises(LaunchError, match=message):
        choose(name, present)


@pytest.mark.parametrize(
    "name", ["", "gpu", "CUDA", "cuda:", "cuda:-1", "cuda:0,", "cuda:0,0", "cuda:٣", "cpu:0", "hpu:1", "mps:0"]
)
def test_words_that_are_no_device_are_refused_as_input(name: str) -> None:
    with pytest.raises(ValidationError, match="allowed: auto, cpu, cuda"):
        HostingOptions(device=name)


@pytest.mark.parametrize(
    ("precision", "kind", "allowed"),
    [
        pytest.param("fp32", "neuron", True, id="fp32 is everywhere"),
        pytest.param("int8", "cpu", True, id="int8 on a CPU"),
        pytest.param("int8", "cuda", False, id="torch has no dynamic int8 on GPUs"),
        pytest.param("fp16", "cuda", True, id="fp16 on a GPU"),
        pytest.param("fp16", "hpu", False, id="Gaudi computes in bf16"),
    ],
)
def test_precisions_of_a_device(precision: str, kind: str, allowed: bool) -> None:
    if allowed:
        check_precision(precision, kind)
    else:
        with pytest.raises(LaunchError, match=f"precision: {kind} has no {precision} here; it has fp32, "):
            check_precision(precision, kind)


@pytest.fixture
def fresh() -> Any:
    detect.cache_clear()
    yield
    detect.cache_clear()


def test_a_torch_without_accelerators_is_not_asked(monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
    monkeypatch.setattr(devices, "installed_version", lambda name: "2.13.0+cpu")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: pytest.fail("asked"))
    assert place("auto").reason == "auto: torch 2.13.0+cpu sees no accelerator"


def test_no_torch_is_a_launch_error(monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
    monkeypatch.setattr(devices, "installed_version", lambda name: None)
    with pytest.raises(
        LaunchError, match=r"torch, which is not installed.*'servebench\[triton\]' or 'servebench\[torchserve\]'"
    ):
        place("auto")
    assert place("cpu").label == "cpu"  # whoever hosts will notice


def test_torch_is_asked_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch, fresh: None, tmp_path: Path) -> None:
    """A torch that is played: two GPUs of AMD, noise on stdout."""
    (tmp_path / "torch.py").write_text(
        "import types\nprint('noise')\nversion = types.SimpleNamespace(hip='6.0')\n"
        "cuda = types.SimpleNamespace(device_count=lambda: 2)\nxpu = types.SimpleNamespace(device_count=lambda: 0)\n"
        "backends = types.SimpleNamespace(mps=types.SimpleNamespace(is_available=lambda: False))\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(devices, "installed_version", lambda name: "2.13.0+rocm6")
    assert {kind: count for kind, count in detect().counts.items() if count} == {"rocm": 2}
    assert set(detect().counts) == set(ACCELERATORS)


def test_the_installed_torch_answers(monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(devices, "installed_version", lambda name: "2.13.0")
    assert detect().counts["cuda"] == (torch.cuda.device_count() if torch.version.hip is None else 0)
    assert "torch" in sys.modules  # here, for the comparison only


def test_a_torch_that_fails_is_named(monkeypatch: pytest.MonkeyPatch, fresh: None, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.12: cannot open shared object file')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(devices, "installed_version", lambda name: "2.13.0")
    with pytest.raises(LaunchError, match=r"torch 2.13.0 cannot say which devices there are: .*libcudart.so.12"):
        detect()


# ---- what a launcher refuses before anything starts ------------------------------------------


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        pytest.param(
            "resnet", {}, "no model called 'resnet' to host on X; known: bert, delay, digits, dlrm", id="unknown model"
        ),
        pytest.param(
            "delay", {"device": "cuda"}, "delay computes nothing, so it has no use for 'cuda'", id="a GPU for nothing"
        ),
        pytest.param("delay", {"weights": __file__}, "weights: delay has none", id="weights for nothing"),
        pytest.param(
            "delay", {"precision": "fp16"}, "precision: delay has no fp16; it has fp32", id="a precision the model has not"
        ),
        pytest.param(
            "unet", {"precision": "int8"}, "precision: unet has no int8; it has fp32, bf16, fp16", id="no linear layers"
        ),
        pytest.param(
            "bert",
            {"device": "cuda", "precision": "int8"},
            "precision: cuda has no int8 here; it has fp32, bf16, fp16",
            id="int8 on a GPU",
        ),
        pytest.param("bert", {"device": "xpu:0"}, "device: there is no xpu:0; ", id="a device that is not there"),
        pytest.param(
            "delay",
            {"model_options": {"a_ms": -1}},
            "model_options.a_ms: Input should be greater than or equal to 0, found -1; options of delay: a_ms, b_ms",
            id="a negative time",
        ),
        pytest.param(
            "bert",
            {"model_options": {"size": "huge"}},
            "model_options.size: .*'base' or 'large', found 'huge'; options of bert: size",
            id="an unknown size",
        ),
        pytest.param(
            "resnet50",
            {"model_options": {"depth": 18}},
            "model_options.depth: .*; options of resnet50: none",
            id="an unknown option",
        ),
    ],
)
def test_what_cannot_be_hosted_is_refused(
    monkeypatch: pytest.MonkeyPatch, model: str, options: dict[str, Any], message: str
) -> None:
    counts = {"cuda": 1}
    monkeypatch.setattr("servebench_servers.devices.detect", lambda: Inventory(counts, TORCH))
    with pytest.raises((LaunchError, ProfileError), match=message) as caught:
        prepare(model, HostingOptions(**options), server="X")
    assert "\n" not in str(caught.value)


def test_several_devices_reach_the_servers_configurations(monkeypatch: pytest.MonkeyPatch) -> None:
    from servebench_servers import torchserve, triton

    monkeypatch.setattr("servebench_servers.devices.detect", lambda: Inventory({"cuda": 4}, TORCH))
    for_triton = triton.TritonOptions(device="cuda:1,3", instance_count=2)
    hosting = prepare("resnet50", for_triton, server="X")
    config = triton.model_config(hosting, for_triton)
    assert "instance_group { kind: KIND_GPU count: 2 gpus: [1, 3] }" in config.render()
    assert config.instance_count == 4
    assert hosting.settings.devices == ("cuda:1", "cuda:3")

    for_torchserve = torchserve.TorchServeOptions(device="cuda:1,3", workers=2)
    rendered = torchserve.model_config(prepare("resnet50", for_torchserve, server="X"), for_torchserve)
    text = rendered.render_model_config()
    assert "deviceType: gpu\ndeviceIds:\n- 1\n- 3\n" in text and "minWorkers: 4\n" in text
    ports = dict.fromkeys(torchserve.ENDPOINTS, 1)
    assert "number_of_gpu=4\n" in rendered.render_properties(ports)


def test_facts_name_the_device_the_weights_and_the_threads() -> None:
    facts = prepare("bert", HostingOptions(device="cpu", torch_threads=2, weights_seed=7), server="X").facts(
        processes=3, cpus=4
    )
    assert (facts["device"], facts["device_reason"], facts["precision"]) == ("cpu", "asked for", "fp32")
    assert facts["threads"] == {"processes": 3, "each": 2, "total": 6, "cpus": 4}
    assert facts["weights"]["origin"] == "random, seed 7" and facts["weights"]["sha256"] is None
    assert facts["model_options"] == {"size": "base"}
    assert [one["name"] for one in facts["inputs"]] == [spec.name for spec in MODELS["bert"].inputs]
    assert facts["outputs"] == [{"name": "LOGITS", "datatype": "FP32", "shape": [-1, -1, 2]}]
    assert "weights" not in prepare("delay", HostingOptions(), server="X").facts(processes=1, cpus=2)
