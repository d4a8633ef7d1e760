"""What a unit's removal would cost in divergence, to second order, from gradients at gates of the dense model."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from gpmetric.blockwise.backward import run_backward
from gpmetric.blockwise.ends import ends
from gpmetric.blockwise.replay import BlockCalls, record_calls
from gpmetric.blockwise.shelf import Shelf
from gpmetric.calibration.collect import token_batches
from gpmetric.structured.scores import UnitSession

__all__ = ["removal_costs"]


def removal_costs(units: UnitSession) -> Tensor:
    """Divergence from the dense model, in nats per token, that each unit's removal alone would cost, [units], fp64.

    A gate stands on the features that a unit hands to its output layer: h -> c + m (h - c), with c their mean where a
    repair puts it back, 0 elsewhere. The divergence has no slope at m = 1, and its curvature is the Fisher information:
    half of the sum over tokens of the squared gradient of log-likelihood at the gate of that token, whose labels are
    drawn from the model itself. (Excess on validation at 0.3, repaired by least squares: llama-05m 0.095, by the text's
    own labels 0.120, without means 0.149, by first-order terms 0.41; Wanda-sp 0.298.) A sublayer whose units are not
    told apart has one gate, and each of its units an equal share. One forward and one backward pass, and a forward pass
    more, so that one block's graph is in memory.

    Source: Kwon et al. 2022 (A fast post-training pruning framework), equations 5 to 8, whose information is of
    sequences and of the text's labels.
    """
    model, sublayers = units.model, units.groups.sublayers
    request = units.request
    kinds = request.kinds
    centres = [units.features[index].mean if units.keeps_mean(index) else None for index in range(len(sublayers))]
    sums = [torch.zeros(one.units, dtype=torch.float64, device=model.device) for one in sublayers]

    def add(index: int, states: Tensor, gradient: Tensor) -> None:
        centre = centres[index]
        moved = states.float() if centre is None else states.float() - centre.float()
        slopes = (moved * gradient.float())[..., sublayers[index].columns.to(model.device)].sum(dim=-1)
        if sublayers[index].unit not in kinds:  # [batch, length, units]: all go together
            slopes = slopes.sum(dim=-1, keepdim=True).expand_as(slopes) / sublayers[index].units ** 0.5
        sums[index].add_(slopes.double().square().sum(dim=(0, 1)))

    def watch(index: int, _: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if not torch.is_grad_enabled():
            return None
        states = args[0] if args[0].requires_grad else args[0].detach().requires_grad_()
        states.register_hook(partial(add, index, states.detach()))
        return (states,)

    generator = torch.Generator(device=model.device).manual_seed(request.seed)
    calls = record_calls(model, token_batches(units.session.tokens, model.batch_tokens))
    with ExitStack() as hooks, Shelf() as shelf:
        for index, one in enumerate(sublayers):
            hooks.enter_context(one.output.register_forward_pre_hook(partial(watch, index)))
        for number in range(len(calls.batches)):
            units.session.told.progress("what units are worth", number, len(calls.batches))
            for _ in run_backward(calls, [number], partial(_loss, generator), shelf=shelf):
                pass
    units.session.told.progress("what units are worth", len(calls.batches), len(calls.batches))
    return torch.cat(sums).cpu() / (2 * units.session.tokens.numel())


def _loss(generator: torch.Generator, calls: BlockCalls, number: int, states: Tensor) -> None:
    """Adds to `states.grad` the gradient of the summed loss of labels that the model itself draws."""
    for logits, _ in ends(calls, number, states):
        with torch.no_grad():
            labels = torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)[:, 0]
        cross_entropy(logits, labels, reduction="sum").backward()
