"""SparseGPT's solver by its Triton kernels: on CUDA devices where Triton is installed, and in Triton's interpreter.

Weights and masks are those of `sparsegpt`, but for the order of fp32 sums.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from torch import Tensor

from gpmetric.codegen.functions import has_kernels
from gpmetric.codegen.loading import load_remaining_score
from gpmetric.errors import GpmetricError, MaskError
from gpmetric.expression.columns import ColumnScores
from gpmetric.expression.tree import Tokens
from gpmetric.pruning import fused
from gpmetric.targets import BLOCK, Target

if TYPE_CHECKING:
    from gpmetric.kernels.launch import Operands
    from gpmetric.kernels.solver import Block, Rule

__all__ = ["solve_by_masks", "solve_by_scores", "usable"]

_KEPT = 512  # formulas whose functions are at hand

_functions = lru_cache(_KEPT)(lambda tokens, fields: load_remaining_score(tokens, dict(fields)))


def usable(weights: Tensor, columns: int) -> bool:
    """Whether the kernels can solve weights [n, out, in], so many columns at once; GPMETRIC_KERNELS=0 says no."""
    return columns <= BLOCK and weights.numel() > 0 and fused.usable(weights[0], [])


def solve_by_masks(
    weights: Tensor,
    factors: Tensor,
    count: int,
    columns: int,
    width: int,
    choose: Callable[[Tensor, int, int], Tensor],
) -> Tensor:
    """As `sparsegpt` solves it, the masks being its `choose`'s."""
    from gpmetric.kernels.solver import Given

    def rule(block: Block) -> Rule:
        return Given(choose(block.copied(), block.first, block.first + block.size))

    return _solved(weights, factors, count, rule, columns, width)


def solve_by_scores(
    weights: Tensor, factors: Tensor, targets: Sequence[Target], columns: int, scores: ColumnScores
) -> Tensor | None:
    """The pruned weights [n, targets, out, in], chosen by kernels on the way.

    Args:
        targets: all of them plain numbers, or all N:M with one M.

    Returns:
        None where only torch can choose: what has W in it is reduced or has no Triton form, or M is not of the
        kernels'.

    Raises:
        MaskError: a score is not finite.
    """
    from gpmetric.kernels.solver import GROUPS, Choice

    found, group = scores.parts(), targets[0].group
    if found is None or (group and group not in GROUPS) or not has_kernels(found[0]):
        return None
    score, operands = _prepared(*found)
    choice = Choice(weights, score, operands, [target.removed for target in targets], group)
    solved = _solved(weights, factors, len(targets), choice, columns, columns)
    if choice.bad:
        total = len(targets) * weights.numel()
        raise MaskError(f"{int(choice.bad)} of {total} scores are NaN or infinite")
    return solved


def _solved(weights: Tensor, factors: Tensor, count: int, rule: Callable[[Block], Rule], *by: int) -> Tensor:
    from triton.errors import TritonError

    from gpmetric.kernels.solver import solve

    try:
        solved: Tensor = solve(weights, factors, count, rule, *by)
    except TritonError as error:
        raise GpmetricError(f"a Triton kernel failed; GPMETRIC_KERNELS=0 does without: {error}") from error
    return solved


def _prepared(tokens: Tokens, parts: Mapping[str, Tensor]) -> tuple[Any, Operands]:
    """The score of a formula's parts, and these as its operands."""
    from gpmetric.kernels.launch import Operands

    fields = {name: _field(one) for name, one in parts.items()}
    found: dict[str, list[Tensor]] = {}
    for name, one in parts.items():
        found.setdefault(fields[name], []).append(one.float().contiguous())
    score = _functions(tokens, tuple(fields.items())).score
    return score, Operands(**{field: tuple(ones) for field, ones in found.items()})


def _field(part: Tensor) -> str:
    """Of `Operands`, for a part [n, in or 1, out or 1]."""
    _, inputs, outputs = part.shape
    if inputs > 1:
        return "matrices" if outputs > 1 else "columns"
    return "rows" if outputs > 1 else "numbers"
