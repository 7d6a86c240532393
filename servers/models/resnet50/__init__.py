"""``resnet50``: which of ImageNet's 1000 classes is on a 224x224 image.

The network of MLPerf's image classification: ResNet-50 v1.5 (He et al. 2015; the stride sits on
the 3x3 convolution), 25,557,032 parameters. Parameter names are torchvision's, so its published
state dicts load as ``weights``. Images come normalised, channels first.
"""

from __future__ import annotations

from pathlib import Path

from ..hosted import HostedModel, TensorSpec

RESNET50 = HostedModel(
    name="resnet50",
    summary="image classification: ResNet-50 v1.5, 25.6 million parameters",
    folder=Path(__file__).parent,
    inputs=(TensorSpec("IMAGE", "FP32", (3, 224, 224)),),
    output=TensorSpec("LOGITS", "FP32", (1000,)),
    precisions=("fp32", "bf16", "fp16"),
)
