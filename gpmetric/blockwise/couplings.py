"""Inner features of a block that can be put in another order without a change of what the block computes.

The channels of an MLP: columns of the layer that reads them, with rows and biases of those that write them. Inside each
attention head: columns of the output layer, with rows and bias of the values; query heads that share a key/value head
share one order. Whether that holds is tried on the block itself, so that none is taken for another by its names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gpmetric.blockwise.families import FAMILIES, LLAMA, Family, attention_features, mlp_features
from gpmetric.blockwise.replay import BlockCalls
from gpmetric.models import Layer

__all__ = ["Coupling", "Move", "find_couplings", "in_order"]

# Times the machine epsilon that sums in another order may change an output by, against what columns alone in another
# order do: 1.4 to 5.8 in fp32, below 0.001 in bf16, whose sums are fp32 (blocks of llama-05m, gpt2-05m and llama-4m,
# two windows of 256, one core). Where a layer is not moved with the others, the change is about that of columns alone.
_ROUNDING = 1000
_MOST = 0.01  # in half precision, where a scale between the layers that differs by less from one would pass, too


@dataclass(frozen=True)
class Move:
    """Another order along one axis of some parameters: entry i is what was entry order[i].

    Attributes:
        order: [entries], int64.
        parameters: by name in the model, the axis as it is stored.
    """

    order: Tensor
    parameters: Mapping[str, int]


@dataclass(frozen=True)
class _Member:
    """A layer that reads or writes the channels.

    Attributes:
        name: in the model.
        features: that are channels, [copies, groups, size].
        reads: whether they are its inputs.
    """

    name: str
    module: Any
    features: Tensor
    reads: bool

    def order(self, channels: Tensor) -> Tensor:
        """Of all its inputs or outputs, given that of the channels [groups, size] within their groups."""
        axis = self.axes["weight"]
        order = torch.arange(self.module.weight.shape[axis])
        order[self.features] = self.features.gather(2, channels.expand_as(self.features))
        return order

    @property
    def axes(self) -> dict[str, int]:
        """By name of a parameter, the axis that has the channels."""
        axis = int(self.reads != isinstance(self.module, Conv1D))
        biased = not self.reads and self.module.bias is not None
        return {"weight": axis} | ({"bias": 0} if biased else {})


@dataclass(frozen=True)
class Coupling:
    """Channels in groups, within which they may change places.

    Attributes:
        layer: name of the layer that reads them.
        members: that layer, and those that write them.
    """

    layer: str
    members: tuple[_Member, ...]

    @property
    def columns(self) -> Tensor:
        """Inputs of the layer that reads them, [copies, groups, size]."""
        return self.members[0].features

    def order(self, channels: Tensor) -> Tensor:
        """[in], of that layer's inputs, given that of the channels [groups, size] within their groups."""
        return self.members[0].order(channels)

    def moves(self, channels: Tensor) -> list[Move]:
        """What is to be moved for an order of the channels [groups, size] within their groups."""
        found: list[tuple[Tensor, dict[str, int]]] = []
        for member in self.members:
            order = member.order(channels)
            named = {f"{member.name}.{name}": axis for name, axis in member.axes.items()}
            alike = [parameters for other, parameters in found if torch.equal(order, other)]
            if alike:
                alike[0].update(named)
            else:
                found.append((order, named))
        return [Move(order, parameters) for order, parameters in found]

    @contextmanager
    def placed(self, channels: Tensor, members: int | None = None) -> Iterator[None]:
        """The block with its channels in another order [groups, size], in so many members; in all by default."""
        with ExitStack() as stack:
            for member in self.members[:members]:
                order = member.order(channels)
                for name, axis in member.axes.items():
                    stack.enter_context(_holding(getattr(member.module, name), order, axis))
            yield


def in_order(values: Tensor, order: Tensor, axis: int) -> Tensor:
    """A copy of a tensor with another order along an axis."""
    return values.index_select(axis, order.to(values.device))


@torch.no_grad()
def find_couplings(calls: BlockCalls, index: int, states: Tensor) -> dict[str, Coupling]:
    """Those of a block, which is at hand, by the name of the layer that reads the channels.

    Args:
        calls: how the model calls its blocks.
        index: of the block.
        states: what it reads of the first batch.
    """
    model = calls.model
    family = FAMILIES.get(model.module.config.model_type, LLAMA)  # most have its names
    modules = (module for _, module in model.module.named_modules(remove_duplicate=False))
    owners = Counter(id(one) for module in modules for one in module.parameters(recurse=False))
    found = {}
    for coupling in _named(family, model.blocks[index].module, model.blocks[index].layers):
        weights = (getattr(member.module, name) for member in coupling.members for name in member.axes)
        if any(owners[id(weight)] > 1 for weight in weights):  # another layer would be in a wrong order
            continue
        if _holds(coupling, lambda: calls.call(index, 0, states)):
            found[coupling.layer] = coupling
    return found


def _named(family: Family, block: Any, layers: Sequence[Layer]) -> Iterator[Coupling]:
    """What a family's names make of a block; a sublayer that has other names is left out."""
    for sublayer, place in family.places.items():
        module = getattr(block, place.module, None)
        reader = next((layer for layer in layers if layer.module is getattr(module, place.output, None)), None)
        if reader is None:
            continue
        try:
            columns, rows = (_channels if sublayer == "mlp" else _values)(family, module)
        except (AttributeError, RuntimeError):  # no layers of these names, or no whole heads
            continue
        parent = reader.name.removesuffix(f".{place.output}")
        writers = [_Member(f"{parent}.{name}", getattr(module, name, None), one, False) for name, one in rows.items()]
        members = (_Member(reader.name, reader.module, columns, True), *writers)
        if all(_within(one) for one in members):
            yield Coupling(reader.name, members)


def _within(member: _Member) -> bool:
    """Whether a layer has all these features."""
    if not isinstance(member.module, nn.Linear | Conv1D):
        return False
    return int(member.features.max()) < int(member.module.weight.shape[member.axes["weight"]])


_Inner = tuple[Tensor, dict[str, Tensor]]  # columns of the output layer, and rows by attribute, [copies, groups, size]


def _channels(family: Family, mlp: Any) -> _Inner:
    """An MLP's channels, one group."""
    rows, columns = mlp_features(family, mlp)
    return columns.view(1, 1, -1), {name: one.view(1, 1, -1) for name, one in rows.items()}


def _values(family: Family, attention: Any) -> _Inner:
    """The values of each head, a group each; in the columns, once for every query head that shares it."""
    rows, columns = attention_features(family, attention)
    name = family.fused or family.keys[-1]
    values = rows[name][-1:]  # [1, heads, size]; of fused ones, the last segment
    heads, size = values.shape[1:]
    return columns.view(heads, -1, size).transpose(0, 1), {name: values}


def _holds(coupling: Coupling, run: Callable[[], Tensor]) -> bool:
    """Whether a random order of the channels changes what a block gives by no more than rounding.

    It is compared with the change where only the columns are moved, so that what else is in the output does not matter;
    where even that changes nothing, there is nothing to tell.
    """
    generator = torch.Generator().manual_seed(0)
    _, groups, size = coupling.columns.shape
    channels = torch.stack([torch.randperm(size, generator=generator) for _ in range(groups)])
    before = run().float()
    with coupling.placed(channels):
        moved = (run().float() - before).abs().mean()
    with coupling.placed(channels, members=1):
        torn = (run().float() - before).abs().mean()
    tolerance = min(_MOST, _ROUNDING * torch.finfo(coupling.members[0].module.weight.dtype).eps)
    return bool(torn > 0) and bool(moved <= tolerance * torn)


@contextmanager
def _holding(parameter: nn.Parameter, order: Tensor, axis: int) -> Iterator[None]:
    own = parameter.data
    parameter.data = in_order(own, order, axis)
    try:
        yield
    finally:
        parameter.data = own
