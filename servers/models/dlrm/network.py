"""The deep learning recommendation model. Needs torch only: servers import a copy of this file.

Names of parameters are those of the reference implementation (``dlrm_s_pytorch``).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

DENSE_FEATURES = 13
EMBEDDING_WIDTH = 128
#: Rows of the tables, one for each categorical feature of the Criteo Terabyte data, categories limited to
#: 40 million (MLPerf Inference, recommendation/dlrm/pytorch/python/main.py).
# fmt: off
TABLE_ROWS = (
    39884406, 39043, 17289, 7420, 20263, 3, 7120, 1543, 63, 38532951, 2953546, 403346, 10,
    2208, 11938, 155, 4, 976, 14, 39979771, 25641295, 39664984, 585935, 12972, 108, 36,
)
# fmt: on
#: Widths of the two stacks of linear layers (the same file: ln_bot, ln_top without its input).
BOTTOM_WIDTHS = (DENSE_FEATURES, 512, 256, EMBEDDING_WIDTH)
TOP_WIDTHS = (1024, 1024, 512, 256, 1)


class Dlrm(nn.Module):
    """``DENSE`` ``[N, 13]`` and ``SPARSE`` ``[N, 26]`` to the probability of a click ``[N, 1]``."""

    def __init__(self, table_rows: Sequence[int]) -> None:
        super().__init__()
        self.emb_l = nn.ModuleList(_table(rows) for rows in table_rows)
        self.bot_l = _stack(BOTTOM_WIDTHS, last=nn.ReLU())
        pairs = len(table_rows) * (len(table_rows) + 1) // 2
        self.top_l = _stack((EMBEDDING_WIDTH + pairs, *TOP_WIDTHS), last=nn.Sigmoid())
        features = len(table_rows) + 1
        self.register_buffer("_pairs", torch.tril_indices(features, features, offset=-1), persistent=False)
        self.register_buffer("_rows", torch.tensor(table_rows), persistent=False)

    def forward(self, dense: Tensor, sparse: Tensor) -> Tensor:
        """The probability."""
        x = self.bot_l(dense)
        categories = sparse.remainder(self.get_buffer("_rows"))
        embedded = [table(categories[:, number]) for number, table in enumerate(self.emb_l)]
        features = torch.stack([x, *embedded], dim=1)
        products = torch.bmm(features, features.transpose(1, 2))
        pairs = self.get_buffer("_pairs")
        click: Tensor = self.top_l(torch.cat([x, products[:, pairs[0], pairs[1]]], dim=1))
        return click


def build(max_rows: int) -> Dlrm:
    """A fresh network whose tables have at most ``max_rows`` rows, weights drawn from torch's global generator."""
    return Dlrm([min(rows, max_rows) for rows in TABLE_ROWS])


def _table(rows: int) -> nn.Embedding:
    table = nn.Embedding(rows, EMBEDDING_WIDTH)
    bound = 1 / math.sqrt(rows)  # the reference's initial weights, here and below
    nn.init.uniform_(table.weight, -bound, bound)
    return table


def _stack(widths: Sequence[int], last: nn.Module) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for width, next_width in itertools.pairwise(widths):
        linear = nn.Linear(width, next_width)
        nn.init.normal_(linear.weight, std=math.sqrt(2 / (width + next_width)))
        nn.init.normal_(linear.bias, std=math.sqrt(1 / next_width))
        layers += [linear, nn.ReLU()]
    layers[-1] = last
    return nn.Sequential(*layers)
