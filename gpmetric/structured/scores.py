"""What each unit is worth by a rule: the start of a policy, and the published baselines.

A rule scores the weights of a part's output layer, [out, features]; a unit's score is the mean over its features of the
sums over the outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gpmetric.calibration.collect import collect_statistics, token_batches
from gpmetric.errors import GpmetricError
from gpmetric.models import Block, Layer, Model
from gpmetric.pruning.metrics import resolve_metric
from gpmetric.pruning.prune import score_weight
from gpmetric.structured.groups import Groups, Part, read_output
from gpmetric.structured.request import RULES

__all__ = ["Features", "block_influence", "collect_features", "standardised", "unit_scores"]


@dataclass(frozen=True)
class Features:
    """Moments of the inner features of a part over the calibration tokens, each [features], fp64.

    Attributes:
        products: second moments of pairs, [features, features], where they were asked for.
    """

    mean: Tensor
    square: Tensor
    products: Tensor | None = None

    @property
    def variance(self) -> Tensor:
        return (self.square - self.mean.square()).clamp_min(0)


@torch.no_grad()
def collect_features(model: Model, groups: Groups, tokens: Tensor, *, products: bool = False) -> list[Features]:
    """Moments by part, of the model as it is, over windows [n, length]."""
    sums: list[Any] = [None] * len(groups.parts)
    count = tokens.numel()

    def take(index: int, _: Any, args: tuple[Tensor, ...]) -> None:
        rows = args[0].reshape(-1, args[0].shape[-1]).double()
        found = (rows.sum(dim=0), rows.square().sum(dim=0), rows.t() @ rows if products else None)
        before = sums[index]
        sums[index] = (
            found
            if before is None
            else tuple(None if one is None else one + other for one, other in zip(before, found, strict=True))
        )

    with ExitStack() as hooks:
        for index, part in enumerate(groups.parts):
            layer = getattr(part.module, part.output)
            hooks.enter_context(layer.register_forward_pre_hook(partial(take, index)))
        for batch in token_batches(tokens):
            model.module.base_model(input_ids=batch.to(model.device), use_cache=False)
    return [
        Features(mean / count, square / count, pairs if pairs is None else pairs / count)
        for mean, square, pairs in sums
    ]


def unit_scores(
    model: Model, groups: Groups, name: str, tokens: Tensor, features: Sequence[Features], generator: torch.Generator
) -> Tensor:
    """Score of each unit [units], fp64, larger means keep; comparable within a part, by RULES' global ones everywhere.

    Args:
        name: a key of RULES, or a metric or formula of weights.
        tokens: [windows, length], the calibration text.
        features: of the dense model on it.
        generator: of `random`.

    Raises:
        ExpressionError: neither a rule nor a formula.
        GpmetricError: a score is not finite.
    """
    rule = RULES.get(name)
    if name == "random":
        return torch.rand(groups.units, generator=generator, dtype=torch.float64)
    if name == "block_influence":
        return block_influence(model, groups, tokens)
    if name == "flap":
        scores = [_fluctuation(part, one) for part, one in zip(groups.parts, features, strict=True)]
    else:
        scores = _scored(model, groups, name if rule is None or rule.metric is None else rule.metric, tokens)
    found = torch.cat([one.cpu()[part.columns].mean(dim=1) for part, one in zip(groups.parts, scores, strict=True)])
    if not found.isfinite().all():
        raise GpmetricError(f"{name!r} gives units scores that are not finite")
    return found


def standardised(groups: Groups, scores: Tensor) -> Tensor:
    """Scores [units] less the mean of their part, in its standard deviations; 0 where all of a part are alike.

    Source: the published code of Gao et al. 2025, whose probabilities begin with the logistic function of it.
    """
    return torch.cat([_standard(mine) for mine in groups.split(scores)])


@torch.no_grad()
def block_influence(model: Model, groups: Groups, tokens: Tensor) -> Tensor:
    """1 - mean cosine of a block's input and output, for all units of a block alike, [units].

    Source: Men et al. 2024 (ShortGPT), equation 1.
    """
    turned = torch.zeros(len(model.blocks), dtype=torch.float64)

    def take(index: int, _: Any, args: tuple[Tensor, ...], output: Any) -> None:
        after = output[0] if isinstance(output, tuple) else output
        turned[index] += (1 - torch.cosine_similarity(args[0].float(), after.float(), dim=-1)).double().sum().cpu()

    with ExitStack() as hooks:
        for index, block in enumerate(model.blocks):
            hooks.enter_context(block.module.register_forward_hook(partial(take, index)))
        for batch in token_batches(tokens):
            model.module.base_model(input_ids=batch.to(model.device), use_cache=False)
    return turned[[part.block for part in groups.parts]][groups.part] / tokens.numel()


def _scored(model: Model, groups: Groups, metric: str, tokens: Tensor) -> list[Tensor]:
    """By part, the sum over outputs of the scores of its output layer, [features], fp64."""
    rule = resolve_metric(metric, *tokens.shape)
    layers = [_layer(model, part) for part in groups.parts]
    outputs = [Block(block.module, tuple(one for one in layers if one in block.layers)) for block in model.blocks]
    statistics = collect_statistics(
        replace(model, blocks=tuple(outputs)),
        tokens,
        gradients=rule.needs_gradients,
        fisher=rule.needs_fisher,
        gram=rule.needs_gram,
    )
    return [
        score_weight(layer.weight, rule, statistics.layers[layer.name]).sum(dim=0, dtype=torch.float64).cpu()
        for layer in layers
    ]


def _layer(model: Model, part: Part) -> Layer:
    """The output layer of a part."""
    module = getattr(part.module, part.output)
    return next(layer for layer in model.blocks[part.block].layers if layer.module is module)


def _fluctuation(part: Part, features: Features) -> Tensor:
    """FLAP's score of each feature [features]: variance times squared norm of its weights, standardised in the part.

    Source: An et al. 2024, equations 5 and 6; their code squares those of attentions before.
    """
    found = read_output(part).double().square().sum(dim=0) * features.variance
    return _standard(found.square() if part.kind == "head" else found)


def _standard(scores: Tensor) -> Tensor:
    spread = scores.std() if len(scores) > 1 else torch.zeros(())
    alike = spread <= 1e-12 * scores.abs().max()
    return torch.zeros_like(scores) if alike else (scores - scores.mean()) / spread
