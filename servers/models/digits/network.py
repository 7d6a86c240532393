"""The digits network, and its weights on disk. Needs torch only: servers import a copy of this file."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import torch
from torch import nn


def build_network() -> nn.Sequential:
    """A fresh network: images ``[N, 1, 8, 8]`` to logits ``[N, 10]``, weights drawn from torch's global generator."""
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(1, 16, kernel_size=3, padding=1),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(16, 32, kernel_size=3, padding=1),
            relu2=nn.ReLU(),
            pool=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            hidden=nn.Linear(32 * 4 * 4, 64),
            relu3=nn.ReLU(),
            logits=nn.Linear(64, 10),
        )
    )


def load_network(path: Path) -> nn.Sequential:
    """The network with the weights of ``path``, ready for inference.

    Reads tensors only, never pickled code. `ValueError` for a file that does not hold this
    network's state dict.
    """
    network = build_network()
    try:
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # torch has a different one for every way to be wrong, and long advice in most
        raise ValueError(f"{path} does not hold the digits network's weights ({type(error).__name__})") from error
    return network.eval()
