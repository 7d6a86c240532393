"""The digits model: what ships is scikit-learn's data and a network that reads it, and the command makes it again."""

from __future__ import annotations

import importlib
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray
from servebench_servers.models import MODELS
from servebench_servers.models.digits import DIGITS, SEED
from servebench_servers.models.hosted import Settings

torch = pytest.importorskip("torch")
datasets = pytest.importorskip("sklearn.datasets")
network = importlib.import_module("servebench_servers.models.digits.network")
torch_model = importlib.import_module("servebench_servers.models.serving.torch_model")
train = importlib.import_module("servebench_servers.models.digits.train")


def shipped(name: str) -> dict[str, NDArray[Any]]:
    with np.load(DIGITS.folder / name, allow_pickle=False) as file:
        return dict(file)


IMAGES = shipped("heldout.npz")["IMAGE"]
GOLDEN = shipped("golden.npz")["LOGITS"]
LABELS = shipped("labels.npz")["LABEL"]


def loaded(path: Path) -> Any:
    settings = Settings("digits", DIGITS.inputs, DIGITS.output, uses_torch=True, pads=False, weights=path.name)
    return torch_model.load_network(network.build, settings, path.parent)


@pytest.fixture(autouse=True)
def torch_settings() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    if torch.are_deterministic_algorithms_enabled():  # by the training command
        torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


def test_shipped_arrays_are_what_profiles_expect() -> None:
    assert list(shipped("heldout.npz")) == ["IMAGE"]
    assert list(shipped("golden.npz")) == ["LOGITS"]
    assert (IMAGES.shape, IMAGES.dtype) == ((360, *DIGITS.inputs[0].dims), np.float32)
    assert (GOLDEN.shape, GOLDEN.dtype) == ((360, *DIGITS.output.dims), np.float32)
    assert (LABELS.shape, LABELS.dtype) == ((360,), np.int64)
    assert MODELS["digits"] is DIGITS
    assert DIGITS.weights_path is not None and DIGITS.weights_path.stat().st_size < 500_000


def test_held_out_images_are_scikit_learns_with_their_labels() -> None:
    digits = datasets.load_digits()
    known = {image.tobytes(): int(label) for image, label in zip(digits.images, digits.target, strict=True)}
    for image, label in zip(IMAGES, LABELS, strict=True):
        assert known[(image[0] * 16.0).astype(np.float64).tobytes()] == label
    assert IMAGES.min() >= 0.0 and IMAGES.max() == 1.0
    share = Counter(digits.target.tolist())
    for digit, count in Counter(LABELS.tolist()).items():  # stratified: each digit in proportion
        assert abs(count - share[digit] * 360 / 1797) < 1


def test_split_loses_and_repeats_no_image() -> None:
    split = train.split_digits(SEED)
    assert len(split.train_images) == 1437
    both = np.concatenate([split.train_images, split.heldout_images]).reshape(1797, 64)
    everything = (datasets.load_digits().data / 16).astype(np.float32)
    assert Counter(row.tobytes() for row in both) == Counter(row.tobytes() for row in everything)
    np.testing.assert_array_equal(split.heldout_images, IMAGES)
    assert not np.array_equal(train.split_digits(SEED + 1).heldout_labels, LABELS)


def test_shipped_weights_give_the_golden_logits_and_read_digits() -> None:
    with torch.inference_mode():
        logits = loaded(DIGITS.weights_path)(torch.from_numpy(IMAGES)).numpy()
    np.testing.assert_allclose(logits, GOLDEN, rtol=1e-3, atol=1e-4)
    assert (logits.argmax(axis=1) == LABELS).mean() > 0.97


def test_the_training_command_makes_such_a_network_again(tmp_path: Path) -> None:
    result = CliRunner().invoke(train.main, ["--out", str(tmp_path)], catch_exceptions=False)
    assert result.exit_code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["golden.npz", "heldout.npz", "labels.npz", "weights.pt"]
    with np.load(tmp_path / "heldout.npz") as file:
        np.testing.assert_array_equal(file["IMAGE"], IMAGES)
    with torch.inference_mode():
        logits = loaded(tmp_path / "weights.pt")(torch.from_numpy(IMAGES)).numpy()
    share = (logits.argmax(axis=1) == LABELS).mean()
    assert share > 0.97
    assert f"{share:.2%} of 360" in result.output


class Harmful:
    """Unpickling this would make a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


def test_weights_of_something_else_are_refused_and_never_executed(tmp_path: Path) -> None:
    path, harm = tmp_path / "weights.pt", tmp_path / "harm"
    for content in (b"", b"not weights", DIGITS.weights_path.read_bytes()[:1000]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"weights\.pt does not hold the digits network's weights"):
            loaded(path)
    for value in (torch.nn.Linear(2, 2).state_dict(), [1, 2], Harmful(harm)):
        torch.save(value, path)
        with pytest.raises(ValueError, match="does not hold the digits"):
            loaded(path)
    assert not harm.exists()
