"""A model with some of its units taken out: the kept rows and columns gathered, so that it computes less.

The search measures its candidates so, and the exports are written from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
from gpmetric.structured.groups import Groups, Part, read_output

__all__ = ["Repair", "Shrinker"]


@dataclass(frozen=True)
class Repair:
    """What stands for the output layer of a part after its units are gone.

    Attributes:
        weight: [out, kept features], None for the kept columns as they are.
        bias: [out], None for the bias as it is.
    """

    weight: Tensor | None = None
    bias: Tensor | None = None


class Shrinker:
    """Takes units out of a model and puts them back; the dense weights stay where they are.

    Args:
        model: dense, of which nothing else may change the shapes meanwhile.
        groups: its units.
    """

    def __init__(self, model: Model, groups: Groups) -> None:
        self.model, self.groups = model, groups
        owners = [part.module for part in groups.parts]
        self._dense = {one: one.data for owner in owners for one in owner.parameters()}
        self._biases = {id(part): getattr(part.module, part.output).bias for part in groups.parts}
        self._norms = {id(part): getattr(self._block(part), part.norm) for part in groups.parts}
        self._taken: set[int] = set()  # indices of parts that are not as they came

    @contextmanager
    def keeping(self, kept: Tensor, repairs: Mapping[int, Repair] | None = None) -> Iterator[None]:
        """The model with these units [units], bool, and the others gone, until the context is left.

        Args:
            repairs: by index of a part, what stands for its output layer.
        """
        try:
            for block in range(len(self.model.blocks)):
                self._keep(block, kept, repairs or {})
            yield
        finally:
            self.dense()

    @contextmanager
    def passing(self, kept: Tensor, repairs: Mapping[int, Repair]) -> Iterator[None]:
        """As `keeping` to a forward pass, the rows and columns of one block alone gathered at a time."""
        with ExitStack() as hooks:
            for index, block in enumerate(self.model.blocks):
                narrow, widen = partial(self._keep, index, kept, repairs), partial(self._widen, index)
                hooks.callback(widen)
                hooks.enter_context(block.module.register_forward_pre_hook(lambda *_, narrow=narrow: narrow()))
                hooks.enter_context(block.module.register_forward_hook(lambda *_, widen=widen: widen()))
            yield

    def dense(self) -> None:
        """The model as it came."""
        for block in range(len(self.model.blocks)):
            self._widen(block)

    @torch.no_grad()
    def _keep(self, block: int, kept: Tensor, repairs: Mapping[int, Repair]) -> None:
        masks = self.groups.split(kept)
        for index in (2 * block, 2 * block + 1):
            part, repair = self.groups.parts[index], repairs.get(index, Repair())
            units = masks[index].nonzero()[:, 0]
            if len(units) < part.units or index in repairs:
                self._taken.add(index)
            if not len(units):
                self._empty(part, repair.bias)
            elif index in self._taken:
                self._narrow(part, units, repair)

    def _widen(self, block: int) -> None:
        for index in self._taken & {2 * block, 2 * block + 1}:
            self._taken.remove(index)
            part = self.groups.parts[index]
            self._place(part, part.module, self._norms[id(part)])
            getattr(part.module, part.output).bias = self._biases[id(part)]
            for name in (*part.rows, part.output):
                layer = getattr(part.module, name)
                for parameter in layer.parameters():
                    parameter.data = self._dense[parameter]
                _tell(layer)
            _tell_heads(part, part.units)

    @contextmanager
    def masking(self, kept: Tensor, repairs: Mapping[int, Repair]) -> Iterator[None]:
        """The same function by other means, for comparison: dense shapes, and output layers blind to what is gone."""
        self.dense()
        with ExitStack() as hooks:
            for index, (part, mine) in enumerate(zip(self.groups.parts, self.groups.split(kept), strict=True)):
                layer = getattr(part.module, part.output)
                repair = repairs.get(index, Repair())
                columns = part.columns[mine].flatten()
                weight = read_output(part)[:, columns] if repair.weight is None else repair.weight
                bias = repair.bias if repair.bias is not None or not mine.any() else layer.bias
                hooks.enter_context(layer.register_forward_hook(partial(_blind, columns, weight, bias)))
            yield

    def _narrow(self, part: Part, units: Tensor, repair: Repair) -> None:
        self._place(part, part.module, self._norms[id(part)])
        for name, features in part.rows.items():
            layer = getattr(part.module, name)
            rows = features[:, units].flatten()
            layer.weight.data = _taken(layer, self._dense[layer.weight], rows, 0)
            if layer.bias is not None:
                layer.bias.data = self._dense[layer.bias][rows]
            _tell(layer)
        layer = getattr(part.module, part.output)
        if repair.weight is None:
            layer.weight.data = _taken(layer, self._dense[layer.weight], part.columns[units].flatten(), 1)
        else:
            layer.weight.data = repair.weight.t() if isinstance(layer, Conv1D) else repair.weight
        layer.bias = self._biases[id(part)]
        if layer.bias is None and repair.bias is not None:
            layer.bias = nn.Parameter(repair.bias, requires_grad=False)
        elif layer.bias is not None:
            layer.bias.data = self._dense[layer.bias] if repair.bias is None else repair.bias
        _tell(layer)
        _tell_heads(part, len(units))

    def _empty(self, part: Part, bias: Tensor | None) -> None:
        layer = getattr(part.module, part.output)
        width = layer.out_features if isinstance(layer, nn.Linear) else layer.nf
        absent = Absent(width, bias is not None, part.block if part.kind == "head" else None)
        if bias is not None:
            absent.bias = nn.Parameter(bias, requires_grad=False)
        self._place(part, absent.eval(), nn.Identity())

    def _place(self, part: Part, module: nn.Module, norm: nn.Module) -> None:
        setattr(self._block(part), part.name, module)
        setattr(self._block(part), part.norm, norm)

    def _block(self, part: Part) -> nn.Module:
        return self.model.blocks[part.block].module


def _blind(
    columns: Tensor, weight: Tensor, bias: Tensor | None, _: Any, args: tuple[Tensor, ...], output: Tensor
) -> Tensor:
    """An output layer's hook: what it would give if it read these features only."""
    return (
        linear(args[0][..., columns], weight, bias)
        if len(columns)
        else torch.zeros_like(output) + (0 if bias is None else bias)
    )


def _taken(layer: nn.Module, stored: Tensor, features: Tensor, side: int) -> Tensor:
    """Rows (side 0) or columns (1) of a weight [out, in], in the orientation that it is stored in."""
    return stored.index_select(1 - side if isinstance(layer, Conv1D) else side, features.to(stored.device))


def _tell(layer: Any) -> None:
    """A layer's own record of its shape."""
    if isinstance(layer, Conv1D):
        layer.nx, layer.nf = layer.weight.shape
    else:
        layer.out_features, layer.in_features = layer.weight.shape


def _tell_heads(part: Part, heads: int) -> None:
    """GPT-2's attention keeps record of its heads."""
    if hasattr(part.module, "split_size"):
        part.module.num_heads, part.module.split_size = heads, heads * part.module.head_dim
