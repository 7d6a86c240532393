"""The digits network. Needs torch only: servers import a copy of this file."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn


def build() -> nn.Sequential:
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
