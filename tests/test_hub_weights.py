"""Weights out of the hub cache: found where the cache's documentation says, read as the formats' say, mapped, or refused."""

from __future__ import annotations

import hashlib
import importlib
import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from servebench_servers.models.hosted import Settings
from servebench_servers.models.hub import cache_folder, find_weights
from servebench_servers.models.options import HostingOptions, prepare

from servebench.errors import LaunchError, ProfileError

torch = pytest.importorskip("torch")
torch_model = importlib.import_module("servebench_servers.models.serving.torch_model")
read_safetensors = importlib.import_module("servebench_servers.models.serving.safetensors").read_safetensors
bert, resnet50 = (importlib.import_module(f"servebench_servers.models.{name}.network") for name in ("bert", "resnet50"))

COMMIT = "6da4b6a26a1877e173fca3225479512db81a5e5b"
OTHER_COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cached(cache: Path, files: dict[str, bytes], *, commit: str = COMMIT, ref: str | None = "main") -> Path:
    """A repository in the documented layout: contents under blobs, links to them in the commit's snapshot, a ref."""
    folder = cache / "models--google-bert--bert-base-uncased"
    snapshot = folder / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (folder / "blobs").mkdir(exist_ok=True)
    for name, content in files.items():
        blob = folder / "blobs" / hashlib.sha256(content).hexdigest()
        blob.write_bytes(content)
        (snapshot / name).symlink_to(Path("..", "..", "blobs", blob.name))
    if ref is not None:
        (folder / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
        (folder / "refs" / ref).write_text(commit)
    return snapshot


# ---- where the cache is, and what is in it -------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        pytest.param({}, "/home/me/.cache/huggingface/hub", id="nothing set"),
        pytest.param({"XDG_CACHE_HOME": "/x"}, "/x/huggingface/hub", id="the desktop's variable"),
        pytest.param({"XDG_CACHE_HOME": "/x", "HF_HOME": "~/hf"}, "/home/me/hf/hub", id="its own home"),
        pytest.param({"HF_HOME": "/hf", "HF_HUB_CACHE": "/hub"}, "/hub", id="the cache alone"),
        pytest.param({"HF_HOME": "/hf", "HUGGINGFACE_HUB_CACHE": "/old"}, "/old", id="its former name"),
        pytest.param({"HUGGINGFACE_HUB_CACHE": "/old", "HF_HUB_CACHE": "$HOME/new"}, "/home/me/new", id="both names"),
    ],
)
def test_the_cache_is_where_the_variables_say(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], folder: str
) -> None:
    """As "Environment variables" in huggingface_hub's reference has it."""
    monkeypatch.setenv("HOME", "/home/me")
    assert str(cache_folder(environment)) == folder


def test_a_revision_is_followed_to_its_commit(tmp_path: Path) -> None:
    cached(tmp_path, {"model.safetensors": b"main's", "pytorch_model.bin": b"not preferred"})
    cached(tmp_path, {"pytorch_model.bin": b"the pull request's"}, commit=OTHER_COMMIT, ref="refs/pr/7")
    environment = {"HF_HUB_CACHE": str(tmp_path)}

    def found(name: str) -> tuple[str, bytes]:
        weights = find_weights(f"google-bert/bert-base-uncased{name}", environment)
        return weights.origin, weights.path.read_bytes()

    main = f"hub cache, google-bert/bert-base-uncased@main, commit {COMMIT}, model.safetensors"
    assert found("") == found("@main") == (main, b"main's")
    assert found("@refs/pr/7")[1] == b"the pull request's"
    origin, content = found(f"@{OTHER_COMMIT}")
    assert content == b"the pull request's" and origin.endswith(f"commit {OTHER_COMMIT}, pytorch_model.bin")


def absent(name: str, cache: Path) -> str:
    with pytest.raises(LaunchError) as caught:
        find_weights(name, {"HF_HUB_CACHE": str(cache)})
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_not_in_the_cache_comes_with_the_folder_and_the_command(tmp_path: Path) -> None:
    folder = tmp_path / "models--google-bert--bert-base-uncased"
    text = absent("google-bert/bert-base-uncased", tmp_path)
    assert f"google-bert/bert-base-uncased@main is in {folder};" in text
    assert text.endswith(": hf download google-bert/bert-base-uncased model.safetensors")
    text = absent("google-bert/bert-base-uncased@v2", tmp_path)
    assert text.endswith(": hf download google-bert/bert-base-uncased model.safetensors --revision v2")
    assert "models--gpt2" in absent("gpt2", tmp_path)


def test_a_revision_that_was_not_fetched_is_not_replaced_by_another(tmp_path: Path) -> None:
    snapshot = cached(tmp_path, {"model.safetensors": b"main's"})
    assert "bert-base-uncased@v2 is in" in absent("google-bert/bert-base-uncased@v2", tmp_path)
    (snapshot / "model.safetensors").resolve().unlink()  # an interrupted clean-up: the link leads nowhere
    assert "hf download" in absent("google-bert/bert-base-uncased", tmp_path)


def test_weights_in_several_files_are_refused(tmp_path: Path) -> None:
    snapshot = cached(tmp_path, {"model.safetensors.index.json": b"{}", "model-00001-of-00002.safetensors": b""})
    text = absent("google-bert/bert-base-uncased", tmp_path)
    assert f"keeps model.safetensors in several files ({snapshot})" in text


@pytest.mark.parametrize("name", ["", "a/b/c", "/etc/passwd", "../x", "a/..", "a/b@", "a/b@../../x", "a b", "hub:a/b"])
def test_names_that_no_repository_has(name: str) -> None:
    with pytest.raises(ValidationError, match="expected ORGANISATION/NAME or ORGANISATION/NAME@REVISION"):
        HostingOptions(weights_hub=name)


def test_weights_have_one_origin(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="not from both"):
        HostingOptions(weights_hub="a/b", weights=__file__)
    with pytest.raises(ProfileError, match="weights_hub: delay has none"):
        prepare("delay", HostingOptions(weights_hub="a/b"), server="X")


@pytest.mark.parametrize(("file", "name"), [("model.safetensors", "weights.safetensors"), ("pytorch_model.bin", "weights.pt")])
def test_the_report_names_repository_commit_and_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, name: str
) -> None:
    cached(tmp_path, {file: b"content"})
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    options = HostingOptions(device="cpu", weights_hub="google-bert/bert-base-uncased")
    hosting = prepare("bert", options, server="X")
    assert hosting.facts(processes=1, cpus=1)["weights"] == {
        "origin": f"hub cache, google-bert/bert-base-uncased@main, commit {COMMIT}, {file}",
        "sha256": hashlib.sha256(b"content").hexdigest(),
    }
    assert hosting.settings.weights == name
    assert hosting.weights is not None and hosting.weights.read_bytes() == b"content"


# ---- safetensors ---------------------------------------------------------------------------


def safetensors(tensors: dict[str, tuple[str, list[int], bytes]], *, trailing: bytes = b"") -> bytes:
    """A file as the format's page lays it out: header length, header, bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data + trailing


def of_state(state: dict[str, Any]) -> bytes:
    kinds = {torch.float32: "F32", torch.int64: "I64"}
    return safetensors(
        {name: (kinds[tensor.dtype], list(tensor.shape), tensor.numpy().tobytes()) for name, tensor in state.items()}
    )


def test_safetensors_of_every_type_and_shape(tmp_path: Path) -> None:
    matrix = struct.pack("<6f", 1.5, -2, 3, 4, 5, 6)
    path = tmp_path / "x.safetensors"
    path.write_bytes(
        safetensors(
            {
                "odd": ("U8", [1], b"\x07"),  # what follows lies at odd addresses
                "matrix": ("F32", [2, 3], matrix),
                "scalar": ("I64", [], struct.pack("<q", -(2**40))),
                "none": ("F16", [0, 4], b""),
                "halves": ("F16", [2], struct.pack("<2e", 0.5, -1.25)),
                "brain": ("BF16", [1], b"\xc0\x3f"),  # 0x3fc0: the upper half of the float 1.5
                "double": ("F64", [1], struct.pack("<d", 0.1)),
                "ints": ("I32", [2], struct.pack("<2i", 1, -1)),
                "shorts": ("I16", [1], struct.pack("<h", -300)),
                "bytes": ("I8", [1], b"\xff"),
                "truths": ("BOOL", [2], b"\x00\x01"),
            }
        )
    )
    read = read_safetensors(path)
    assert list(read) == [
        *("odd", "matrix", "scalar", "none", "halves", "brain"),
        *("double", "ints", "shorts", "bytes", "truths"),
    ]
    assert read["matrix"].tolist() == [[1.5, -2, 3], [4, 5, 6]] and read["matrix"].dtype == torch.float32
    assert read["scalar"].shape == () and read["scalar"].item() == -(2**40)
    assert read["none"].shape == (0, 4) and read["none"].dtype == torch.float16
    assert (read["halves"].tolist(), read["brain"].tolist(), read["double"].tolist()) == ([0.5, -1.25], [1.5], [0.1])
    assert (read["ints"].tolist(), read["shorts"].tolist(), read["bytes"].tolist()) == ([1, -1], [-300], [-1])
    assert (read["odd"].tolist(), read["truths"].tolist()) == ([7], [False, True])
    content = path.read_bytes()
    read["matrix"].zero_()
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        pytest.param(safetensors({"a": ("F32", [2], b"\0" * 8)})[:-1], "a of shape .* bytes 0 to 8 of 7", id="cut off"),
        pytest.param(safetensors({"a": ("F32", [3], b"\0" * 8)}), "a of shape", id="too few bytes for the shape"),
        pytest.param(safetensors({"a": ("F8_E4M3", [1], b"\0")}), "a has dtype F8_E4M3; known: F64", id="another type"),
        pytest.param(struct.pack("<Q", 100) + b"{}", "header ends at byte 108, the file at 10", id="a header cut off"),
        pytest.param(b"\x80\x02}q\x00.", "header ends at byte", id="no such file"),
        pytest.param(b"", "empty", id="nothing"),
        pytest.param(struct.pack("<Q", 5) + b"[1,2]", "AttributeError", id="another document"),
    ],
)
def test_safetensors_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "weights.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=rf"weights\.safetensors does not hold the bert network's weights \(.*{reason}"):
        torch_model.load_network(small_bert, bert_settings("weights.safetensors"), tmp_path)


# ---- published names -----------------------------------------------------------------------


def small_bert() -> Any:
    return bert.BertForQuestionAnswering(1, 48, 4)


def bert_settings(weights: str) -> Settings:
    return replace(prepare("bert", HostingOptions(device="cpu"), server="X").settings, weights=weights, options={})


def as_published_bert(state: dict[str, Any]) -> dict[str, Any]:
    """As in google-bert's own files, converted from TensorFlow in 2018: norms have gamma and beta, and there is a pooler."""
    renamed = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in state.items()
    }
    return renamed | {"bert.pooler.dense.weight": torch.zeros(48, 48), "bert.embeddings.position_ids": torch.arange(512)}


@pytest.mark.parametrize("file", ["weights.safetensors", "weights.pt"])
def test_bert_of_either_format_answers_as_the_network_it_came_from(tmp_path: Path, file: str) -> None:
    torch.manual_seed(4)
    network = small_bert().eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    state = as_published_bert(network.state_dict())
    assert "bert.encoder.layer.0.attention.output.LayerNorm.gamma" in state
    if file.endswith(".pt"):
        torch.save(state, tmp_path / file)
    else:
        (tmp_path / file).write_bytes(of_state(state))
    loaded = torch_model.load_network(small_bert, bert_settings(file), tmp_path)
    ids, ones = torch.arange(1000, 1014).reshape(2, 7), torch.ones(2, 7, dtype=torch.int64)
    with torch.inference_mode():
        assert torch.equal(loaded(ids, ones, ones), network(ids, ones, ones))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(
            lambda state: (
                {name: tensor for name, tensor in state.items() if not name.startswith("qa_outputs")}
                | {"cls.predictions.bias": torch.zeros(3), "cls.seq_relationship.bias": torch.zeros(2)}
            ),
            ": missing qa_outputs.bias and 1 more; unexpected cls.predictions.bias and 1 more",
            id="a network with another head",
        ),
        pytest.param(
            lambda state: state | {"bert.embeddings.word_embeddings.weight": torch.zeros(28_996, 48)},
            ": found bert.embeddings.word_embeddings.weight of shape [28996, 48], not [30522, 48]",
            id="another vocabulary",
        ),
        pytest.param(lambda state: {}, ": missing bert.embeddings.LayerNorm.bias and 22 more", id="nothing"),
    ],
)
def test_weights_of_another_network_are_named(tmp_path: Path, change: Any, message: str) -> None:
    (tmp_path / "weights.safetensors").write_bytes(of_state(change(small_bert().state_dict())))
    with pytest.raises(ValueError) as caught:
        torch_model.load_network(small_bert, bert_settings("weights.safetensors"), tmp_path)
    assert str(caught.value) == f"weights.safetensors does not hold the bert network's weights{message}"


def test_a_checkpoint_of_a_training_is_no_state_dict(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "state_dict": small_bert().state_dict()}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"network's weights \(epoch is no tensor but int\)"):
        torch_model.load_network(small_bert, bert_settings("weights.pt"), tmp_path)


def transformers_names() -> list[str]:
    """Those of ResNetForImageClassification (microsoft/resnet-50), in the order of the layers."""

    def unit(prefix: str) -> list[str]:
        of_norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        return [f"{prefix}.convolution.weight", *(f"{prefix}.normalization.{which}" for which in of_norm)]

    names = unit("resnet.embedder.embedder")
    for stage, blocks in enumerate((3, 4, 6, 3)):
        for block in range(blocks):
            place = f"resnet.encoder.stages.{stage}.layers.{block}"
            names += [name for layer in range(3) for name in unit(f"{place}.layer.{layer}")]
            names += unit(f"{place}.shortcut") if block == 0 else []
    return [*names, "classifier.1.weight", "classifier.1.bias"]


def torchvision_names() -> list[str]:
    """Of the same tensors in the same order: those of torchvision's resnet50."""
    of_norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    names = ["conv1.weight", *(f"bn1.{which}" for which in of_norm)]
    for stage, blocks in enumerate((3, 4, 6, 3), start=1):
        for block in range(blocks):
            place = f"layer{stage}.{block}"
            for number in (1, 2, 3):
                names += [f"{place}.conv{number}.weight", *(f"{place}.bn{number}.{which}" for which in of_norm)]
            if block == 0:
                names += [f"{place}.downsample.0.weight", *(f"{place}.downsample.1.{which}" for which in of_norm)]
    return [*names, "fc.weight", "fc.bias"]


@pytest.mark.models
def test_resnet50_of_transformers_is_torchvisions(tmp_path: Path) -> None:
    with torch.device("meta"):
        own = resnet50.build().state_dict()
    assert [resnet50.ResNet50.rename_weight(name) for name in transformers_names()] == torchvision_names()
    assert [resnet50.ResNet50.rename_weight(name) for name in torchvision_names()] == torchvision_names()
    assert set(torchvision_names()) == set(own)


@pytest.mark.models
def test_resnet50_with_transformers_names_answers_as_the_network_it_came_from(tmp_path: Path) -> None:
    torch.manual_seed(6)
    network = resnet50.build().eval()
    for name, buffer in network.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 1.5)
    ours = network.state_dict()
    published = dict(zip(transformers_names(), (ours[name] for name in torchvision_names()), strict=True))
    counts = [name for name in published if name.endswith("num_batches_tracked")]
    del published[counts[0]]  # files of before 2018 have no counts
    (tmp_path / "weights.safetensors").write_bytes(of_state(published))
    settings = replace(prepare("resnet50", HostingOptions(device="cpu"), server="X").settings, weights="weights.safetensors")
    loaded = torch_model.load_network(resnet50.build, settings, tmp_path)
    image = torch.from_numpy(np.random.default_rng(1).random((1, 3, 64, 64), np.float32))
    with torch.inference_mode():
        assert torch.equal(loaded(image), network(image))
