"""Inner features of a block that can be put in another order without a change of what the block computes.

The channels of an MLP: columns of the layer that reads them, with rows and biases of those that write them. Inside each
attention head: columns of the output layer, with rows and bias of the values; query heads that share a key/value head
share one order. Widths of layers of one module tell which they may be, under whatever names, in fused layers, too, and
whether that holds is tried on the block itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gpmetric.blockwise.families import read_features
from gpmetric.blockwise.replay import BlockCalls
from gpmetric.experts import is_expert
from gpmetric.models import Block, Layer

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
    if isinstance(
        model.blocks[index].module, nn.ModuleList
    ):  # of blocks that share layers: columns stay where they are
        return {}
    modules = (module for _, module in model.module.named_modules(remove_duplicate=False))
    owners = Counter(id(one) for module in modules for one in module.parameters(recurse=False))
    block, found = model.blocks[index], {}

    def run() -> Tensor:
        return calls.call(index, 0, states).float()

    with _in_turn(block.module) as ran:
        before = run()
    for reader, writers in _neighbours(block, ran):
        for coupling in _guesses(model.module.config.get_text_config(), reader, writers):
            weights = (getattr(member.module, name) for member in coupling.members for name in member.axes)
            if any(owners[id(weight)] > 1 for weight in weights):  # another layer would be in a wrong order
                continue
            if _holds(coupling, run, before):
                found[reader.name] = coupling
                break
    return found


@contextmanager
def _in_turn(block: nn.Module) -> Iterator[dict[str, Any]]:
    """Linear layers inside a block by name, in the order in which they run meanwhile."""
    ran: dict[str, Any] = {}
    with ExitStack() as stack:
        for name, one in block.named_modules():
            if isinstance(one, nn.Linear | Conv1D):
                stack.enter_context(one.register_forward_pre_hook(partial(_note, ran, name)))
        yield ran


def _note(ran: dict[str, Any], name: str, module: nn.Module, _: Any) -> None:
    ran.setdefault(name, module)


def _neighbours(block: Block, ran: Mapping[str, Any]) -> Iterator[tuple[Layer, dict[str, Any]]]:
    """Layers of a block that are pruned, each with those of the same module that run before it, the last one first."""
    for place, (name, module) in enumerate(ran.items()):
        layer = next((one for one in block.layers if one.module is module), None)
        parent = name.rpartition(".")[0]
        before = [other for other in list(ran)[:place] if other.rpartition(".")[0] == parent]
        if layer is not None and before and not is_expert(module):  # whose files have no place for another order
            prefix = layer.name.removesuffix(name)
            yield layer, {prefix + other: ran[other] for other in reversed(before)}


def _guesses(config: Any, reader: Layer, writers: Mapping[str, Any]) -> Iterator[Coupling]:
    """What a layer's inputs may be, by the widths of those that run before it; whether they are is to be tried."""
    width = read_features(reader.module)
    wide = {name: int(one.weight.shape[isinstance(one, Conv1D)]) for name, one in writers.items()}
    channels = torch.arange(width).view(1, 1, width)
    rows = {name: channels for name, features in wide.items() if features == width}
    if rows:  # an MLP's
        yield _coupling(reader, channels, writers, rows)
    for name, features in wide.items():
        if features == 2 * width:  # gates and channels in one, one after the other or in turns
            for both in (torch.arange(features).view(2, 1, width), torch.arange(features).view(1, width, 2).mT):
                yield _coupling(reader, channels, writers, {name: both.reshape(2, 1, width)})
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int) or width % heads:
        return
    size = width // heads
    shared = [getattr(config, name, None) or heads for name in ("num_key_value_heads", "num_kv_heads")]
    for groups in dict.fromkeys((*shared, heads, 1)):
        columns = torch.arange(width).view(groups, -1, size).transpose(0, 1)
        for name, features in wide.items():  # values alone, or behind queries and keys of all heads, or of each group
            values = (
                [torch.arange(features)[-groups * size :].view(1, groups, size)] if groups * size <= features else []
            )
            if features % groups == 0 and features // groups >= size:
                values.append(torch.arange(features).view(1, groups, -1)[..., -size:])
            for one in values[:1] if features == groups * size else values:
                yield _coupling(reader, columns, writers, {name: one})


def _coupling(reader: Layer, columns: Tensor, writers: Mapping[str, Any], rows: Mapping[str, Tensor]) -> Coupling:
    written = [_Member(name, writers[name], one, False) for name, one in rows.items()]
    return Coupling(reader.name, (_Member(reader.name, reader.module, columns, True), *written))


def _holds(coupling: Coupling, run: Callable[[], Tensor], before: Tensor) -> bool:
    """Whether a random order of the channels changes what a block gives by no more than rounding.

    It is compared with the change where only the columns are moved, so that what else is in the output does not matter;
    where even that changes nothing, there is nothing to tell.
    """
    generator = torch.Generator().manual_seed(0)
    _, groups, size = coupling.columns.shape
    channels = torch.stack([torch.randperm(size, generator=generator) for _ in range(groups)])
    with coupling.placed(channels):
        moved = (run() - before).abs().mean()
    with coupling.placed(channels, members=1):
        torn = (run() - before).abs().mean()
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
