"""ResNet-50 v1.5. Needs torch only: servers import a copy of this file. Names of parameters are torchvision's."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

_EXPANSION = 4  # a block's output channels per channel of its 3x3 convolution
#: Of the four stages (He et al. 2015, table 1): channels of the 3x3 convolutions, blocks, stride of the first block.
_STAGES = ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2))

#: transformers' words for what a block consists of, and torchvision's. In a shortcut they are numbered in this order.
_KINDS = {"convolution": "conv", "normalization": "bn"}
_IN_A_BLOCK = re.compile(r"encoder\.stages\.(\d)\.layers\.(\d)\.(?:layer\.(\d)|shortcut)\.(convolution|normalization)\.(\w+)")


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions around which the input is carried past."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        out_channels = channels * _EXPANSION
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """``[N, in_channels, H, W]`` to ``[N, 4 * channels, H / stride, W / stride]``."""
        y = torch.relu(self.bn1(self.conv1(x)))
        y = torch.relu(self.bn2(self.conv2(y)))
        return torch.relu(self.bn3(self.conv3(y)) + self.downsample(x))


class ResNet50(nn.Module):
    """Images ``[N, 3, H, W]`` to logits ``[N, 1000]``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        in_channels = 64
        for number, (channels, blocks, stride) in enumerate(_STAGES, start=1):
            stage = [Bottleneck(in_channels, channels, stride)]
            in_channels = channels * _EXPANSION
            stage += [Bottleneck(in_channels, channels, 1) for _ in range(blocks - 1)]
            self.add_module(f"layer{number}", nn.Sequential(*stage))
        self.fc = nn.Linear(in_channels, 1000)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # He et al. 2015, "Delving deep into rectifiers"
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def rename_weight(name: str) -> str:
        """Ours for a name in a published state dict, which may be one of ``transformers``' ResNetForImageClassification."""
        name = name.removeprefix("resnet.").replace("classifier.1.", "fc.")
        name = re.sub(r"^embedder\.embedder\.(convolution|normalization)", lambda found: f"{_KINDS[found[1]]}1", name)
        found = _IN_A_BLOCK.fullmatch(name)
        if found is None:
            return name
        stage, block, layer, kind, which = found.groups()
        place = f"downsample.{list(_KINDS).index(kind)}" if layer is None else f"{_KINDS[kind]}{int(layer) + 1}"
        return f"layer{int(stage) + 1}.{block}.{place}.{which}"

    def forward(self, images: Tensor) -> Tensor:
        """The logits."""
        x = self.maxpool(torch.relu(self.bn1(self.conv1(images))))
        for number in range(1, len(_STAGES) + 1):
            x = self.get_submodule(f"layer{number}")(x)
        logits: Tensor = self.fc(x.mean(dim=(2, 3)))
        return logits


def build() -> ResNet50:
    """A fresh network, weights drawn from torch's global generator."""
    return ResNet50()
