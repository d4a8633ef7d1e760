"""Published pruning metrics as rows of one table, and the metric behind a name or a formula.

Torch is not imported: a metric is named, checked and compared in milliseconds.
"""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from gpmetric.discovered import CATALOGUE, PREFIX
from gpmetric.errors import ExpressionError
from gpmetric.expression import Expression, parse
from gpmetric.lazy import lazy
from gpmetric.operands import OPERANDS, needs_gradients
from gpmetric.outputs import check_outputs
from gpmetric.provenance import gpmetric_version
from gpmetric.targets import plain_granularities

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["BASELINES", "Baseline", "Metric", "masks_only", "resolve_metric", "spelled"]


@dataclass(frozen=True)
class Baseline:
    """A published metric.

    Attributes:
        formula: in the operands of gpmetric; `{l1}`, `{l2}` and `{rgs}` stand for the balance of a mean and a sum.
        source: paper, and what differs from its code.
        granularity: where a plain number makes scores compete.
        update: the weight update that is part of the method; None leaves it to the user.
    """

    formula: str
    source: str
    granularity: str = "row"
    update: str | None = None

    def balanced(self, sequences: int, length: int) -> str:
        """The formula for so many calibration sequences of so many tokens."""
        l1, l2 = 100 * sequences / math.sqrt(length), 100 * math.sqrt(sequences / length)
        factors = {"{l1}": l1, "{l2}": l2, "{rgs}": 100 / math.sqrt(sequences * length)}
        formula = self.formula
        for name, factor in factors.items():
            formula = formula.replace(name, repr(factor))
        return formula


# With N sequences of L tokens, the published activation term is sqrt(L) * X, and the published gradients are sums of
# 100 * g: sum |100 g| = 100 N G and sqrt(sum (100 g)^2) = 100 sqrt(N H). Wanda++ has 100 R beside the norm over all
# tokens, sqrt(N L) * X. Factors common to all scores are dropped.
BASELINES: dict[str, Baseline] = {
    "magnitude": Baseline("abs(W)", "Han et al. 2015; threshold over the matrix, as in Wanda's code", "layer"),
    "magnitude_row": Baseline("abs(W)", "magnitude compared within each output"),
    "wanda": Baseline("abs(W)*X", "Sun et al. 2023, equation 1"),
    "ria": Baseline(
        "(abs(W)/rowsum(abs(W)) + abs(W)/colsum(abs(W)))*sqrt(X)", "Zhang et al. 2024, equations 3 and 4, a = 0.5"
    ),
    "gblm_l1": Baseline("abs(W)*X + {l1}*abs(W)*G", "Das et al. 2023, equation 6, l1 gradients"),
    "gblm_l2": Baseline("abs(W)*X + {l2}*abs(W)*sqrt(H)", "Das et al. 2023, equation 6, l2 gradients"),
    "wandapp_rgs": Baseline(
        "abs(W)*X + {rgs}*abs(W)*R",
        "Yang et al. 2025 (Wanda++), regional gradient score with 100, of mean absolute gradients, not root mean "
        "squares; without their rounds, which are the update `block`, and scored once, not before every round",
    ),
    "pruner_zero": Baseline("W*W*mms(sqrt(H))", "Dong et al. 2024, table 1; their G is the l2 statistic"),
    "sparsegpt": Baseline("W*W*D", "Frantar and Alistarh 2023, algorithm 1", "row", "obs-blockwise"),
    "alps": Baseline("abs(W)*X", "Meng et al. 2024, algorithm 1, with fixed penalties", "layer", "admm"),
}


_to_latex = lazy("gpmetric.formats.latex:to_latex")
_formula_text = lazy("gpmetric.formats:formula_text")
_export_expression = lazy("gpmetric.formats:export_expression")


@dataclass(frozen=True, repr=False)
class Metric:
    """A rule giving each weight a score: a baseline or a user's formula.

    `name` is the text it was asked for by, comparison group included; `granularity` holds for plain-number targets;
    `update` and `fit` None mean that the caller chooses one.
    """

    name: str
    expression: Expression
    granularity: str = "row"
    update: str | None = None
    fit: str | None = None

    @classmethod
    def parse(cls, text: str) -> Metric:
        """The metric behind a baseline's name or a formula; see `resolve_metric`."""
        return resolve_metric(text)

    def __call__(self, W: Tensor, *others: Tensor | None, **operands: Tensor | None) -> Tensor:
        """Score [out, in], fp32, larger means keep, of a weight and the operands the formula uses.

        Args:
            W: [out, in].
            others, operands: each of the shape that its row of OPERANDS says, [out, in] or [in]; in the table's order,
                or by name.

        Raises:
            ExpressionError: an operand is missing, unknown, given twice, or has another shape.
        """
        from gpmetric.expression.evaluate import evaluate  # imports torch, which reading a formula must not

        unknown = next((name for name in operands if name not in OPERANDS), None)
        if unknown is not None:
            raise ExpressionError(f"unknown operand {unknown!r}: accepted are {', '.join(OPERANDS)}")
        names = [name for name in OPERANDS if name != "W"]
        placed = dict(zip(names, others, strict=False))
        if len(others) > len(names) or placed.keys() & operands.keys():
            raise ExpressionError(f"each operand is given once, in the order of {', '.join(OPERANDS)} or by name")
        given = placed | operands | {"W": W}
        return evaluate(self.expression, {name: value for name, value in given.items() if value is not None})

    def __str__(self) -> str:
        """The formula, as every command reads it: with its comparison group where that is not the row."""
        return spelled(self.expression, self.granularity)

    def __repr__(self) -> str:
        formula = "" if self.name == str(self) else f": {self}"
        return f"<Metric {self.name}{formula}{f'; update {self.update}' if self.update else ''}>"

    @property
    def latex(self) -> str:
        """The formula as LaTeX mathematics without delimiters; needs amsmath."""
        return str(_to_latex(self.expression))

    def _repr_latex_(self) -> str:
        return f"$\\displaystyle {self.latex}$"

    def export(self, format: str = "python", path: str | Path | None = None, *, force: bool = False) -> str:
        """The formula as a self-contained file, as `gpmetric export` writes it; a file of Python defines `score`.

        Args:
            format: python, triton, latex, sympy or json.
            path: where to write it; nowhere by default.
            force: replace a file that gpmetric did not write.

        Returns:
            The text of the file.

        Raises:
            InputError: no such format, or the path holds what gpmetric did not write.
            GpmetricError: the file cannot be written, or fails its check.
        """
        if path is None:
            return str(_formula_text(self.expression, format, gpmetric_version(), self.granularity))
        check_outputs({"path": (Path(path), "formula")}, [], force=force)
        _export_expression(self.expression, format, path, gpmetric_version(), self.granularity)
        return Path(path).read_text(encoding="utf-8")

    @property
    def operands(self) -> tuple[str, ...]:
        """What its score reads besides the weight, by name."""
        return tuple(name for name in self.expression.operands if name != "W")

    @property
    def needs_gradients(self) -> bool:
        """Whether the dense model's gradients must be collected."""
        return needs_gradients(self.expression.operands)


def resolve_metric(text: str, sequences: int = 1, length: int = 1) -> Metric:
    """The metric behind a name or a formula, either of them behind a comparison group or not: `layer:abs(W)*X`.

    Args:
        text: a key of BASELINES, one of CATALOGUE behind `catalogue:`, or a formula. `row:`, `layer:` or `block:`
            before it tells where a plain number makes its scores compete; the update obs-blockwise has its own
            threshold and does not ask.
        sequences: calibration sequences N, which GBLM's balance depends on.
        length: tokens per sequence L.

    Raises:
        ExpressionError: no such comparison group, or neither a known name nor a valid formula.
    """
    if not isinstance(text, str):
        raise ExpressionError(f"a metric is a name or a formula, but got {text!r:.60}")
    text = text.strip()
    group, colon, rule = text.rpartition(":")
    if group.rpartition(":")[2] == PREFIX:
        return _from_catalogue(text, group.rpartition(":")[0], rule)
    if colon and group not in plain_granularities():
        accepted = ", ".join(f"{name}:" for name in plain_granularities())
        raise ExpressionError(f"unknown comparison group {group!r:.60} in {text!r:.60}: accepted are {accepted}")
    baseline = BASELINES.get(rule)
    try:
        expression = parse(baseline.balanced(sequences, length) if baseline else rule)
    except ExpressionError as error:
        if re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]+", rule):  # a mistyped name rather than a formula
            close = difflib.get_close_matches(rule.lower()[:60], BASELINES, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            accepted = f"{', '.join(BASELINES)}, or a formula such as abs(W)*X"
            raise ExpressionError(f"unknown metric {rule!r:.60}: {hint}Accepted are {accepted}") from error
        raise
    if baseline:
        return Metric(text, expression, group or baseline.granularity, baseline.update)
    return Metric(text, expression, group or "row")


def _from_catalogue(text: str, group: str, name: str) -> Metric:
    if name not in CATALOGUE:
        close = difflib.get_close_matches(name.lower()[:60], CATALOGUE, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ExpressionError(f"unknown formula {text!r:.60}: {hint}Accepted are {', '.join(CATALOGUE)}")
    entry = CATALOGUE[name]
    found = resolve_metric(f"{group or entry.group}:{entry.expression}")
    return replace(found, name=text, update=entry.update, fit=entry.fit)


def spelled(expression: Expression, group: str) -> str:
    """A metric as the text `resolve_metric` reads: rows are what scores compete in where nothing is said."""
    return str(expression) if group == "row" else f"{group}:{expression}"


def masks_only(name: str) -> bool:
    """Whether a baseline leaves the kept weights as they are."""
    return BASELINES[name].update in (None, "none")
