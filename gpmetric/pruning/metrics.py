"""Published pruning metrics as rows of one table, and the metric behind a name or a formula."""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from gpmetric.errors import ExpressionError, one_of
from gpmetric.expression import Expression, parse
from gpmetric.operands import OPERANDS
from gpmetric.pruning.target import GRANULARITIES, Granularity

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "BASELINES",
    "GROUPS",
    "UPDATES",
    "Baseline",
    "Metric",
    "Update",
    "check_update",
    "masks_only",
    "resolve_metric",
    "spelled",
]

Update = Literal["none", "obs", "obs-blockwise"]

# update -> what happens to the weights that stay
UPDATES: dict[Update, str] = {
    "none": "kept weights stay as they are",
    "obs": "SparseGPT's reconstruction of the kept weights, the mask chosen from the original ones",
    "obs-blockwise": "SparseGPT's reconstruction, the mask re-chosen in each 128-column block on the updated weights",
}


@dataclass(frozen=True)
class Baseline:
    """A published metric.

    Attributes:
        formula: in the operands of gpmetric; `{l1}` and `{l2}` stand for GBLM's balance of a mean and a sum.
        source: paper, and what differs from its code.
        granularity: where a plain number makes scores compete.
        update: the weight update that is part of the method; None leaves it to the user.
    """

    formula: str
    source: str
    granularity: Granularity = "row"
    update: Update | None = None


# With N sequences of L tokens, the published activation term is sqrt(L) * X, and the published gradients are sums of
# 100 * g: sum |100 g| = 100 N G and sqrt(sum (100 g)^2) = 100 sqrt(N H). Factors common to all scores are dropped.
BASELINES: dict[str, Baseline] = {
    "magnitude": Baseline("abs(W)", "Han et al. 2015; threshold over the matrix, as in Wanda's code", "layer"),
    "magnitude_row": Baseline("abs(W)", "magnitude compared within each output"),
    "wanda": Baseline("abs(W)*X", "Sun et al. 2023, equation 1"),
    "ria": Baseline(
        "(abs(W)/rowsum(abs(W)) + abs(W)/colsum(abs(W)))*sqrt(X)", "Zhang et al. 2024, equations 3 and 4, a = 0.5"
    ),
    "gblm_l1": Baseline("abs(W)*X + {l1}*abs(W)*G", "Das et al. 2023, equation 6, l1 gradients"),
    "gblm_l2": Baseline("abs(W)*X + {l2}*abs(W)*sqrt(H)", "Das et al. 2023, equation 6, l2 gradients"),
    "pruner_zero": Baseline("W*W*mms(sqrt(H))", "Dong et al. 2024, table 1; their G is the l2 statistic"),
    "sparsegpt": Baseline("W*W*D", "Frantar and Alistarh 2023, algorithm 1", "row", "obs-blockwise"),
}

# comparison groups that a plain-number target leaves open
GROUPS: tuple[Granularity, ...] = tuple(name for name in GRANULARITIES if name != "n:m")


@dataclass(frozen=True)
class Metric:
    """A rule giving each weight a score: a baseline or a user's formula.

    `name` is the text it was asked for by, comparison group included; `granularity` holds for plain-number targets;
    `update` None means that the caller chooses one.
    """

    name: str
    expression: Expression
    granularity: Granularity = "row"
    update: Update | None = None

    @classmethod
    def parse(cls, text: str) -> Metric:
        """The metric behind a baseline's name or a formula; see `resolve_metric`."""
        return resolve_metric(text)

    def __call__(
        self,
        W: Tensor,
        X: Tensor | None = None,
        G: Tensor | None = None,
        H: Tensor | None = None,
        D: Tensor | None = None,
        F: Tensor | None = None,
    ) -> Tensor:
        """Score [out, in], fp32, larger means keep, of a weight and the operands the formula uses.

        Args:
            W, G, H, F: [out, in].
            X, D: [in].

        Raises:
            ExpressionError: an operand is missing or has another shape.
        """
        from gpmetric.expression.evaluate import evaluate  # imports torch, which reading a formula must not

        operands = {"W": W, "X": X, "G": G, "H": H, "D": D, "F": F}
        return evaluate(self.expression, {name: value for name, value in operands.items() if value is not None})

    @property
    def needs_gradients(self) -> bool:
        """Whether the dense model's gradients (for G, H or F) must be collected."""
        return any(OPERANDS[name].cost == "gradients" for name in self.expression.operands)

    @property
    def needs_fisher(self) -> bool:
        """Whether F must be collected with them."""
        return "F" in self.expression.operands

    @property
    def needs_gram(self) -> bool:
        """Whether the score reads D; an update needs the Gram matrix whatever the score reads."""
        return "D" in self.expression.operands


def resolve_metric(text: str, sequences: int = 1, length: int = 1) -> Metric:
    """The metric behind a baseline's name or a formula, either of them behind a comparison group: `layer:abs(W)*X`.

    Args:
        text: a key of BASELINES, or a formula. `row:`, `layer:` or `block:` before it tells where a plain number makes
            its scores compete; the update obs-blockwise has its own threshold and does not ask.
        sequences: calibration sequences N, which GBLM's balance depends on.
        length: tokens per sequence L.

    Raises:
        ExpressionError: no such comparison group, or neither a known name nor a valid formula.
    """
    group, colon, rule = text.rpartition(":")
    if not colon:
        return _resolve_rule(rule, sequences, length)
    granularity = next((name for name in GROUPS if name == group), None)
    if granularity is None:
        accepted = ", ".join(f"{name}:" for name in GROUPS)
        raise ExpressionError(f"unknown comparison group {group!r:.60} in {text!r:.60}: accepted are {accepted}")
    return replace(_resolve_rule(rule, sequences, length), name=text, granularity=granularity)


def spelled(expression: Expression, group: Granularity) -> str:
    """A metric as the text `resolve_metric` reads: rows are what scores compete in where nothing is said."""
    return str(expression) if group == "row" else f"{group}:{expression}"


def masks_only(name: str) -> bool:
    """Whether a baseline leaves the kept weights as they are."""
    return BASELINES[name].update in (None, "none")


def _resolve_rule(text: str, sequences: int, length: int) -> Metric:
    baseline = BASELINES.get(text)
    if baseline is None:
        return Metric(text, _parse_formula(text))
    l1 = repr(100 * sequences / math.sqrt(length))
    l2 = repr(100 * math.sqrt(sequences / length))
    formula = baseline.formula.replace("{l1}", l1).replace("{l2}", l2)
    return Metric(text, parse(formula), baseline.granularity, baseline.update)


def check_update(text: str) -> Update:
    """The update of that name.

    Raises:
        InputError: no such update.
    """
    return one_of("--update", text, UPDATES)


def _parse_formula(text: str) -> Expression:
    try:
        return parse(text)
    except ExpressionError as error:
        if re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]+", text):  # a mistyped name rather than a formula
            close = difflib.get_close_matches(text.lower()[:60], BASELINES, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            accepted = f"{', '.join(BASELINES)}, or a formula such as abs(W)*X"
            raise ExpressionError(f"unknown metric {text!r:.60}: {hint}Accepted are {accepted}") from error
        raise
