"""Trains the digits network and writes what ships: ``python -m servebench_servers.models.digits.train``.

Deterministic: one seed fixes the split, the initial weights and the order of the images, and
torch runs on one thread with deterministic algorithms, so the same torch build on the same kind
of CPU gives the same bytes. Needs the ``train`` extra (torch, scikit-learn); serving does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

from . import DIGITS, IMAGE, LOGITS, SEED, WEIGHTS_FILE
from .network import build

HELD_OUT = 360  #: of 1797 images, every digit in proportion
EPOCHS = 30
BATCH_SIZE = 32
PEAK_LEARNING_RATE = 3e-3
GREY_LEVELS = 16  #: scikit-learn's pixels are 0..16


@dataclass(frozen=True, slots=True)
class Split:
    """Images ``[N, 1, 8, 8]`` float32 in 0-1 and labels ``[N]`` int64, for training and held out from it."""

    train_images: NDArray[np.float32]
    train_labels: NDArray[np.int64]
    heldout_images: NDArray[np.float32]
    heldout_labels: NDArray[np.int64]


def split_digits(seed: int) -> Split:
    """scikit-learn's digits as 1437 training and 360 held-out images, stratified by digit."""
    digits: Any = load_digits()
    images = (digits.images[:, None, :, :] / GREY_LEVELS).astype(np.float32)
    labels = digits.target.astype(np.int64)
    train_images, heldout_images, train_labels, heldout_labels = train_test_split(
        images, labels, test_size=HELD_OUT, random_state=seed, stratify=labels
    )
    return Split(train_images, train_labels, heldout_images, heldout_labels)


def train_network(split: Split, *, seed: int, epochs: int = EPOCHS) -> nn.Sequential:
    """A network fitted to the training images only (Adam, one-cycle learning rate), in inference mode."""
    torch.manual_seed(seed)
    network = build()
    images, labels = torch.from_numpy(split.train_images), torch.from_numpy(split.train_labels)
    steps_per_epoch = -(-len(images) // BATCH_SIZE)
    optimizer = torch.optim.Adam(network.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=PEAK_LEARNING_RATE, epochs=epochs, steps_per_epoch=steps_per_epoch
    )
    loss_of = nn.CrossEntropyLoss()
    for _ in range(epochs):
        for batch in torch.split(torch.randperm(len(images)), BATCH_SIZE):
            optimizer.zero_grad()
            loss_of(network(images[batch]), labels[batch]).backward()
            optimizer.step()
            schedule.step()
    return network.eval()


def heldout_logits(network: nn.Module, split: Split) -> NDArray[np.float32]:
    """What the network answers for the held-out images: ``[360, 10]``."""
    with torch.inference_mode():
        logits: NDArray[np.float32] = network(torch.from_numpy(split.heldout_images)).numpy()
    return logits


def accuracy(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    """Share of images whose largest logit is the right digit, 0-1."""
    return float((logits.argmax(axis=1) == labels).mean())


@click.command(help=__doc__)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=DIGITS.folder, help="Folder to write into.")
@click.option("--seed", type=int, default=SEED, show_default=True, help="Seed of split, weights and image order.")
@click.option("--epochs", type=click.IntRange(min=1), default=EPOCHS, show_default=True, help="Passes over the images.")
def main(out: Path, seed: int, epochs: int) -> None:
    """Train, write the four files, say how good the network is."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    split = split_digits(seed)
    network = train_network(split, seed=seed, epochs=epochs)
    logits = heldout_logits(network, split)
    out.mkdir(parents=True, exist_ok=True)
    torch.save(network.state_dict(), out / WEIGHTS_FILE)
    np.savez_compressed(out / "heldout.npz", **{IMAGE.name: split.heldout_images})
    np.savez_compressed(out / "golden.npz", **{LOGITS.name: logits})
    np.savez_compressed(out / "labels.npz", LABEL=split.heldout_labels)
    click.echo(f"{accuracy(logits, split.heldout_labels):.2%} of {len(logits)} held-out images right; written to {out}")


if __name__ == "__main__":
    main()
