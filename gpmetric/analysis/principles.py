"""Principles in words: the significant findings of an analysis as sentences with their figures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["state_principles"]

_SIGNIFICANT = 0.05  # q below which a finding is told
_MOST = 10


def state_principles(document: Mapping[str, Any]) -> list[str]:
    """At most 10 sentences, the strongest effect first; none where nothing has q < 0.05.

    Args:
        document: of `analyse`, with every q set. A part that goes with nearly the same formulas as a stronger one is
            not told again, nor is one that rests on few lineages, and of all pairs of targets only the one that agrees
            least is.
    """
    findings = [*_parts(document), *_powers(document), *_nodes(document), *_targets(document), *_masks(document)]
    findings.sort(key=lambda finding: -abs(finding[0]))
    return [sentence for _, sentence in findings[:_MOST]]


Findings = Iterator[tuple[float, str]]  # effect and sentence


def _significant(test: Mapping[str, Any]) -> bool:
    return test["q"] is not None and test["q"] < _SIGNIFICANT


def _figures(test: Mapping[str, Any]) -> str:
    """`effect +0.43, q < 0.001`"""
    q = "q < 0.001" if test["q"] < 0.001 else f"q = {test['q']:.3f}"
    return f"effect {test['effect']:+.2f}, {q}"


def _parts(document: Mapping[str, Any]) -> Findings:
    for row in document["parts"]:
        if row["same_as"] is not None or row["rests_on_few"]:
            continue
        lineages = f"{row['lineages_with']} and {row['lineages_without']} lineages"
        counts = f"{row['with']} against {row['without']} formulas of {lineages}"
        better, worse = _targets_by_sign(row)
        if _significant(row):
            sentence = f"Formulas with {row['name']} {_difference(row)} ({counts}, {_figures(row)})"
            yield row["effect"], sentence + _by_target(row) + "."
        elif better and worse:  # what helps at one target and hurts at another may do nothing on the mean
            sides = [f"{name} ({_figures(row['targets'][name])})" for name in (better[0], worse[0])]
            sentence = f"Formulas with {row['name']} do better at {sides[0]} but worse at {sides[1]}, {counts}."
            yield row["targets"][better[0]]["effect"], sentence


def _targets_by_sign(row: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Targets at which formulas with the part do significantly better, and worse; the strongest effect first."""
    tests = {target: test["effect"] for target, test in row["targets"].items() if _significant(test)}
    ordered = sorted(tests, key=lambda target: -abs(tests[target]))
    return [target for target in ordered if tests[target] > 0], [target for target in ordered if tests[target] < 0]


def _difference(row: Mapping[str, Any]) -> str:
    """How the medians of mean excess differ; in ranks only, where the medians do not differ as the ranks do."""
    inside, outside = row["median_excess_with"], row["median_excess_without"]
    better = row["effect"] > 0
    if (inside < outside) != better or inside == outside:
        return f"rank {'better' if better else 'worse'} than those without"
    more = "less" if better else "more"
    if outside <= 0 or inside <= 0:
        return f"lose {abs(inside - outside):.4f} nats {more} than those without"
    if inside > 2 * outside:
        return f"lose {inside / outside:.1f} times as much as those without"
    return f"lose {100 * abs(inside / outside - 1):.1f} % {more} than those without"


def _by_target(row: Mapping[str, Any]) -> str:
    """Where the effect is largest, and where it is significantly the other way round."""
    better, worse = _targets_by_sign(row)
    along, against = (better, worse) if row["effect"] > 0 else (worse, better)
    most = f", most at {along[0]}" if along and len(row["targets"]) > 1 else ""
    return most + (f", but the other way round at {' and '.join(against)}" if against else "")


def _powers(document: Mapping[str, Any]) -> Findings:
    for operand, row in document["powers"].items():
        if _significant(row):
            which = "lower" if row["effect"] > 0 else "higher"
            figures = f"{row['formulas']} formulas, {_figures(row)}"
            yield row["effect"], f"The {which} the power of {operand}, the less is lost ({figures})."


def _nodes(document: Mapping[str, Any]) -> Findings:
    row = document["nodes"]
    if _significant(row):
        which = "Smaller" if row["effect"] > 0 else "Larger"
        yield row["effect"], f"{which} formulas lose less ({document['formulas']} formulas, {_figures(row)})."


def _targets(document: Mapping[str, Any]) -> Findings:
    pairs = [pair for pair in document["target_pairs"] if _significant(pair)]
    if pairs:
        least = min(pairs, key=lambda pair: pair["effect"])
        same = "also does well" if least["effect"] > 0 else "does badly"
        others = " (of all pairs of targets these agree least)" if len(pairs) > 1 else ""
        sentence = f"What does well at {least['first']} {same} at {least['second']}{others} ({_figures(least)})."
        yield least["effect"], sentence


def _masks(document: Mapping[str, Any]) -> Findings:
    masks = document["masks"]
    if masks is None:
        return
    references = {name: row for name, row in masks["references"].items() if row is not None}
    for name, row in {"the best formula": masks["to_best"], **references}.items():
        if _significant(row):
            which = "nearer to" if row["effect"] > 0 else "farther from"
            figures = f"{masks['formulas']} formulas, {_figures(row)}"
            yield row["effect"], f"Masks {which} those of {name} lose less ({figures})."
    pairs = masks["pairs"]
    if _significant(pairs):
        which = "more" if pairs["effect"] > 0 else "less"
        figures = f"{pairs['formulas']} formulas, {_figures(pairs)}"
        yield pairs["effect"], f"The more two masks differ, the {which} does what they lose ({figures})."
