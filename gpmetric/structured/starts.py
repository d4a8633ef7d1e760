"""What a search begins from: probabilities made of a rule's scores, and the best of several rules, measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gpmetric.structured.policy import initial
from gpmetric.structured.request import UNIT_RULES, SlimRequest
from gpmetric.structured.scores import UnitSession, standardised, unit_scores
from gpmetric.structured.unit_space import Pool, UnitSpace

__all__ = ["Start", "best_start", "make_start", "started_from"]

_OPEN = 0.9  # probability that a gate begins with


@dataclass(frozen=True)
class Start:
    """What a rule says of each atom, and the probabilities to begin with."""

    name: str  # `constant`, a key of UNIT_RULES, or a metric of weights
    worth: Tensor  # [atoms], standardised
    probabilities: Tensor  # [entries]
    compared: Mapping[str, float]  # objective of each start that was measured, by name


def started_from(request: SlimRequest) -> tuple[str, ...]:
    """Names of the starts that a request stands for: of `auto`, all rules that tell apart what may go."""
    if request.start != "auto":
        return (request.start,)
    whole = request.layers or request.blocks
    tried = {name: rule for name, rule in UNIT_RULES.items() if rule.tried and rule.tells(experts=request.experts)}
    if request.experts:
        return tuple(tried)
    # a rule that is standardised in a sublayer says nothing of whole ones
    return tuple(name for name, rule in tried.items() if (whole if rule.blocks else request.kinds or rule.loss))


def make_start(name: str, units: UnitSession, space: UnitSpace, pools: Sequence[Pool], estimator: str) -> Start:
    """Probabilities by one rule.

    Raises:
        ExpressionError, GpmetricError: see `unit_scores`.
    """
    worth = _worth(name, units, space)
    return Start(name, worth, initial(space, pools, worth, _OPEN, estimator), {})


def best_start(starts: Sequence[Start], measure: Callable[[Tensor], float]) -> Start:
    """The start whose model is best, the first of equals; all are told what they were compared by.

    Args:
        starts: at least one; a single one is not measured.
        measure: the objective of the model that probabilities [entries] deliver.
    """
    if len(starts) == 1:
        return starts[0]
    figures = {one.name: measure(one.probabilities) for one in starts}
    best = min(starts, key=lambda one: figures[one.name])
    return replace(best, compared=figures)


def _worth(name: str, units: UnitSession, space: UnitSpace) -> Tensor:
    """Score of each atom [atoms] by a rule, standardised in its sublayer; globally, where it is a loss for a cost."""
    found = torch.zeros(len(space.cost), dtype=torch.float64)
    if name == "constant":
        return found
    scores = unit_scores(name, units)
    free = space.atom >= 0
    rule = UNIT_RULES.get(name)
    if rule is not None and rule.loss:
        found.index_add_(0, space.atom[free], scores[free])
        prices = found / space.cost
        return _standard(prices.clamp_min(1e-12 * float(prices.max()) + 1e-300).log())
    scores = _standard(scores) if rule is not None and rule.blocks else standardised(units.groups, scores)
    sizes = torch.zeros_like(found).index_add_(0, space.atom[free], torch.ones_like(scores)[free])
    return found.index_add_(0, space.atom[free], scores[free]) / sizes


def _standard(scores: Tensor) -> Tensor:
    return (scores - scores.mean()) / scores.std().clamp_min(1e-12)
