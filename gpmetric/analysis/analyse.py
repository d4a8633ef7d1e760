"""The analysis of a ledger, finished or not, as one document: `analyse("campaign.sqlite")`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from gpmetric.analysis.features import Feature, find_features, find_groups, merged, powers, sub_expressions
from gpmetric.analysis.lineages import Kin, find_lineages
from gpmetric.analysis.masks import compare_masks, read_sketches
from gpmetric.analysis.principles import state_principles
from gpmetric.analysis.request import AnalyseRequest
from gpmetric.analysis.statistics import FEWEST_LINEAGES, Vector, add_q_values, compare, correlate, fitness_ranks
from gpmetric.errors import GpmetricError
from gpmetric.evolution.fitness import mean_excess
from gpmetric.evolution.ledger import Ledger
from gpmetric.evolution.records import Evaluation
from gpmetric.expression import Expression, parse
from gpmetric.expression.canonical import canonical
from gpmetric.functions import as_function
from gpmetric.metrics import BASELINES, masks_only, resolve_metric, spelled
from gpmetric.operands import OPERANDS
from gpmetric.pareto import pareto_front
from gpmetric.results import AnalyseResult
from gpmetric.targets import plain_granularities

__all__ = ["analyse", "run_analysis"]

_MIN_FORMULAS = 10  # for a rank test of two halves to reach p < 0.05
_MIN_VARIED = 5  # formulas in which the power of an operand is not the commonest one
_SAME = 0.9  # share of formulas in common at which two parts tell the same
_KINDS = ("group", "operand", "primitive", "sub-expression")
_REFERENCES = {"magnitude": "abs(W)", "wanda": "abs(W)*X"}  # start formulas of every campaign that has their operands
_SAMPLES, _LENGTH = 128, 2048  # of GBLM's balance, a constant whose size is not looked at
_NOTE = (
    "A search draws formulas with selection, so these are associations, not causes. Formulas that failed or were "
    "screened out have no excess and are left out: what is compared was good enough to be measured. Formulas of one "
    "lineage are relatives: q takes lineages, not formulas, as independent."
)

_Rows = Sequence[Evaluation]


def run_analysis(request: AnalyseRequest) -> dict[str, Any]:
    """Which parts of formulas, sizes and masks go with good fitness in a campaign.

    Args:
        request: names the campaign's SQLite file, which is read, never written, and where a page of plots goes. Its
            seed is that of the subsample of formulas whose masks are compared pair by pair, of its permutation test,
            and of the signs of lineages.

    Returns:
        The JSON document of `gpmetric analyse`. Excess is ln(ppl / dense ppl) on the search text, in `unit`; mean
        excess is its mean over targets. `baselines` are the published metrics that were measured so, the best first.
        Every test holds `effect` in [-1, 1], `p` with lineages as its units (`statistics`), and `q`: p corrected for
        all tests of the document. The effect of a part of formulas is positive where it goes with a lower excess;
        every other effect is a rank correlation. A part `rests_on_few` where fewer than 6 lineages have formulas with
        it, or without it.

    Raises:
        LedgerError: the ledger cannot be used.
        GpmetricError: fewer than 10 formulas were evaluated.
    """
    document = _analysed(request.ledger, request.seed)
    if request.output is not None:
        from gpmetric.analysis.plot import draw_page  # matplotlib takes half a second to import

        draw_page(document, request.output)
    return document


analyse = as_function("analyse", AnalyseRequest, run_analysis, "ledger", result=AnalyseResult)


def _analysed(ledger: Path, seed: int) -> dict[str, Any]:
    with Ledger.read(ledger) as book:
        book.check_plugins()
        rows = book.evaluations()
        references = {name: _find_reference(book, text) for name, text in _REFERENCES.items()}
        baselines = _baselines(book)
        populations = {one.number: one.population for one in book.generations()}
        starts = {0, *(part["first_generation"] for part in book.history.get("merged", ()))}
        models = book.settings.get("models", {})
    done = [row for row in rows if row.status == "done" and row.losses]
    if len(done) < _MIN_FORMULAS:
        raise GpmetricError(
            f"ledger {ledger} holds {len(done)} evaluated formulas, but an analysis needs at least "
            f"{_MIN_FORMULAS}: let the campaign go on"
        )
    targets = list(done[0].losses)
    metrics = [resolve_metric(row.formula) for row in done]
    expressions = [metric.expression for metric in metrics]
    features = [*find_groups([metric.granularity for metric in metrics]), *find_features(expressions)]
    excess = np.array([[row.losses[target] for target in targets] for row in done])  # [formulas, targets]
    means = np.array([mean_excess(row.losses) for row in done])
    nodes = np.array([len(expression) for expression in expressions], float)
    consists = [sub_expressions(one.expression) | {one.granularity, *_names(one.expression)} for one in metrics]
    kin = find_lineages(done, consists, populations, starts)
    document: dict[str, Any] = {
        "ledger": str(ledger),
        "seed": seed,
        "formulas": len(done),
        "evaluations": len(rows),
        "targets": targets,
        "note": _NOTE,
        "unit": "nats per token" if len(models) < 2 else "wanda's mean on the same model",
        "lineages": len(set(kin.tolist())),
        "parts": _parts(features, excess, means, targets, kin, seed),
        "powers": {name: row for name in OPERANDS if (row := _powers(name, expressions, means, kin, seed))},
        "nodes": correlate(nodes, means, kin, seed),
        "target_pairs": [
            {"first": targets[a], "second": targets[b], **correlate(excess[:, a], excess[:, b], kin, seed)}
            for a, b in combinations(range(len(targets)), 2)
        ],
        "references": {name: _reference(row) for name, row in references.items()},
        "baselines": baselines,
        "masks": _masks(done, means, references, kin, seed),
        "points": _points(rows, done, nodes, means, kin),
    }
    add_q_values(document)
    return document | {"principles": state_principles(document)}


def _names(expression: Expression) -> Iterator[str]:
    return (token for token in expression.tokens if isinstance(token, str))


def _parts(
    features: Sequence[Feature], excess: Vector, means: Vector, targets: Sequence[str], kin: Kin, seed: int
) -> list[dict[str, Any]]:
    """A row per part, the strongest effect first.

    `same_as` names a part in nearly the same formulas that is told instead: a group before an operand before a
    primitive before a sub-expression, of one kind the stronger.
    """
    rows = [_part(feature, excess, means, targets, kin, seed) for feature in features]
    strength = [abs(row["effect"] or 0.0) for row in rows]
    told: list[int] = []
    for index in sorted(range(len(rows)), key=lambda index: (_KINDS.index(rows[index]["kind"]), -strength[index])):
        twins = (other for other in told if _overlap(features[index], features[other]) >= _SAME)
        twin = next(twins, None)
        if twin is not None:
            rows[index]["same_as"] = rows[twin]["name"]
        elif rows[index]["effect"] is not None:
            told.append(index)
    return [rows[index] for index in sorted(range(len(rows)), key=lambda index: (-strength[index], index))]


def _part(
    feature: Feature, excess: Vector, means: Vector, targets: Sequence[str], kin: Kin, seed: int
) -> dict[str, Any]:
    ranks = fitness_ranks(means)
    inside, outside = feature.members, ~feature.members
    both = bool(inside.any() and outside.any())
    lineages = [len(set(kin[side].tolist())) for side in (inside, outside)]
    return {
        "kind": feature.kind,
        "name": feature.name,
        "with": int(inside.sum()),
        "without": int(outside.sum()),
        "lineages_with": lineages[0],
        "lineages_without": lineages[1],
        "rests_on_few": min(lineages) < FEWEST_LINEAGES,
        "mean_rank_difference": float(ranks[inside].mean() - ranks[outside].mean()) if both else None,
        "median_rank_difference": float(np.median(ranks[inside]) - np.median(ranks[outside])) if both else None,
        "median_excess_with": float(np.median(means[inside])),
        "median_excess_without": float(np.median(means[outside])) if both else None,
        **compare(means, inside, kin, seed),
        "targets": {target: compare(excess[:, at], inside, kin, seed) for at, target in enumerate(targets)},
        "same_as": None,
    }


def _overlap(first: Feature, second: Feature) -> float:
    """Formulas that hold both parts, of those that hold either (Jaccard)."""
    return float((first.members & second.members).sum() / (first.members | second.members).sum())


def _powers(
    operand: str, expressions: Sequence[Expression], means: Vector, kin: Kin, seed: int
) -> dict[str, Any] | None:
    """How excess goes with the power of an operand, over formulas where it has one; None where there are too few."""
    found = [powers(expression, operand) for expression in expressions]
    single = [index for index, values in enumerate(found) if len(values) == 1]
    values = np.array([min(found[index]) for index in single])
    levels = [(power, means[single][values == power]) for power in np.unique(values)]
    commonest = max((len(losses) for _, losses in levels), default=0)
    if len(single) < _MIN_FORMULAS or len(single) - commonest < _MIN_VARIED:
        return None
    return {
        "formulas": len(single),
        "levels": [
            {"power": float(power), "formulas": len(losses), "median_excess": float(np.median(losses))}
            for power, losses in levels
        ],
        **correlate(values, means[single], kin[single], seed),
    }


def _find_reference(book: Ledger, formula: str) -> Evaluation | None:
    """The evaluation of a published metric, compared within rows or, where the campaign did not, in another group."""
    form = canonical(parse(formula))
    rows = (book.find_canonical(spelled(form, group)) for group in plain_granularities())
    return next((row for row in rows if row is not None), None)


def _reference(row: Evaluation | None) -> dict[str, Any] | None:
    """What a published metric lost in this campaign; None where it was not measured to the end."""
    if row is None or not row.losses:
        return None
    return {"evaluation": row.id, "formula": row.formula, "mean_excess": mean_excess(row.losses)}


def _baselines(book: Ledger) -> list[dict[str, Any]]:
    """What published metrics lost on the search text, where every formula was measured, the best first.

    Metrics that update the weights, too, are measured on validation only and are no part of it. The size of a constant
    is not looked at, since GBLM's depends on the calibration windows; each is looked for among the start formulas,
    compared as published before any other group.
    """
    given: dict[tuple[str, str], int] = {}
    for one in book.candidates(0):
        if one.canonical is not None and one.evaluation is not None:
            metric = resolve_metric(one.canonical)
            given.setdefault((metric.granularity, merged(metric.expression)), one.evaluation)
    found: list[dict[str, Any]] = []
    for name in filter(masks_only, BASELINES):
        metric = resolve_metric(name, _SAMPLES, _LENGTH)
        form = merged(canonical(metric.expression))
        groups = dict.fromkeys([metric.granularity, *plain_granularities()])
        number = next((given[group, form] for group in groups if (group, form) in given), None)
        row = None if number is None else _reference(book.evaluation(number))
        if row is not None and not any(row["evaluation"] == other["evaluation"] for other in found):
            found.append({"name": name} | row)
    return sorted(found, key=lambda row: row["mean_excess"])


def _masks(
    done: _Rows, means: Vector, references: dict[str, Evaluation | None], kin: Kin, seed: int
) -> dict[str, Any] | None:
    """None where fewer than 10 formulas have a sketch: the ledger was written before they were kept."""
    held = [index for index, row in enumerate(done) if row.sketch]
    if len(held) < _MIN_FORMULAS:
        return None
    known = {name: row.sketch for name, row in references.items() if row is not None and row.sketch}
    packed = read_sketches([*(done[index].sketch or "" for index in held), *known.values()])
    baselines = dict.fromkeys(references) | dict(zip(known, packed[len(held) :], strict=True))
    compared = compare_masks(packed[: len(held)], means[held], baselines, kin[held], seed)
    return {"evaluations": [done[index].id for index in held]} | compared


def _points(rows: _Rows, done: _Rows, nodes: Vector, means: Vector, kin: Kin) -> list[dict[str, Any]]:
    """Every evaluated formula in the order paid for.

    `front` are those no other beats in both size and mean excess; `founder` is the evaluation of the first of a line.
    """
    paid = {row.id: number for number, row in enumerate(rows, 1)}
    front = set(pareto_front(list(zip(nodes.tolist(), means.tolist(), strict=True))))
    return [
        {
            "evaluation": row.id,
            "paid": paid[row.id],
            "formula": row.formula,
            "nodes": int(nodes[index]),
            "excess": row.losses,
            "mean_excess": float(means[index]),
            "front": index in front,
            "founder": done[kin[index]].id,
        }
        for index, row in enumerate(done)
    ]
