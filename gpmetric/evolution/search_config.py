"""What a search consists of, made of what is asked for and the models that it is asked for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from gpmetric.evolution.grammar import FORBIDDEN, Nesting, foreign_to
from gpmetric.evolution.request import DiscoverRequest
from gpmetric.evolution.rungs import Rung, halving_rungs
from gpmetric.expression import Expression
from gpmetric.expression.rank import RankGroup
from gpmetric.metrics import BASELINES, Metric, masks_only, resolve_metric, spelled
from gpmetric.pruning.updaters import UPDATERS
from gpmetric.session.session import Session
from gpmetric.targets import parse_target

__all__ = ["SearchConfig", "make_config", "named"]

# no published metrics: Optimal Brain Damage (LeCun et al. 1990) by the empirical Fisher
_KNOWN = ("W*W*H", "W*W*F")
# where kept weights are updated: the share of it that the other inputs cannot make up for, D / X^2
_COMPENSATED = ("W*W*F*D/sqr(X)",)


@dataclass(frozen=True)
class SearchConfig:
    """What a search consists of; together with model, texts and calibration it determines every evaluation.

    Attributes:
        targets: what an evaluation's figures are keyed by.
        start: metrics the first generation begins with.
        rivals: those of them that the winner is to be below at every target: the baselines as they are published.
        population: survivors of a generation, and new formulas drawn for one.
        rungs: steps of the screening after the mask fingerprint.
        objective: what candidates are compared by, a key of OBJECTIVES.
        objective_bar: whether the rivals' lowest objective is a bar beside their lowest loss, as it is where kept
            weights are updated.
        groups: comparison groups of plain-number targets; several are evolved with the formula.
        rank_group: within which scores must keep their order for two formulas of group row to be equal: the rows, or
            whole layers where a target, or the updater's own threshold, makes scores of several outputs compete.
        forbidden: (outer, inner) primitives that must not be nested.
        breeding: false draws every formula at random, as a yardstick.
        fingerprints: false pays for equal masks again, as a yardstick.
        generations, evaluations: end the search, whichever is reached first; None is no limit.
    """

    targets: tuple[str, ...]
    operands: tuple[str, ...]
    primitives: tuple[str, ...]
    start: tuple[Metric, ...]
    rivals: tuple[Metric, ...]
    population: int
    max_nodes: int
    seed: int
    rungs: tuple[Rung, ...]
    objective: str = "kl"
    objective_bar: bool = False
    groups: tuple[str, ...] = ("row",)
    rank_group: RankGroup = "row"
    forbidden: tuple[Nesting, ...] = FORBIDDEN
    breeding: bool = True
    fingerprints: bool = True
    generations: int | None = None
    evaluations: int | None = None


def make_config(
    request: DiscoverRequest, sessions: Mapping[str, Session], targets: tuple[str, ...], forked: Sequence[str] = ()
) -> SearchConfig:
    """What a request asks for on these models, by name.

    Args:
        targets: labels of their figures.
        forked: formulas of another campaign that this one starts from, too.
    """
    sample = next(iter(sessions.values())).tokens.shape
    start, rivals = _start(request, (sample[0], sample[1]), forked)
    return SearchConfig(
        targets, request.operands, request.primitives, start, rivals, request.population, request.max_nodes,
        request.seed,
        # to make up for the blocks before, they must be pruned ones
        rungs=halving_rungs(
            min(len(session.windows["search"].tokens) for session in sessions.values()), in_use=request.fit == "dense"
        ),
        objective=request.objective,
        objective_bar=request.objective != "loss" and UPDATERS[request.update].changes,
        groups=request.groups, rank_group=_rank_group(request), forbidden=request.forbidden,
        generations=request.generations, evaluations=request.limits["evaluations"],
    )  # fmt: skip


def named(expression: Expression, group: str) -> Metric:
    """A metric whose scores compete in a group, named by its text, as the ledger knows it."""
    return Metric(spelled(expression, group), expression, group)


def _rank_group(request: DiscoverRequest) -> RankGroup:
    own = UPDATERS[request.update].granularity
    targets = [parse_target(text) for text in request.target]
    settled = [target.within(own) if own else target for target in targets]
    return "layer" if any(target.across_rows for target in settled) else "row"


def _start(
    request: DiscoverRequest, sample: tuple[int, int], forked: Sequence[str]
) -> tuple[tuple[Metric, ...], tuple[Metric, ...]]:
    """Start metrics, and which of them are rivals; `sample` is the first calibration's sequences and tokens of each.

    They are the baselines that only mask, what is known besides, and the user's; where groups are searched, all of them
    once more over whole layers. A baseline whose own updater is the campaign's, as SparseGPT's saliency inside its
    solver, is a formula like others there, and then the rival.
    """
    groups = request.groups

    def written(names: Iterable[str]) -> list[Metric]:
        metrics = (resolve_metric(name, *sample) for name in names)
        return [
            named(one.expression, one.granularity if len(groups) > 1 else groups[0])
            for one in metrics
            if not foreign_to(request, one.expression)
        ]

    masking = [name for name in BASELINES if masks_only(name)]
    own = [name for name in BASELINES if BASELINES[name].update == request.update]
    known = (*_KNOWN, *_COMPENSATED) if UPDATERS[request.update].changes else _KNOWN
    published = [name for name in BASELINES if name in (*masking, *own)]
    everything = written((*published, *known, *request.start))
    across = [named(one.expression, "layer") for one in everything if len(groups) > 1]
    start = {one.name: one for one in (*everything, *across, *written(forked))}
    rivals = {one.name: one for one in written(own or masking)}
    return tuple(start.values()), tuple(rivals.values())
