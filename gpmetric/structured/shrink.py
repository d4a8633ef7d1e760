"""A model with some of its units taken out: the kept rows and columns gathered, so that it computes less.

The search measures its candidates so, and the exports are written from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from gpmetric.models import Model
from gpmetric.slim_models import Absent
from gpmetric.structured.groups import Groups, Sublayer
from gpmetric.structured.routing import Routing

__all__ = ["Repair", "Shrinker"]


@dataclass(frozen=True)
class Repair:
    """What stands for the output layer of a sublayer after its units are gone."""

    weight: Tensor | None = None  # [out, kept features], None for the kept columns as they are
    bias: Tensor | None = None  # [out], None for the bias as it is


class Shrinker:
    """Takes units out of a model and puts them back; the dense weights stay where they are.

    Args:
        model: dense, of which nothing else may change the shapes meanwhile.
        groups: its units.
    """

    def __init__(self, model: Model, groups: Groups) -> None:
        self.model, self.groups = model, groups
        self._dense = {one: one.data for owner in groups.sublayers for one in owner.module.parameters()}
        self._biases = [one.output.bias for one in groups.sublayers]
        self._norms = [getattr(self._block(one), one.place.norm) for one in groups.sublayers]
        self._taken: set[int] = set()  # indices of sublayers that are not as they came
        self._routings = [Routing(one) for one in groups.mixtures]

    @contextmanager
    def keeping(self, kept: Tensor, repairs: Mapping[int, Repair] | None = None) -> Iterator[None]:
        """The model with these units [units], bool, and the others gone; repairs by index of a sublayer."""
        try:
            for indices in self.groups.by_block:
                self._keep(indices, kept, repairs or {})
            yield
        finally:
            self.dense()

    @contextmanager
    def passing(self, kept: Tensor, repairs: Mapping[int, Repair]) -> Iterator[None]:
        """As `keeping` to a forward pass, the rows and columns of one block alone gathered at a time."""
        with ExitStack() as hooks:
            for indices, block in zip(self.groups.by_block, self.model.blocks, strict=True):
                narrow, widen = partial(self._keep, indices, kept, repairs), partial(self._widen, indices)
                hooks.callback(widen)
                hooks.enter_context(block.module.register_forward_pre_hook(lambda *_, narrow=narrow: narrow()))
                hooks.enter_context(block.module.register_forward_hook(lambda *_, widen=widen: widen()))
            yield

    def dense(self) -> None:
        """The model as it came."""
        for indices in self.groups.by_block:
            self._widen(indices)

    @torch.no_grad()
    def _keep(self, indices: Sequence[int], kept: Tensor, repairs: Mapping[int, Repair]) -> None:
        masks = self.groups.split(kept)
        for index in indices:
            if self._routings:
                self._routings[index].keep(masks[index].nonzero()[:, 0])
                continue
            sublayer, repair = self.groups.sublayers[index], repairs.get(index, Repair())
            units = masks[index].nonzero()[:, 0]
            if len(units) < sublayer.units or index in repairs:
                self._taken.add(index)
            if not len(units):
                self._empty(sublayer, repair.bias)
            elif index in self._taken:
                self._narrow(index, units, repair)

    def _widen(self, indices: Sequence[int]) -> None:
        for index in indices if self._routings else ():
            self._routings[index].widen()
        for index in self._taken.intersection(indices):
            self._taken.remove(index)
            sublayer = self.groups.sublayers[index]
            self._place(sublayer, sublayer.module, self._norms[index])
            sublayer.output.bias = self._biases[index]
            for layer in (*(getattr(sublayer.module, name) for name in sublayer.rows), sublayer.output):
                for parameter in layer.parameters():
                    parameter.data = self._dense[parameter]
                _tell(layer)
            _tell_heads(sublayer, sublayer.units)

    @contextmanager
    def masking(self, kept: Tensor, repairs: Mapping[int, Repair]) -> Iterator[None]:
        """The same function by other means, for comparison: dense shapes, and output layers blind to what is gone.

        Experts are as `keeping` has them, all where they were and some never chosen.
        """
        if self._routings:
            with self.keeping(kept):
                yield
            return
        self.dense()
        with ExitStack() as hooks:
            for index, (one, mine) in enumerate(zip(self.groups.sublayers, self.groups.split(kept), strict=True)):
                layer, repair = one.output, repairs.get(index, Repair())
                columns = one.columns[mine].flatten()
                weight = one.weight[:, columns] if repair.weight is None else repair.weight
                bias = repair.bias if repair.bias is not None or not mine.any() else layer.bias
                hooks.enter_context(layer.register_forward_hook(partial(_blind, columns, weight, bias)))
            yield

    def _narrow(self, index: int, units: Tensor, repair: Repair) -> None:
        sublayer, bias = self.groups.sublayers[index], self._biases[index]
        self._place(sublayer, sublayer.module, self._norms[index])
        for name, features in sublayer.rows.items():
            layer, rows = getattr(sublayer.module, name), features[:, units].flatten()
            layer.weight.data = _taken(layer, self._dense[layer.weight], rows, 0)
            if layer.bias is not None:
                layer.bias.data = self._dense[layer.bias][rows]
            _tell(layer)
        layer = sublayer.output
        if repair.weight is None:
            layer.weight.data = _taken(layer, self._dense[layer.weight], sublayer.columns[units].flatten(), 1)
        else:
            layer.weight.data = repair.weight.t() if isinstance(layer, Conv1D) else repair.weight
        layer.bias = bias
        if bias is not None:
            bias.data = self._dense[bias] if repair.bias is None else repair.bias
        elif repair.bias is not None:
            layer.bias = nn.Parameter(repair.bias, requires_grad=False)
        _tell(layer)
        _tell_heads(sublayer, len(units))

    def _empty(self, sublayer: Sublayer, bias: Tensor | None) -> None:
        layer = sublayer.output
        width = layer.out_features if isinstance(layer, nn.Linear) else layer.nf
        absent = Absent(width, bias is not None, sublayer.block if sublayer.kind.attends else None)
        if bias is not None:
            absent.bias = nn.Parameter(bias, requires_grad=False)
        self._place(sublayer, absent.eval(), nn.Identity())

    def _place(self, sublayer: Sublayer, module: nn.Module, norm: nn.Module) -> None:
        setattr(self._block(sublayer), sublayer.place.module, module)
        setattr(self._block(sublayer), sublayer.place.norm, norm)

    def _block(self, sublayer: Sublayer) -> nn.Module:
        return self.model.blocks[sublayer.block].module


def _blind(
    columns: Tensor, weight: Tensor, bias: Tensor | None, _: Any, args: tuple[Tensor, ...], output: Tensor
) -> Tensor:
    """An output layer's hook: what it would give if it read these features only."""
    if len(columns):
        return linear(args[0][..., columns], weight, bias)
    return torch.zeros_like(output) + (0 if bias is None else bias)


def _taken(layer: nn.Module, stored: Tensor, features: Tensor, side: int) -> Tensor:
    """Rows (side 0) or columns (1) of a weight [out, in], in the orientation that it is stored in."""
    return stored.index_select(1 - side if isinstance(layer, Conv1D) else side, features.to(stored.device))


def _tell(layer: Any) -> None:
    """A layer's own record of its shape."""
    if isinstance(layer, Conv1D):
        layer.nx, layer.nf = layer.weight.shape
    else:
        layer.out_features, layer.in_features = layer.weight.shape


def _tell_heads(sublayer: Sublayer, units: int) -> None:
    """GPT-2's attention keeps record of its heads."""
    module, heads = sublayer.module, sublayer.width(units)
    if hasattr(module, "split_size"):
        module.num_heads, module.split_size = heads, heads * module.head_dim
