"""What structured pruning removes as one: MLP channels, and attention heads with their key/value group.

A part is the attention or the MLP of one block. Its units are removed by taking rows out of the layers that write its
inner features, and columns out of the layer that reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gpmetric.errors import ModelError
from gpmetric.models import Model

__all__ = ["FAMILIES", "Family", "Groups", "Kind", "Part", "find_groups", "read_output"]

Kind = Literal["head", "channel"]


@dataclass(frozen=True)
class Family:
    """Where the layers are in a block of an architecture.

    Attributes:
        attention, mlp: attributes of a block.
        norms: attributes of a block, of the norm before its attention and before its MLP.
        queries, keys: attributes of the attention that write its inner features, heads by heads and key/value group by
            group; `fused` holds queries, keys and values one after the other instead.
        inputs: attributes of the MLP that write its channels.
        outputs: attributes of the attention and of the MLP that read the inner features.
    """

    attention: str
    mlp: str
    norms: tuple[str, str]
    inputs: tuple[str, ...]
    outputs: tuple[str, str]
    queries: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    fused: str | None = None


_LLAMA = Family(
    "self_attn",
    "mlp",
    ("input_layernorm", "post_attention_layernorm"),
    inputs=("gate_proj", "up_proj"),
    outputs=("o_proj", "down_proj"),
    queries=("q_proj",),
    keys=("k_proj", "v_proj"),
)

# model_type of a config -> where its layers are
FAMILIES: Mapping[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gpt2": Family("attn", "mlp", ("ln_1", "ln_2"), inputs=("c_fc",), outputs=("c_proj", "c_proj"), fused="c_attn"),
}


@dataclass(frozen=True)
class Part:
    """The attention or the MLP of a block.

    Attributes:
        name, norm: attributes of the block's module.
        rows: by attribute of the part, the features that it writes of each unit, [segments, units, features].
        output: attribute of the part that reads them.
        columns: the features that it reads of each unit, [units, features].
        cost: parameters of a unit.
        rest: parameters that go with the last unit only: norm, output bias, norms of queries and keys.
    """

    block: int
    kind: Kind
    name: str
    norm: str
    module: Any
    rows: Mapping[str, Tensor]
    output: str
    columns: Tensor
    cost: int
    rest: int

    @property
    def units(self) -> int:
        return len(self.columns)


@dataclass(frozen=True)
class Groups:
    """Every unit of a model, part by part, the attention of a block before its MLP.

    Attributes:
        parameters: inside the blocks.
        cost: parameters of each unit, [units], fp64.
        part: index of each unit's part, [units].
    """

    family: Family
    parts: tuple[Part, ...]
    parameters: int
    cost: Tensor
    part: Tensor

    @property
    def units(self) -> int:
        return len(self.cost)

    def split(self, values: Tensor) -> tuple[Tensor, ...]:
        """Values [units] by part."""
        return values.split([part.units for part in self.parts])

    def removed(self, kept: Tensor) -> int:
        """Parameters that go with the units [units] that are not kept."""
        gone = sum(part.rest for part, mine in zip(self.parts, self.split(kept), strict=True) if not mine.any())
        return gone + int(self.cost[~kept].sum())


def find_groups(model: Model) -> Groups:
    """The units of a model as it came.

    Raises:
        ModelError: an architecture that is not in FAMILIES.
    """
    kind = model.module.config.model_type
    if kind not in FAMILIES:
        raise ModelError(
            f"{model.name!r} is a {kind} model, whose channels and heads cannot be removed yet: accepted are "
            + ", ".join(FAMILIES)
        )
    family = FAMILIES[kind]
    parts = [
        part
        for index, block in enumerate(model.blocks)
        for part in (_attention(family, index, block.module), _mlp(family, index, block.module))
    ]
    return Groups(
        family,
        tuple(parts),
        sum(parameter.numel() for block in model.blocks for parameter in block.module.parameters()),
        torch.cat([torch.full((part.units,), float(part.cost), dtype=torch.float64) for part in parts]),
        torch.cat([torch.full((part.units,), index) for index, part in enumerate(parts)]),
    )


def _attention(family: Family, index: int, block: Any) -> Part:
    attention = getattr(block, family.attention)
    size = attention.head_dim
    if family.fused is not None:
        heads = attention.num_heads
        per_group = size
        rows = {family.fused: torch.arange(3 * heads * size).view(3, heads, size)}
    else:
        heads = getattr(attention, family.keys[0]).out_features // size
        per_group = size * attention.num_key_value_groups
        rows = {name: torch.arange(heads * per_group).view(1, heads, per_group) for name in family.queries}
        rows |= {name: torch.arange(heads * size).view(1, heads, size) for name in family.keys}
    columns = torch.arange(heads * per_group).view(heads, per_group)
    return _part("head", index, block, family.attention, family.norms[0], rows, family.outputs[0], columns)


def _mlp(family: Family, index: int, block: Any) -> Part:
    mlp = getattr(block, family.mlp)
    channels = _read_features(getattr(mlp, family.outputs[1]))
    rows = {name: torch.arange(channels).view(1, channels, 1) for name in family.inputs}
    columns = torch.arange(channels).view(channels, 1)
    return _part("channel", index, block, family.mlp, family.norms[1], rows, family.outputs[1], columns)


def _part(
    kind: Kind, index: int, block: Any, name: str, norm: str, rows: Mapping[str, Tensor], output: str, columns: Tensor
) -> Part:
    module = getattr(block, name)
    cost = columns.shape[1] * getattr(module, output).weight.numel() // _read_features(getattr(module, output))
    for attribute, features in rows.items():
        layer = getattr(module, attribute)
        each = _read_features(layer) + (layer.bias is not None)
        cost += features.shape[0] * features.shape[2] * each
    whole = sum(one.numel() for owner in (module, getattr(block, norm)) for one in owner.parameters())
    return Part(index, kind, name, norm, module, rows, output, columns, cost, whole - len(columns) * cost)


def _read_features(layer: Any) -> int:
    """Input features of a Linear or a Conv1D."""
    return int(layer.in_features if isinstance(layer, nn.Linear) else layer.nx)


def read_output(part: Part) -> Tensor:
    """Weight [out, features] of a part's output layer, a view of what is stored."""
    layer = getattr(part.module, part.output)
    weight: Tensor = layer.weight.data
    return weight if isinstance(layer, nn.Linear) else weight.t()
