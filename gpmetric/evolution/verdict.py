"""What a campaign comes to: a formula that is better than every rival on validation, or the baseline that none beats.

The winner is then measured on the test text beside the baselines, and on other draws of the calibration.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gpmetric.evolution.document import describe_metric
from gpmetric.evolution.held_out import HeldOut, HeldOutFigures, Measured, choose_winner, interval
from gpmetric.evolution.request import DiscoverRequest
from gpmetric.evolution.time_budget import TimeBudget
from gpmetric.metrics import Metric, masks_only, resolve_metric
from gpmetric.pruning.updaters import UPDATERS

__all__ = ["Tested", "Verdict", "confidence", "decide", "doubts", "measure_test", "regrouped"]


@dataclass(frozen=True)
class Verdict:
    """What validation says.

    Attributes:
        winner: a finalist, or the baseline that none is better than.
        rivals: baselines of the same kind: those that only mask, unless the campaign updates weights; the best first.
        better: whether the winner is a finalist.
        because: why, in words.
        figures: the winner's on validation.
    """

    winner: Metric
    rivals: Sequence[Metric]
    better: bool
    because: str
    figures: HeldOutFigures


def decide(request: DiscoverRequest, finalists: Measured, baselines: Measured, evaluations: int) -> Verdict:
    """The verdict on finalists and baselines, of which at least one only masks, after so many evaluations."""
    solves = UPDATERS[request.update].changes
    among = [baseline for baseline in baselines if solves or masks_only(baseline.name)]
    rivals = sorted(among, key=lambda one: baselines[one].mean)
    best = rivals[0]
    if finalists:
        winner = choose_winner(finalists, {rival: baselines[rival] for rival in rivals})
        mine, theirs = finalists[winner].mean, baselines[best].mean
        if mine < theirs:
            kind = "the best baseline" + " that only masks" * (not solves)
            because = f"mean excess on validation {mine:.4f} against {theirs:.4f} of {best.name}, {kind}"
            return Verdict(winner, rivals, True, because, finalists[winner])
    found = f"nothing better than {best.name} was found in {evaluations} evaluations"
    if not evaluations:
        found = f"time was over before one formula was evaluated; {best.name} is the best baseline on validation"
    elif not finalists:
        found += ", and there was no time to measure one of them on validation"
    return Verdict(best, rivals, False, f"{found}; go on with --resume and a larger budget", baselines[best])


@dataclass(frozen=True)
class Tested:
    """What is measured on the test text.

    Attributes:
        verdict: whose winner is measured.
        rival: the baseline that does best there, of the winner's kind and another than the winner if there is one.
        free: the best finalist without gradients.
        regrouped: the best baseline in the winner's comparison group, where it does not stand beside it.
        figures: of all of these and the baselines.
    """

    verdict: Verdict
    rival: Metric
    free: Metric | None
    regrouped: Metric | None
    figures: Measured

    def describe(self) -> dict[str, Any]:
        """The rows of the document but those of baselines as published."""
        verdict = self.verdict
        rows = {"winner": verdict.winner, "best_gradient_free": self.free, "regrouped": self.regrouped}
        told = {name: one and describe_metric(one) | self.figures[one].describe() for name, one in rows.items()}
        winner = {**(told["winner"] or {}), "validation": verdict.figures.excess}
        return told | {"winner": winner, "better": verdict.better, "because": verdict.because}

    def describe_baseline(self, baseline: Metric, on_validation: HeldOutFigures) -> dict[str, Any]:
        """A baseline's row."""
        told = self.figures[baseline].describe()
        return told | {"validation": on_validation.excess, "masks_only": masks_only(baseline.name)}


def measure_test(
    held_out: HeldOut,
    request: DiscoverRequest,
    verdict: Verdict,
    measured: tuple[Measured, Measured],
    budget: TimeBudget,
) -> Tested:
    """The winner on the test text beside baselines; `measured` are finalists and baselines on validation.

    Where time is short, the winner comes first, and then baselines, the best on validation before others.
    """
    finalists, baselines = measured
    without = [metric for metric in finalists if not metric.needs_gradients]
    free = min(without, key=lambda metric: finalists[metric].mean, default=None)
    order = [*verdict.rivals, *baselines] if budget.limited else list(baselines)
    asked = list(dict.fromkeys([verdict.winner, *order, *([free] if free else [])]))
    tested = budget.measure(held_out, asked, "test", what="metrics on test")
    others = [rival for rival in verdict.rivals if rival != verdict.winner] or verdict.rivals
    rival = min(others, key=lambda one: tested[one].mean if one in tested else math.inf)
    masking = {one: tested[one].mean for one in baselines if one in tested and masks_only(one.name)}
    moved = regrouped(masking, verdict.winner) if request.groups_matter and masking else None
    if moved is not None:
        tested |= budget.measure(held_out, [moved], "test")
    labels = [target.label for target in held_out.targets]
    tested = {one: HeldOutFigures.missing(labels) for one in asked if one not in tested} | tested
    return Tested(verdict, rival, free, moved if moved in tested else None, tested)


def doubts(tested: Tested, confidence: Mapping[str, Any]) -> list[str]:
    """What speaks against the verdict, in words.

    Args:
        tested: on the test text.
        confidence: what the function of this name returns.
    """
    verdict, found = tested.verdict, []
    mine, theirs = tested.figures[verdict.winner].mean, tested.figures[tested.rival].mean
    if theirs < mine < math.inf:
        what = "the winner" if verdict.better else verdict.winner.name
        told = (
            f"test contradicts validation: there, {tested.rival.name} has mean excess {theirs:.4f}, {what} {mine:.4f}"
        )
        found.append(told)
    if verdict.better and (bounds := confidence["interval"]) is not None and bounds[1] >= 0:
        told = f"the 95 % interval of the winner's mean excess against {tested.rival.name} over calibration draws, "
        told += f"{bounds[0]:+.4f} to {bounds[1]:+.4f}, "
        told += "holds zero: the gain may be the sample's" if bounds[0] <= 0 else "is above zero: there is no gain"
        found.append(told)
    return found


def regrouped(excess: Mapping[Metric, float], winner: Metric) -> Metric | None:
    """The best of these masking baselines, moved to the winner's comparison group; None where it stands beside it."""
    group, best = winner.granularity, min(excess, key=lambda one: excess[one])
    stands = any((one.expression, one.granularity) == (best.expression, group) for one in excess)
    return None if stands else resolve_metric(f"{group}:{best.name}")


def confidence(held_out: HeldOut, tested: Tested, draws: Sequence[str], budget: TimeBudget) -> dict[str, Any]:
    """Winner and best baseline on the test text again, each time with statistics of calibration windows drawn anew.

    A draw that would end after the deadline is not begun. A baseline that wins is compared with the next one.

    Returns:
        `draws` `asked` for and made, the `rival`, the mean excess of both by draw, and the 95 % interval of the mean
        difference over such draws: wholly below zero, the gain does not hang on the sample. Source: Efron 1979.
    """
    winner, rival = tested.verdict.winner, tested.rival
    rows: list[tuple[float, ...]] = []
    spent = 0.0 if not budget.limited else budget.draw_seconds(held_out)
    for draw in draws:
        start = budget.deadline.now()
        if spent > budget.deadline.left:
            break
        found = held_out.measure((winner, rival), "test", draw)
        if len(found) < len({winner, rival}):
            break
        rows.append((found[winner].mean, found[rival].mean))
        spent = budget.deadline.now() - start
    if len(rows) < len(draws):
        budget.cut.append(f"calibration draws: {len(rows)} of {len(draws)}")
    bounds = interval([mine - other for mine, other in rows])
    return {
        "asked": len(draws),
        "draws": len(rows),
        "rival": rival.name,
        "winner_mean_excess": [mine for mine, _ in rows],
        "rival_mean_excess": [other for _, other in rows],
        "difference": None if bounds is None else sum(bounds) / 2,
        "interval": bounds,
    }
