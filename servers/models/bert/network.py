"""BERT for question answering. Needs torch only: servers import a copy of this file.

Names of parameters are those of ``transformers``' BertForQuestionAnswering, hence the nesting.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional

VOCABULARY, POSITIONS, TOKEN_TYPES = 30_522, 512, 2  # bert-base-uncased and bert-large-uncased
_NORM_EPSILON = 1e-12
_INITIAL_DEVIATION = 0.02
#: Layers, width and attention heads (Devlin et al. 2018, section 3); feed-forward layers are four times as wide.
SIZES = {"base": (12, 768, 12), "large": (24, 1024, 16)}


class Embeddings(nn.Module):
    """Sum of what a token is, where it stands, and which text it belongs to."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(VOCABULARY, width)
        self.position_embeddings = nn.Embedding(POSITIONS, width)
        self.token_type_embeddings = nn.Embedding(TOKEN_TYPES, width)
        self.LayerNorm = nn.LayerNorm(width, eps=_NORM_EPSILON)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor) -> Tensor:
        """Token numbers ``[N, L]`` to ``[N, L, width]``."""
        # Not looked up by number: a trace would keep the numbers on the device that it was made on.
        positions = self.position_embeddings.weight[: input_ids.shape[1]]
        summed = self.word_embeddings(input_ids) + self.token_type_embeddings(token_type_ids)
        normed: Tensor = self.LayerNorm(summed + positions)
        return normed


class SelfAttention(nn.Module):
    """Multi-head attention over the tokens that the mask lets through."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self._heads = heads

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """``[N, L, width]`` and ``mask`` ``[N, 1, 1, L]`` (True is seen) to ``[N, L, width]``."""
        query, key, value = (
            linear(x).unflatten(-1, (self._heads, -1)).transpose(1, 2) for linear in (self.query, self.key, self.value)
        )
        attended = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return attended.transpose(1, 2).flatten(2)


class Output(nn.Module):
    """A linear layer back to the width, added to what went past, normed."""

    def __init__(self, in_width: int, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(in_width, width)
        self.LayerNorm = nn.LayerNorm(width, eps=_NORM_EPSILON)

    def forward(self, x: Tensor, past: Tensor) -> Tensor:
        """``[N, L, in_width]`` and ``past`` ``[N, L, width]`` to ``[N, L, width]``."""
        normed: Tensor = self.LayerNorm(self.dense(x) + past)
        return normed


class Layer(nn.Module):
    """One encoder layer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        # `self` is transformers' name for it.
        self.attention = nn.ModuleDict({"self": SelfAttention(width, heads), "output": Output(width, width)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, 4 * width)})
        self.output = Output(4 * width, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """``[N, L, width]`` to the same."""
        attended = self.attention["output"](self.attention["self"](x, mask), x)
        output: Tensor = self.output(functional.gelu(self.intermediate["dense"](attended)), attended)
        return output


class Encoder(nn.Module):
    """Embeddings and the layers above them."""

    def __init__(self, layers: int, width: int, heads: int) -> None:
        super().__init__()
        self.embeddings = Embeddings(width)
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(Layer(width, heads) for _ in range(layers))})

    def forward(self, input_ids: Tensor, seen: Tensor, token_type_ids: Tensor) -> Tensor:
        """Token numbers, and which are ``seen``, ``[N, L]`` each, to ``[N, L, width]``."""
        x: Tensor = self.embeddings(input_ids, token_type_ids)
        for layer in self.encoder.get_submodule("layer").children():
            x = layer(x, seen[:, None, None, :])
        return x


class BertForQuestionAnswering(nn.Module):
    """Tokens ``[N, L]`` to logits ``[N, L, 2]``: does the answer start here, does it end here."""

    #: In published state dicts, and without influence on the logits.
    unused_weights = ("bert.pooler.", "bert.embeddings.position_ids")

    def __init__(self, layers: int, width: int, heads: int) -> None:
        super().__init__()
        self.bert = Encoder(layers, width, heads)
        self.qa_outputs = nn.Linear(width, 2)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=_INITIAL_DEVIATION)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    @staticmethod
    def rename_weight(name: str) -> str:
        """Ours for a name in a published state dict: those converted from TensorFlow call a norm's two gamma and beta."""
        return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")

    @staticmethod
    def check_inputs(input_ids: Any, attention_mask: Any, token_type_ids: Any) -> None:
        """`ValueError` for tokens (arrays ``[N, L]``) that the network has no weights for; a GPU would not survive them."""
        if not input_ids.shape == attention_mask.shape == token_type_ids.shape:
            raise ValueError("INPUT_IDS, ATTENTION_MASK and TOKEN_TYPE_IDS have to have the same shape")
        if input_ids.shape[1] > POSITIONS:
            raise ValueError(f"INPUT_IDS: {input_ids.shape[1]} tokens, at most {POSITIONS} are possible")
        for name, ids, end in (("INPUT_IDS", input_ids, VOCABULARY), ("TOKEN_TYPE_IDS", token_type_ids, TOKEN_TYPES)):
            if ids.min() < 0 or ids.max() >= end:
                raise ValueError(f"{name}: found {ids.min()} to {ids.max()}, possible are 0 to {end - 1}")

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        """The logits. Tokens with an attention mask of 0 are not looked at."""
        logits: Tensor = self.qa_outputs(self.bert(input_ids, attention_mask != 0, token_type_ids))
        return logits


def build(size: str) -> BertForQuestionAnswering:
    """A fresh network of one of `SIZES`, weights drawn from torch's global generator."""
    return BertForQuestionAnswering(*SIZES[size])
