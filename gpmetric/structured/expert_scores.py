"""What an expert is worth by what its router sends to it and what it makes of that."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gpmetric.structured.scores import UnitSession

__all__ = ["router_weighted_activation", "routing_frequency", "unreached"]


def router_weighted_activation(units: UnitSession) -> Tensor:
    """REAP: mean over the tokens routed to an expert of its gate times the norm of its output, [experts], fp64.

    The gate is what the architecture multiplies the output by: normalised over the chosen ones where it normalises.
    An expert that no calibration token reaches has 0.

    Source: Lasby et al. 2025 (REAP the Experts, arXiv 2510.13999), the saliency criterion.
    """
    sums, tokens = _routed(units)
    means: Tensor = sums / tokens.clamp_min(1)
    return means


def routing_frequency(units: UnitSession) -> Tensor:
    """Share of the calibration tokens that are routed to an expert, [experts], fp64; of a block k in all."""
    shares: Tensor = _routed(units)[1] / units.session.tokens.numel()
    return shares


def unreached(units: UnitSession) -> list[str]:
    """In words, that no calibration token reaches some experts."""
    count, experts = int((_routed(units)[1] == 0).sum()), units.groups.units
    told = f"no calibration token reaches {count} of {experts} experts, whose scores are 0 (--samples)"
    return [told] if count else []


def _routed(units: UnitSession) -> Tensor:
    """Sums of gate times norm, and numbers of tokens, of each expert of the dense model, [2, experts], fp64."""
    if "routed" not in units.known:
        mixtures = units.groups.mixtures
        found = [torch.zeros(2, one.units, dtype=torch.float64) for one in mixtures]
        gates: list[tuple[Tensor, Tensor]] = [(torch.empty(0), torch.empty(0))] * len(mixtures)

        def choose(index: int, _: Any, args: tuple[Tensor, ...]) -> None:
            gates[index] = args[1].reshape(-1), args[2].reshape(-1)  # [tokens * k]

        def take(index: int, expert: int, _: Any, __: Any, output: Tensor) -> None:
            chosen, weights = gates[index]
            mine = weights[chosen == expert].double()  # in the order of the tokens, as the outputs are
            found[index][0, expert] += (mine * output.double().norm(dim=-1)).sum().cpu()
            found[index][1, expert] += len(mine)

        with ExitStack() as hooks:
            for index, one in enumerate(mixtures):
                hooks.enter_context(one.experts.register_forward_pre_hook(partial(choose, index)))
                for expert, layer in enumerate(one.outputs):
                    hooks.enter_context(layer.register_forward_hook(partial(take, index, expert)))
            units.run()
        units.known["routed"] = torch.cat(found, dim=1)
    measured: Tensor = units.known["routed"]
    return measured
