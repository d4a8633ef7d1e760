"""Experts of a mixture that read too little: they borrow what their siblings in the same block were measured to be.

An expert's statistics come from the tokens routed to it alone. A Gram matrix [in, in] of fewer tokens than inputs is
singular, and what is made of it (D, a reconstruction) rests on the damping: such an expert takes the one over the
tokens of all experts of its block. Of a root mean square or a gradient there is no such bound: these are its own from
the first token on, and without any its siblings' mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from gpmetric.calibration.accumulators import Accumulator, FromInputs, InputMoments, LayerStatistics
from gpmetric.errors import ModelError, SolverError
from gpmetric.experts import expert_family
from gpmetric.models import Layer

__all__ = ["Siblings", "borrowing", "families", "lend"]


def families(layers: Sequence[Layer]) -> list[list[Layer]]:
    """Layers in groups, in order: the same layer of all experts of a block, and every other layer alone."""
    found: dict[str, list[Layer]] = {}
    for layer in layers:
        found.setdefault(expert_family(layer.name) or layer.name, []).append(layer)
    return list(found.values())


def borrowing(layers: Sequence[Layer], tokens: Mapping[str, int], *, pairs: bool) -> list[str]:
    """Names of those that borrow from their siblings, having read so many tokens.

    Args:
        layers: of blocks.
        tokens: by name.
        pairs: whether Gram matrices are asked for.
    """
    return [
        layer.name
        for family in families(layers)
        if len(family) > 1
        for layer in family
        if tokens[layer.name] < (layer.weight.shape[1] if pairs else 1)
    ]


def lend(values: dict[str, dict[str, Tensor]], layers: Sequence[Layer]) -> None:
    """Gives layers whose values [out, in] are all zero, those of experts that read nothing, their siblings' mean.

    Args:
        values: by layer and name, changed in place.
        layers: whose they are.
    """
    for family in families(layers):
        for name in values[family[0].name] if len(family) > 1 else ():
            fed = [values[layer.name][name] for layer in family if values[layer.name][name].any()]
            for layer in family if fed else ():
                if not values[layer.name][name].any():
                    values[layer.name][name] = torch.stack(fed).mean(dim=0)


class Siblings:
    """Reads off what was measured of the layers of one family, each of which is asked for once.

    Args:
        family: of `families`.
        tokens: by layer, how many it read.

    Raises:
        ModelError: none of them read any.
    """

    def __init__(self, family: Sequence[Layer], tokens: Mapping[str, int]) -> None:
        self._family, self._tokens = family, tokens
        self._pooled: InputMoments | None = None
        self._means: dict[str, Tensor] = {}
        if not any(tokens[layer.name] for layer in family):
            raise ModelError(f"layer {family[0].name} is not reached by a text, so it cannot be calibrated (--exclude)")

    @property
    def names(self) -> list[str]:
        """Of the layers."""
        return [layer.name for layer in self._family]

    def read(
        self,
        layer: Layer,
        rows: Mapping[str, FromInputs],
        moments: Mapping[str, InputMoments],
        accumulated: Mapping[str, Mapping[str, Accumulator]],
        sequences: int,
    ) -> LayerStatistics:
        """What was asked for of one layer; the moments of all are there until the last has been read.

        Args:
            layer: of the family.
            rows: by name, what is read off moments.
            moments: by layer.
            accumulated: by layer and name, what was accumulated over gradients.
            sequences: that these were accumulated over.

        Raises:
            SolverError: a Gram matrix has no inverse even after stronger damping.
        """
        tokens = self._tokens[layer.name]
        found, borrowed = {}, []
        for name, row in rows.items():
            lacking = len(self._family) > 1 and tokens < (layer.weight.shape[1] if row.pairs else 1)
            try:
                found[name] = row.result(self._pool(moments) if lacking else moments[layer.name])
            except SolverError as error:
                raise SolverError(f"layer {layer.name}: {error}") from error
            borrowed += [name] if lacking else []
        for name, one in accumulated.get(layer.name, {}).items():
            found[name] = one.result(sequences) if tokens else self._mean(name, accumulated, sequences)
            borrowed += [] if tokens else [name]
        return LayerStatistics(**found).told(tokens, borrowed)

    def _pool(self, moments: Mapping[str, InputMoments]) -> InputMoments:
        """Of the tokens of all."""
        if self._pooled is None:
            self._pooled = InputMoments.pooled([moments[layer.name] for layer in self._family])
        return self._pooled

    def _mean(self, name: str, accumulated: Mapping[str, Mapping[str, Accumulator]], sequences: int) -> Tensor:
        """Of those that read something."""
        if name not in self._means:
            fed = [layer.name for layer in self._family if self._tokens[layer.name]]
            total = accumulated[fed[0]][name].result(sequences).clone()
            for one in fed[1:]:
                total += accumulated[one][name].result(sequences)
            self._means[name] = torch.div(total, len(fed))
        return self._means[name]
