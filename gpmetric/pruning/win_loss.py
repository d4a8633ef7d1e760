"""Where a metric wins and loses over several models: every model, target and text is a place that metrics meet at."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from gpmetric.metrics import BASELINES

__all__ = ["win_loss"]

Place = tuple[str, str, str]  # model, target, text
Excess = Mapping[Place, float]


def win_loss(documents: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row per metric, in the order benched, over the models that were benched to the end.

    Args:
        documents: what `gpmetric bench` returns for each model, of the same metrics, targets and texts; those with an
            `error` are left out.

    Returns:
        Rows of these keys:

        - metric, update: as in the bench. A metric with an update does more than mask.
        - excess: {model, target, text, excess} of every place: ln(ppl / dense ppl), nats per token, lower is better;
          infinite where the metric failed or the perplexity is not finite.
        - mean_excess: by model, over its targets and texts.
        - against: for every other baseline that was benched, Wanda first, {metric, update, wins, losses, ties,
          mean_ratio, lost_at}. At each place the lower excess wins; equal ones tie, two infinite ones among them.
          `lost_at` holds {model, target, text, excess, rival_excess}; `mean_ratio` is the mean over places of
          excess / rival's excess, None unless all are finite and every rival's is above zero.
    """
    updates: dict[str, str] = {}
    found: dict[str, dict[Place, float]] = {}
    for document in documents:
        for row in document["results"] if "error" not in document else ():
            updates[row["metric"]] = row["update"]
            for text, ppl in row["ppl"].items():
                place = document["model"], row["target"], text
                found.setdefault(row["metric"], {})[place] = _excess(ppl, document["dense"][text])
    rivals = sorted((name for name in found if name in BASELINES), key=lambda name: name != "wanda")
    return [
        {
            "metric": metric,
            "update": updates[metric],
            "excess": [_at(place) | {"excess": value} for place, value in excess.items()],
            "mean_excess": _means(excess),
            "against": [
                {"metric": rival, "update": updates[rival]} | _compare(excess, found[rival])
                for rival in rivals
                if rival != metric
            ],
        }
        for metric, excess in found.items()
    ]


def _excess(ppl: float, dense: float) -> float:
    return math.log(ppl / dense) if math.isfinite(ppl) and math.isfinite(dense) else math.inf


def _at(place: Place) -> dict[str, Any]:
    return dict(zip(("model", "target", "text"), place, strict=True))


def _means(excess: Excess) -> dict[str, float]:
    values: dict[str, list[float]] = {}
    for (model, _, _), value in excess.items():
        values.setdefault(model, []).append(value)
    return {model: sum(one) / len(one) for model, one in values.items()}


def _compare(excess: Excess, rival: Excess) -> dict[str, Any]:
    """Wins, losses, ties, ratio and the places lost, of one metric against another at the same places."""
    pairs = [(place, value, rival[place]) for place, value in excess.items()]
    lost = [pair for pair in pairs if pair[1] > pair[2]]
    ties = sum(value == other for _, value, other in pairs)
    comparable = all(math.isfinite(value) and 0 < other < math.inf for _, value, other in pairs)
    return {
        "wins": len(pairs) - len(lost) - ties,
        "losses": len(lost),
        "ties": ties,
        "mean_ratio": sum(value / other for _, value, other in pairs) / len(pairs) if comparable else None,
        "lost_at": [_at(place) | {"excess": value, "rival_excess": other} for place, value, other in lost],
    }
