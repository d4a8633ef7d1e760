"""Scores of some columns against the evaluator on the whole matrix, for every primitive."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gpmetric.errors import ExpressionError
from gpmetric.expression import PRIMITIVES, parse
from gpmetric.expression import columns as module
from gpmetric.expression.columns import ColumnScores
from gpmetric.expression.evaluate import evaluate
from gpmetric.operands import OPERANDS, shape_of

OUT, IN = 6, 20
UNARY = [f"{name}(abs(W)*X)+0*{name}(F)" for name, row in PRIMITIVES.items() if row.arity == 1]
FORMULAS = [
    *UNARY,
    "W",
    "abs(W)*X",
    "abs(W)**1.5*F**0.7/rownorm(G)/colnorm(W)",
    "max(W*W*D, min(abs(W), H)) - X",
    "rowsum(W)",
    "colsum(abs(W)*rowsum(W)) + 0*W",
    "mms(rownorm(W)*X) + zsn(colnorm(abs(W)+G))*abs(W)",
    "rowsum(rowsum(W)) + 2",
]


def layers(count: int, seed: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    draws = {True: torch.randn, False: torch.rand}
    return [
        {name: draws[row.signed](shape_of(name, (OUT, IN)), generator=generator) for name, row in OPERANDS.items()}
        for _ in range(count)
    ]


@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize(("start", "end"), [(0, IN), (4, 8), (19, 20)])
def test_columns_of_the_whole(formula: str, start: int, end: int) -> None:
    """Three layers, two copies of each at new weights: what the evaluator gives for each of the six."""
    found = layers(3, seed=0)
    copies = torch.randn(3, 2, OUT, IN, generator=torch.Generator().manual_seed(1))
    scores = ColumnScores(parse(formula), found)(copies, start, end)
    assert scores.shape == (3, 2, OUT, end - start)
    for layer, weights, score in zip(found, copies, scores, strict=True):
        expected = torch.stack([evaluate(parse(formula), layer | {"W": one})[:, start:end] for one in weights])
        torch.testing.assert_close(score, expected, rtol=2e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("formula", ["W*W/rownorm(W)", "abs(W)/rowsum(abs(W))", "zsn(W)*W"])
def test_a_score_does_not_depend_on_what_is_scored_with_it(formula: str) -> None:
    """To the bit, in the solver's layout of memory, where a column of all copies is contiguous."""
    found = layers(3, seed=0)
    weights = torch.randn(3, IN, 4, OUT, generator=torch.Generator().manual_seed(1)).permute(0, 2, 3, 1)
    together = ColumnScores(parse(formula), found)(weights, 4, 8)
    for layer, copies, scores in zip(found, weights, together, strict=True):
        for weight, score in zip(copies, scores, strict=True):
            assert torch.equal(ColumnScores(parse(formula), [layer])(weight[None, None], 4, 8)[0, 0], score)


def test_what_does_not_contain_the_weight_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[object, ...]] = []
    compute = module.compute
    monkeypatch.setattr(module, "compute", lambda tokens, *rest: seen.append(tokens) or compute(tokens, *rest))
    score = ColumnScores(parse("abs(W)*(F**0.5*X)/rownorm(G)"), layers(1, seed=0))
    assert seen == [("mul", "pow", "F", 0.5, "X"), ("rownorm", "G")]
    for start in range(0, IN, 4):
        score(torch.rand(1, 1, OUT, IN), start, start + 4)
    assert len(seen) == 2


def test_a_missing_operand_is_refused() -> None:
    (layer,) = layers(1, seed=0)
    del layer["F"]
    with pytest.raises(ExpressionError, match="needs operand F"):
        ColumnScores(parse("W*F"), [layer])
