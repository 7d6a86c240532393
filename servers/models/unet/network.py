"""The U-Net of 2015. Needs torch only: servers import a copy of this file."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

CHANNELS = (64, 128, 256, 512, 1024)  # from the finest to the coarsest level (figure 1 of the paper)
SMALLEST_TILE, TILE_STEP = 188, 16  # every level's size has to be even before it is halved ("Network Architecture")
#: How much larger, on each side, a map that is passed on is than the one it meets: 4 pixels at the coarsest level, which
#: two unpadded convolutions took; each level up twice that, as its pixels are half the size, and 8 for its own convolutions.
BORDERS = (4, 16, 40, 88)


class UNet(nn.Module):
    """Images ``[N, 1, H, W]`` to logits ``[N, 2, H - 184, W - 184]``."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(_two_convolutions(i, o) for i, o in itertools.pairwise((1, *CHANNELS)))
        levels = CHANNELS[::-1]
        self.up = nn.ModuleList(nn.ConvTranspose2d(i, o, 2, stride=2) for i, o in itertools.pairwise(levels))
        self.merge = nn.ModuleList(_two_convolutions(i, o) for i, o in itertools.pairwise(levels))
        self.classes = nn.Conv2d(CHANNELS[0], 2, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # section 3: deviation sqrt(2 / N), N the incoming nodes of a neuron
                nn.init.normal_(module.weight, std=math.sqrt(2 / math.prod(module.weight.shape[1:])))

    @staticmethod
    def check_inputs(images: Any) -> None:
        """`ValueError` for an array ``[N, 1, H, W]`` of a size that does not halve evenly four times."""
        for size in images.shape[2:]:
            if size < SMALLEST_TILE or (size - SMALLEST_TILE) % TILE_STEP:
                raise ValueError(f"IMAGE: a side of {size} pixels; possible are {SMALLEST_TILE} and every {TILE_STEP} beyond")

    def forward(self, images: Tensor) -> Tensor:
        """The logits."""
        x, passed = images, []
        for level in self.down[:-1]:
            x = level(x)
            passed.append(x)
            x = functional.max_pool2d(x, 2)
        x = self.down[-1](x)
        for up, merge, border in zip(self.up, self.merge, BORDERS, strict=True):
            # Its border has no counterpart after unpadded convolutions.
            middle = passed.pop()[:, :, border:-border, border:-border]
            x = merge(torch.cat([middle, up(x)], dim=1))
        logits: Tensor = self.classes(x)
        return logits


def build() -> UNet:
    """A fresh network, weights drawn from torch's global generator."""
    return UNet()


def _two_convolutions(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3), nn.ReLU(), nn.Conv2d(out_channels, out_channels, 3), nn.ReLU()
    )
