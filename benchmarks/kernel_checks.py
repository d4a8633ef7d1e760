"""Do the kernels, or the CPU path, choose as a stable sort of torch's scores does? `bench_kernels.py` asks first.

Formulas of + - * / abs and sqrt must be pruned bit for bit alike. Others differ by the order of their sums, so that a
weight within a few ulps of its group's threshold may go in place of another; how many groups do is told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from gpmetric.codegen.loading import load_functions
from gpmetric.expression import Expression, parse
from gpmetric.expression.evaluate import evaluate
from gpmetric.metrics import BASELINES, resolve_metric
from gpmetric.operands import OPERANDS
from gpmetric.pruning.fused import _unpacked
from gpmetric.pruning.mask import select_mask
from gpmetric.targets import Target, parse_target

FORMULAS = ("abs(W)*X", "abs(W)*G", "abs(W)")  # the last has many ties where W is bf16
TARGETS = tuple(parse_target(text) for text in ("0.5", "0.7", "2:4", "4:8", "layer:0.5"))
DTYPES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
ULPS = 64  # of the threshold; column sums of 28,672 fp32 numbers in another order differ by some 20

_EXACT = {"add", "sub", "mul", "div", "abs", "sqrt", "neg", "sqr", "inv", "max", "min"}

Named = Mapping[str, Tensor]
Prune = Callable[[Named, Target], Tensor]


class CheckError(Exception):
    """A result is wrong: nothing may be measured."""


def baselines() -> list[Expression]:
    """The published formulas that FORMULAS lack."""
    found = dict.fromkeys(resolve_metric(name, 128, 2048).expression for name in BASELINES)
    return [one for one in found if one not in {parse(text) for text in FORMULAS}]


def draw(shape: tuple[int, int], dtype: torch.dtype, device: str, seed: int = 0, names: str = "WXGHDR") -> Named:
    """Operands of the size they have in a model: W of that dtype, X of some wide inputs, the others fp32."""
    generator = torch.Generator(device).manual_seed(seed)
    options: dict[str, Any] = {"generator": generator, "device": device}
    matrix: dict[str, Callable[[], Tensor]] = {
        "W": lambda: (0.02 * torch.randn(shape, **options)).to(dtype),
        "X": lambda: torch.randn(shape[1], **options).exp(),
        "G": lambda: 1e-3 * torch.rand(shape, **options) + 1e-6,
        "H": lambda: 1e-6 * torch.rand(shape, **options) + 1e-9,
        "D": lambda: torch.rand(shape[1], **options) + 0.1,
        "R": lambda: torch.rand(shape, **options),
    }
    return {name: matrix[name]() for name in names}


def on_cpu(expression: Expression) -> Prune:
    """Prunes by `select_mask` of the evaluator's scores."""
    return lambda named, target: named["W"].where(select_mask(evaluate(expression, named), target), 0)


def by_kernel(weight: Tensor, score: Any, operands: Any, target: Target, **to: Any) -> Tensor:
    """What the launcher of a target's kernel gives; `to` are its `out`, `bits` and `bad`."""
    from gpmetric.kernels.layer import prune_layer  # needs Triton
    from gpmetric.kernels.pattern import prune_pattern
    from gpmetric.kernels.rows import prune_rows

    ((_, size),) = target.groups(weight.shape)
    found: Tensor
    if target.group:
        found = prune_pattern(weight, target.keep, target.group, score, operands, **to)
    else:
        prune = prune_layer if target.across_rows else prune_rows
        found = prune(weight, target.removed(size), score, operands, **to)
    return found


def fused(functions: ModuleType, which: int = 0, form: str = "new") -> Prune:
    """Prunes by the kernel of the target's granularity, into a `new` tensor, `in place` or by the mask's `bits`."""
    from gpmetric.kernels.reduce import prepare  # needs Triton

    def prune(named: Named, target: Target) -> Tensor:
        weight = named["W"]
        operands = prepare(weight, named, functions.LAYOUT, which)
        bad = torch.zeros(1, dtype=torch.int64, device=weight.device)
        if form == "in place":
            weight = weight.clone()
            pruned = by_kernel(weight, functions.score, operands, target, out=weight, bad=bad)
        elif form == "bits":
            bits = by_kernel(weight, functions.score, operands, target, bits=True)
            pruned = weight.where(_unpacked(bits, *weight.shape), 0)
        else:
            pruned = by_kernel(weight, functions.score, operands, target, bad=bad)
        if bad:
            raise CheckError(f"{int(bad)} scores of {tuple(weight.shape)} are not finite")
        return pruned

    return prune


def stable_mask(scores: Tensor, target: Target) -> Tensor:
    """True = kept, by a stable sort of every group."""
    ((_, size),) = target.groups(scores.shape)
    removed = target.removed(size)
    groups = scores.reshape(-1, size)
    order = groups.sort(dim=1, stable=True).indices[:, :removed]
    return torch.ones_like(groups, dtype=torch.bool).scatter_(1, order, False).view_as(scores)


def check(case: str, prune: Prune, expression: Expression, named: Named, target: Target) -> tuple[float, float]:
    """(share of groups that are pruned otherwise than by a stable sort, distance from the threshold in ulps).

    Raises:
        CheckError: one is where the formula is exact, or it is further from the threshold than ULPS.
    """
    weight = named["W"]
    scores = evaluate(expression, named)
    pruned = prune(named, target)
    if pruned.shape != weight.shape or pruned.dtype != weight.dtype:
        raise CheckError(f"{case}: {pruned.dtype} {list(pruned.shape)} instead of {weight.dtype} {list(weight.shape)}")
    ((_, size),) = target.groups(weight.shape)
    removed = target.removed(size)
    wrong = (pruned != weight.where(stable_mask(scores, target), 0)).reshape(-1, size)  # NaN is wrong too
    differing = wrong.any(dim=1)
    if not differing.any():
        return 0.0, 0.0
    share = differing.float().mean().item()
    told = f"{case}: {int(wrong.sum())} weights in {share:.2%} of the groups are not as a stable sort has them"
    if {token for token in expression.tokens if isinstance(token, str)} - set(OPERANDS) <= _EXACT:
        raise CheckError(told)
    wrong, groups = wrong[differing], scores.reshape(-1, size)[differing]
    mine, theirs = pruned.reshape(-1, size)[differing], weight.reshape(-1, size)[differing]
    threshold = groups.sort(dim=1).values[:, removed - 1 : removed]
    ulps = ((groups - threshold).abs() / (threshold.abs() * 2**-23))[wrong].max().item()
    gone, kept = (wrong & (mine == 0)).sum(dim=1), (wrong & (mine == theirs)).sum(dim=1)
    if not ulps <= ULPS or not torch.equal(gone, kept) or not torch.equal(gone + kept, wrong.sum(dim=1)):
        raise CheckError(f"{told}, up to {ulps:.0f} ulps from the threshold")
    return share, ulps


Choice = tuple[str, Expression, Prune]  # how it is done, the formula, what does it


def choices(device: str, interpreted: bool, folder: Path | None = None) -> Iterator[Choice]:
    """What is measured."""
    for expression in map(parse, FORMULAS):
        yield (
            "",
            expression,
            fused(load_functions([expression], folder)) if _kernels(device, interpreted) else on_cpu(expression),
        )


def other_choices(device: str, interpreted: bool, folder: Path | None = None) -> Iterator[Choice]:
    """The baselines, which share one score, and the other forms of a result."""
    expressions = baselines()
    if not _kernels(device, interpreted):
        yield from (("", expression, on_cpu(expression)) for expression in expressions)
        return
    together = load_functions(expressions, folder)
    yield from (("", expression, fused(together, which)) for which, expression in enumerate(expressions))
    first = parse(FORMULAS[0])
    yield from (
        (f", {form}", first, fused(load_functions([first], folder), form=form)) for form in ("bits", "in place")
    )


def _kernels(device: str, interpreted: bool) -> bool:
    return device != "cpu" or interpreted


def check_all(
    found: Iterable[Choice],
    shapes: Sequence[tuple[int, int]],
    device: str,
    targets: Sequence[Target] = TARGETS,
) -> Iterator[str]:
    """A line for each shape and dtype, once all choices are right there.

    Raises:
        CheckError: one is not.
    """
    found = list(found)
    for shape in shapes:
        for dtype, name in DTYPES.items():
            named = draw(shape, dtype, device)
            told = []
            count = 0
            for how, expression, prune in found:
                for target in targets:
                    if target.group and shape[1] % target.group:
                        continue
                    case = f"{target.text} {expression}{how}"
                    share, ulps = check(f"{shape[0]}x{shape[1]} {name}, {case}", prune, expression, named, target)
                    count += 1
                    if share:
                        told.append(f"  {case}: {share:.2%} of the groups differ, {ulps:.1f} ulps from the threshold")
            yield "\n".join([f"{shape[0]}x{shape[1]} {name}: {count} prunings as a stable sort has them", *told])
