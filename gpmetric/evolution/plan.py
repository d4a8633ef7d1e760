"""What a search consists of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from gpmetric.evolution.grammar import FORBIDDEN, Nesting, foreign_to, nests
from gpmetric.evolution.objectives import Searched
from gpmetric.evolution.request import Request, parse_nesting
from gpmetric.evolution.screening import Rung, ladder
from gpmetric.evolution.sites import Site
from gpmetric.expression.rank import RankGroup
from gpmetric.pruning.metrics import BASELINES, Metric, masks_only, resolve_metric, spelled
from gpmetric.pruning.target import Granularity, parse_target

__all__ = ["Plan", "make_plan"]

_DEFAULT_EVALUATIONS = 300
# no published metrics: Optimal Brain Damage (LeCun et al. 1990) by the empirical Fisher
_KNOWN = ("W*W*H", "W*W*F")
# where kept weights are updated: the share of it that the other inputs cannot make up for, D / X^2
_COMPENSATED = ("W*W*F*D/sqr(X)",)


@dataclass(frozen=True)
class Plan:
    """What a search consists of; together with model, texts and calibration it determines every evaluation.

    Attributes:
        targets: what an evaluation's figures are keyed by.
        start: metrics the first generation begins with.
        rivals: those of them that the winner is to be below at every target: the baselines as they are published.
        population: survivors of a generation, and new formulas drawn for one.
        rungs: the screening ladder.
        objective: what candidates are compared by.
        divergence_bar: whether a rival's divergence is a bar beside its loss, as it is where kept weights are updated.
        groups: comparison groups of plain-number targets; several are evolved with the formula.
        ranks: what rank equivalence takes for a group where a formula's is the row: whole layers under obs-blockwise,
            or where a target itself is of a layer or block.
        forbidden: (outer, inner) primitives that must not be nested.
        breeding: false draws every formula at random, as a yardstick.
        fingerprints: false pays for equal masks again, as a yardstick.
        generations, evaluations: end the search, whichever is reached first; None is no limit.
    """

    targets: tuple[str, ...]
    operands: tuple[str, ...]
    primitives: tuple[str, ...]
    start: tuple[str, ...]
    rivals: tuple[str, ...]
    population: int
    max_nodes: int
    seed: int
    rungs: tuple[Rung, ...]
    objective: Searched = "kl"
    divergence_bar: bool = False
    groups: tuple[Granularity, ...] = ("row",)
    ranks: RankGroup = "row"
    forbidden: tuple[Nesting, ...] = FORBIDDEN
    breeding: bool = True
    fingerprints: bool = True
    generations: int | None = None
    evaluations: int | None = None


def make_plan(request: Request, sites: Mapping[str, Site], targets: tuple[str, ...]) -> Plan:
    """What a request asks for on these models.

    Args:
        request: checked by `check_request`.
        sites: the models with their texts, by name.
        targets: the labels of their figures.
    """
    across_rows = any(parse_target(text).granularity in ("layer", "block") for text in request.target)
    unlimited = request.generations is None and request.evaluations is None and request.minutes is None
    forbidden = (*FORBIDDEN, *map(parse_nesting, request.forbid))
    start, rivals = _start(request, sites, forbidden)
    return Plan(
        targets=targets,
        operands=request.operands,
        primitives=request.primitives,
        start=start,
        rivals=rivals,
        population=request.population,
        max_nodes=request.max_nodes,
        seed=request.seed,
        rungs=ladder(min(len(site.splits["search"].tokens) for site in sites.values())),
        objective=request.objective,
        divergence_bar=request.objective == "kl" and request.update != "none",
        groups=request.groups,
        ranks="layer" if across_rows or request.update == "obs-blockwise" else "row",
        forbidden=forbidden,
        generations=request.generations,
        evaluations=_DEFAULT_EVALUATIONS if unlimited else request.evaluations,
    )


def _start(
    request: Request, sites: Mapping[str, Site], forbidden: tuple[Nesting, ...]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Start metrics spelled out, and which of them are rivals.

    They are the baselines that only mask, what is known besides, and the user's; where groups are searched, all of them
    once more over whole layers. Inside SparseGPT's solver its own saliency is a formula like others, and the rival.
    """
    inside = request.update == "obs-blockwise"
    sample = next(iter(sites.values())).splits["calibration"].tokens.shape
    groups = request.groups

    def written(names: Iterable[str]) -> list[Metric]:
        metrics = (resolve_metric(name, *sample) for name in names)
        return [
            replace(one, granularity=one.granularity if len(groups) > 1 else groups[0])
            for one in metrics
            if not foreign_to(request, one.expression) and not any(nests(one.expression, *pair) for pair in forbidden)
        ]

    baselines = written(name for name in BASELINES if masks_only(name) or inside)
    rivals = written(name for name in BASELINES if masks_only(name) != inside)
    known = _KNOWN if request.update == "none" else (*_KNOWN, *_COMPENSATED)
    everything = [*baselines, *written((*known, *request.start))]
    across = [replace(one, granularity="layer") for one in everything if len(groups) > 1]
    start = dict.fromkeys(spelled(one.expression, one.granularity) for one in (*everything, *across))
    return tuple(start), tuple(dict.fromkeys(spelled(one.expression, one.granularity) for one in rivals))
