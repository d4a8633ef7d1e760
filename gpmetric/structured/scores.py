"""What each unit is worth by a rule: the start of a policy, and the published baselines.

Most rules score the weights of a sublayer's output layer, [out, features]; a unit's score is the mean over its features
of the sums over the outputs.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from gpmetric.calibration.collect import collect, token_batches
from gpmetric.errors import GpmetricError
from gpmetric.metrics import resolve_metric
from gpmetric.models import Block, Layer, Model
from gpmetric.operands import shape_of
from gpmetric.session.session import Session
from gpmetric.structured.groups import Groups, find_groups
from gpmetric.structured.request import UNIT_RULES, SlimRequest

__all__ = [
    "Features",
    "UnitSession",
    "block_influence",
    "fluctuation",
    "noise",
    "read_by",
    "score_bytes",
    "standardised",
    "unit_scores",
]


@dataclass(frozen=True)
class Features:
    """Moments of the inner features of a sublayer over the calibration tokens, each [features], fp64."""

    mean: Tensor
    square: Tensor
    products: Tensor | None = None  # second moments of pairs, [features, features], where they were asked for


@dataclass(frozen=True)
class UnitSession:
    """A session whose model is cut into units, and what they are scored by."""

    session: Session
    groups: Groups
    products: bool = False  # whether second moments of pairs of features are wanted, too
    known: dict[Hashable, Tensor] = field(default_factory=dict, repr=False, compare=False)  # scores by what they are of

    @property
    def model(self) -> Model:
        return self.session.model

    @property
    def request(self) -> SlimRequest:
        """What the session was opened for."""
        request = self.session.inputs
        assert isinstance(request, SlimRequest)
        return request

    def asked(self, request: SlimRequest) -> UnitSession:
        """The same model for another request of the same windows and seed; what was measured is measured once."""
        found = replace(
            self, session=replace(self.session, inputs=request), groups=find_groups(self.model, request.kinds)
        )
        vars(found)["features"] = self.features
        return found

    @cached_property
    def features(self) -> list[Features]:
        """By sublayer, of the model as it is, dense, on the calibration text."""
        sums: list[list[Any]] = [[0.0, 0.0, 0.0] for _ in self.groups.sublayers]

        def take(index: int, _: Any, args: tuple[Tensor, ...]) -> None:
            rows = args[0].reshape(-1, args[0].shape[-1]).double()
            found = (rows.sum(dim=0), rows.square().sum(dim=0), rows.t() @ rows if self.products else 0.0)
            sums[index] = [total + one for total, one in zip(sums[index], found, strict=True)]

        with ExitStack() as hooks:
            for index, one in enumerate(self.groups.sublayers):
                hooks.enter_context(one.output.register_forward_pre_hook(partial(take, index)))
            self.run()
        count = self.session.tokens.numel()
        means = ([total / count for total in one] for one in sums)
        return [Features(mean, square, pairs if self.products else None) for mean, square, pairs in means]

    def keeps_mean(self, index: int) -> bool:
        """Whether the repair that was asked for can put back the mean of what a sublayer loses."""
        request, output = self.request, self.groups.sublayers[index].output
        return request.mended != "none" and (
            request.mended == "least-squares" or request.add_bias or output.bias is not None
        )

    @torch.no_grad()
    def run(self) -> None:
        """Runs the model over the calibration text, for who watches."""
        progress, batches = self.session.told.progress, token_batches(self.session.tokens)
        for done, batch in enumerate(batches):
            progress("features of units", done, len(batches))
            self.model.module.base_model(input_ids=batch.to(self.model.device), use_cache=False)
        progress("features of units", len(batches), len(batches))

    def by_unit(self, features: Sequence[Tensor]) -> Tensor:
        """Scores of features, [features] by output layer, as means over those of each unit, [units]."""
        if self.groups.mixtures:
            return torch.stack([mine.cpu().mean() for mine in features])
        pairs = zip(self.groups.sublayers, features, strict=True)
        return torch.cat([mine.cpu()[one.columns].mean(dim=1) for one, mine in pairs])


def unit_scores(name: str, units: UnitSession) -> Tensor:
    """Score of each unit [units], fp64, larger means keep; comparable in a sublayer, by a `global` rule everywhere.

    Args:
        name: a key of UNIT_RULES, or a metric or formula of weights.
        units: of a dense model.

    Raises:
        ExpressionError: neither a rule nor a formula.
        GpmetricError: a score is not finite.
    """
    means = tuple(units.keeps_mean(index) for index in range(len(units.groups.sublayers)))
    place = name, frozenset(units.request.kinds), means
    if place not in units.known:
        rule = UNIT_RULES.get(name)
        by_rule = None if rule is None else rule.experts if units.groups.mixtures else rule.score
        found: Tensor = _by_metric(_metric_of(name), units) if by_rule is None else by_rule(units)
        if not found.isfinite().all():
            raise GpmetricError(f"{name!r} gives units scores that are not finite")
        units.known[place] = found
    return units.known[place]


def read_by(name: str) -> frozenset[str]:
    """Names of the statistics that units are scored by."""
    rule = UNIT_RULES.get(name)
    scored = name not in ("auto", "constant") and (rule is None or rule.metric is not None)
    return frozenset(resolve_metric(_metric_of(name)).operands if scored else ())


def score_bytes(name: str, groups: Groups, *, products: bool) -> int:
    """Memory of what units are scored and repaired by: statistics of output layers, moments of pairs of features."""
    shapes = [Layer("", one).weight.shape for one in groups.outputs]
    statistics = sum(4 * math.prod(shape_of(one, shape)) for one in read_by(name) for shape in shapes)
    return statistics + (sum(8 * shape[1] ** 2 for shape in shapes) if products else 0)


def _metric_of(name: str) -> str:
    rule = UNIT_RULES.get(name)
    return name if rule is None or rule.metric is None else rule.metric


def standardised(groups: Groups, scores: Tensor) -> Tensor:
    """Scores [units] less the mean of their sublayer, in its standard deviations; 0 where all of a sublayer are alike.

    Source: the published code of Gao et al. 2025, whose probabilities begin with the logistic function of it.
    """
    return torch.cat([_standard(mine) for mine in groups.split(scores)])


def noise(units: UnitSession) -> Tensor:
    """Uniform in [0, 1), [units]."""
    generator = torch.Generator().manual_seed(units.session.inputs.seed)
    return torch.rand(units.groups.units, generator=generator, dtype=torch.float64)


def fluctuation(units: UnitSession) -> Tensor:
    """FLAP's score: variance of a feature times squared norm of its weights, standardised in the sublayer, [units].

    Source: An et al. 2024, equations 5 and 6; their code squares those of attentions before.
    """
    found = []
    for one, moments in zip(units.groups.sublayers, units.features, strict=True):
        variance = (moments.square - moments.mean.square()).clamp_min(0)
        scores = one.weight.double().square().sum(dim=0) * variance
        found.append(_standard(scores.square() if one.kind.attends else scores))
    return units.by_unit(found)


@torch.no_grad()
def block_influence(units: UnitSession) -> Tensor:
    """1 - mean cosine of a block's input and output, for all units of a block alike, [units].

    Source: Men et al. 2024 (ShortGPT), equation 1.
    """
    model, groups, tokens = units.model, units.groups, units.session.tokens
    turned = torch.zeros(len(model.blocks), dtype=torch.float64)

    def take(index: int, _: Any, args: tuple[Tensor, ...], output: Any) -> None:
        after = output[0] if isinstance(output, tuple) else output
        turned[index] += (1 - torch.cosine_similarity(args[0].float(), after.float(), dim=-1)).double().sum().cpu()

    with ExitStack() as hooks:
        for index, block in enumerate(model.blocks):
            hooks.enter_context(block.module.register_forward_hook(partial(take, index)))
        units.run()
    return turned[[one.block for one in groups.sublayers]][groups.sublayer_of] / tokens.numel()


def _by_metric(text: str, units: UnitSession) -> Tensor:
    """A metric's scores of the output layers' weights, summed over outputs, [units], fp64."""
    model, metric = units.model, resolve_metric(text, *units.session.tokens.shape)
    known = {layer.module: layer for layer in model.layers}
    layers = [known[one] for one in units.groups.outputs]
    outputs = tuple(Block(block.module, tuple(one for one in layers if one in block.layers)) for block in model.blocks)
    statistics = collect(replace(model, blocks=outputs), units.session.tokens, metric.operands).layers
    scores = (metric(layer.weight, **statistics[layer.name].operands) for layer in layers)
    return units.by_unit([score.sum(dim=0, dtype=torch.float64) for score in scores])


def _standard(scores: Tensor) -> Tensor:
    spread = scores.std() if len(scores) > 1 else torch.zeros(())
    alike = spread <= 1e-12 * scores.abs().max()
    return torch.zeros_like(scores) if alike else (scores - scores.mean()) / spread
