"""Where the layers of an attention and an MLP are in a block, family by family, and which features go together.

A sublayer's inner features, the channels of an MLP or the values of attention heads, are written by rows of some layers
and read by columns of one: they can be removed together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["FAMILIES", "LLAMA", "Family", "Features", "Place", "attention_features", "mlp_features", "read_features"]

Features = tuple[dict[str, Tensor], Tensor]  # rows by attribute [segments, units, features]; columns [units, features]


@dataclass(frozen=True)
class Place:
    """Where a sublayer is: attributes of a block, of it and of the norm before it; its own, of its output layer."""

    module: str
    norm: str
    output: str


@dataclass(frozen=True)
class Family:
    """Where the layers are in a block of an architecture.

    Attributes:
        places: by sublayer, "attention" or "mlp".
        queries, keys: attributes of the attention that write its inner features, heads by heads and key/value group by
            group; `fused` holds queries, keys and values one after the other instead.
        inputs: attributes of the MLP that write its channels.
    """

    places: Mapping[str, Place]
    inputs: tuple[str, ...]
    queries: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    fused: str | None = None


LLAMA = Family(
    {
        "attention": Place("self_attn", "input_layernorm", "o_proj"),
        "mlp": Place("mlp", "post_attention_layernorm", "down_proj"),
    },
    inputs=("gate_proj", "up_proj"),
    queries=("q_proj",),
    keys=("k_proj", "v_proj"),
)
_GPT2 = Family(
    {"attention": Place("attn", "ln_1", "c_proj"), "mlp": Place("mlp", "ln_2", "c_proj")},
    inputs=("c_fc",),
    fused="c_attn",
)

# model_type of a config -> where its layers are
FAMILIES: Mapping[str, Family] = {"llama": LLAMA, "mistral": LLAMA, "qwen2": LLAMA, "qwen3": LLAMA, "gpt2": _GPT2}


def attention_features(family: Family, attention: Any) -> Features:
    """Those of key/value groups: rows of all layers that read the hidden states, columns of the output layer."""
    size = attention.head_dim
    if family.fused is not None:
        heads, per_group = attention.num_heads, size
        rows = {family.fused: torch.arange(3 * heads * size).view(3, heads, size)}
    else:
        heads = getattr(attention, family.keys[0]).out_features // size
        per_group = size * attention.num_key_value_groups
        rows = {name: torch.arange(heads * per_group).view(1, heads, per_group) for name in family.queries}
        rows |= {name: torch.arange(heads * size).view(1, heads, size) for name in family.keys}
    return rows, torch.arange(heads * per_group).view(heads, per_group)


def mlp_features(family: Family, mlp: Any) -> Features:
    """Those of channels: rows of the layers that write them, columns of the output layer."""
    channels = read_features(getattr(mlp, family.places["mlp"].output))
    rows = {name: torch.arange(channels).view(1, channels, 1) for name in family.inputs}
    return rows, torch.arange(channels).view(channels, 1)


def read_features(layer: Any) -> int:
    """Input features of a Linear or a Conv1D."""
    return int(layer.in_features if isinstance(layer, nn.Linear) else layer.nx)
