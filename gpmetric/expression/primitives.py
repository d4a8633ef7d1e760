"""The closed table of primitives a formula may use, one row each, with protected semantics written down in the row.

Torch is not imported: the torch functions use tensor methods only, so a formula is read and checked in milliseconds.
Every value is an [out, in] matrix in meaning; [1, in], [out, 1] and [1, 1] are compact storage of repeated values, and
the evaluator expands the argument of a row or column reduction to [out, in] first. NaN always propagates.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from gpmetric.expression.sympy_forms import opaque, reduction, symbolic_abs, symbolic_pow
from gpmetric.expression.torch_forms import (
    EXP_LIMIT,
    TINY,
    torch_abs,
    torch_add,
    torch_colnorm,
    torch_colsum,
    torch_div,
    torch_exp,
    torch_inv,
    torch_log,
    torch_max,
    torch_min,
    torch_mms,
    torch_mul,
    torch_neg,
    torch_pow,
    torch_rownorm,
    torch_rowsum,
    torch_sqr,
    torch_sqrt,
    torch_sub,
    torch_tanh,
    torch_zsn,
)

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ATOM", "PRIMITIVES", "Monotonicity", "Primitive", "Reduction"]

Monotonicity = Literal["increasing", "decreasing"] | None
Reduction = Literal["in", "out", "all"] | None
ATOM = 9  # precedence of names, numbers and calls; of infix operators: 1 (+ -), 2 (* /), 3 (unary -), 4 (**)


@dataclass(frozen=True)
class Primitive:
    """One operation of the formula language.

    Attributes:
        name: as written in a call, `abs(W)`.
        arity: 1 or 2.
        torch: protected semantics on floating tensors that broadcast to [out, in].
        scalar: the same on floats; None when the result depends on the shape. May raise OverflowError.
        sympy: form without guards, called with the sympy module and the arguments.
        triton: Triton text, {0} and {1} for the arguments, with functions of `gpmetric.kernels.ops`; of a reduction,
            {0} is its vector, or {1} and on are the numbers it needs besides the argument.
        latex: TeX template with #1 and #2 for the arguments.
        latex_nonnegative: the template where every argument is known to be non-negative, "" for the same.
        opposite: the primitive that undoes this one up to sign and guards, or None.
        monotonicity: per argument, the others fixed; None where unknown. Weak: guards and rounding make ties.
        monotone_where: "nonnegative" when `monotonicity` holds only while all arguments are >= 0.
        reduces: axis over which values meet: "in", "out", "all" (whole matrix), or None for element-wise.
        infix: operator in the text form, "" when written as a call.
        precedence: how tightly the operator binds; see `ATOM`.
    """

    name: str
    arity: int
    torch: Callable[..., Tensor]
    scalar: Callable[..., float] | None
    sympy: Callable[..., Any]
    triton: str
    latex: str
    latex_nonnegative: str = ""
    opposite: str | None = None
    monotonicity: tuple[Monotonicity, ...] = (None,)
    monotone_where: Literal["everywhere", "nonnegative"] = "everywhere"
    reduces: Reduction = None
    infix: str = ""
    precedence: int = ATOM


# The same on floats, for folding constants.


def _scalar_div(a: float, b: float) -> float:
    return a / (TINY if abs(b) < TINY else b)


def _scalar_pow(a: float, b: float) -> float:
    size = float((max(abs(a), TINY) if b < 0 else abs(a)) ** b)
    return -size if a < 0 and b % 2 == 1 else size


def _zero(x: float) -> float:
    return 0.0


_UP: tuple[Monotonicity, ...] = ("increasing",)
_UP_UP: tuple[Monotonicity, ...] = ("increasing", "increasing")

_ROWS = (
    Primitive(
        "neg",
        1,
        torch_neg,
        operator.neg,
        lambda sp, x: -x,
        triton="-{0}",
        latex="-#1",
        opposite="neg",
        monotonicity=("decreasing",),
        precedence=3,
        infix="-",
    ),
    Primitive(
        "abs",
        1,
        torch_abs,
        abs,
        symbolic_abs,
        triton="tl.abs({0})",
        latex=r"\lvert #1\rvert",
        monotonicity=_UP,
        monotone_where="nonnegative",
    ),
    Primitive(
        "sqr",
        1,
        torch_sqr,
        lambda x: x * x,
        lambda sp, x: x**2,
        triton="{0} * {0}",
        latex=r"{#1}^{\odot 2}",
        opposite="sqrt",
        monotonicity=_UP,
        monotone_where="nonnegative",
    ),
    Primitive(
        "sqrt",
        1,
        torch_sqrt,
        lambda x: math.sqrt(abs(x)),
        lambda sp, x: sp.sqrt(symbolic_abs(sp, x)),
        triton="op_sqrt({0})",
        latex=r"\sqrt{\lvert #1\rvert}",
        latex_nonnegative=r"\sqrt{#1}",
        opposite="sqr",
        monotonicity=_UP,
        monotone_where="nonnegative",
    ),
    Primitive(
        "log",
        1,
        torch_log,
        lambda x: math.log(abs(x) + TINY),
        lambda sp, x: sp.log(symbolic_abs(sp, x)),
        triton="op_log({0})",
        latex=r"\log\lvert #1\rvert",
        latex_nonnegative=r"\log\left(#1\right)",
        opposite="exp",
        monotonicity=_UP,
        monotone_where="nonnegative",
    ),
    Primitive(
        "exp",
        1,
        torch_exp,
        lambda x: math.exp(min(x, EXP_LIMIT)),
        lambda sp, x: sp.exp(x),
        triton="op_exp({0})",
        latex=r"\exp\left(#1\right)",
        opposite="log",
        monotonicity=_UP,
    ),
    Primitive(
        "tanh",
        1,
        torch_tanh,
        math.tanh,
        lambda sp, x: sp.tanh(x),
        triton="op_tanh({0})",
        latex=r"\tanh\left(#1\right)",
        monotonicity=_UP,
    ),
    Primitive(
        "inv",
        1,
        torch_inv,
        lambda x: _scalar_div(1.0, x),
        lambda sp, x: 1 / x,
        triton="op_inv({0})",
        latex=r"\frac{1}{#1}",
        opposite="inv",
        monotonicity=("decreasing",),
        monotone_where="nonnegative",
    ),
    Primitive(
        "mms",
        1,
        torch_mms,
        _zero,
        lambda sp, x: opaque(sp, "mms", True)(x),
        triton="op_mms({0}, {1}, {2})",
        latex=r"\operatorname{mms}\left(#1\right)",
        monotonicity=_UP,
        reduces="all",
    ),
    Primitive(
        "zsn",
        1,
        torch_zsn,
        _zero,
        lambda sp, x: opaque(sp, "zsn", False)(x),
        triton="op_zsn({0}, {1}, {2}, {3}, {4}, {5})",
        latex=r"\operatorname{zsn}\left(#1\right)",
        monotonicity=_UP,
        reduces="all",
    ),
    Primitive(
        "rowsum",
        1,
        torch_rowsum,
        None,
        reduction("rowsum"),
        triton="{0}",
        latex=r"\operatorname{rowsum}\left(#1\right)",
        reduces="in",
    ),
    Primitive(
        "colsum",
        1,
        torch_colsum,
        None,
        reduction("colsum"),
        triton="{0}",
        latex=r"\operatorname{colsum}\left(#1\right)",
        reduces="out",
    ),
    Primitive(
        "rownorm",
        1,
        torch_rownorm,
        None,
        lambda sp, x: opaque(sp, "rownorm", True)(x),
        triton="{0}",
        latex=r"\left\lVert #1\right\rVert_{\mathrm{row}}",
        reduces="in",
    ),
    Primitive(
        "colnorm",
        1,
        torch_colnorm,
        None,
        lambda sp, x: opaque(sp, "colnorm", True)(x),
        triton="{0}",
        latex=r"\left\lVert #1\right\rVert_{\mathrm{col}}",
        reduces="out",
    ),
    Primitive(
        "add",
        2,
        torch_add,
        operator.add,
        lambda sp, a, b: a + b,
        triton="{0} + {1}",
        latex="#1 + #2",
        opposite="sub",
        monotonicity=_UP_UP,
        infix="+",
        precedence=1,
    ),
    Primitive(
        "sub",
        2,
        torch_sub,
        operator.sub,
        lambda sp, a, b: a - b,
        triton="{0} - {1}",
        latex="#1 - #2",
        opposite="add",
        monotonicity=("increasing", "decreasing"),
        infix="-",
        precedence=1,
    ),
    Primitive(
        "mul",
        2,
        torch_mul,
        operator.mul,
        lambda sp, a, b: a * b,
        triton="{0} * {1}",
        latex=r"#1 \odot #2",
        opposite="div",
        monotonicity=_UP_UP,
        monotone_where="nonnegative",
        infix="*",
        precedence=2,
    ),
    Primitive(
        "div",
        2,
        torch_div,
        _scalar_div,
        lambda sp, a, b: a / b,
        triton="op_div({0}, {1})",
        latex=r"\frac{#1}{#2}",
        opposite="mul",
        monotonicity=("increasing", "decreasing"),
        monotone_where="nonnegative",
        infix="/",
        precedence=2,
    ),
    Primitive(
        "max",
        2,
        torch_max,
        max,
        lambda sp, a, b: sp.Max(a, b, evaluate=False),
        triton="op_max({0}, {1})",
        latex=r"\max\left(#1, #2\right)",
        monotonicity=_UP_UP,
    ),
    Primitive(
        "min",
        2,
        torch_min,
        min,
        lambda sp, a, b: sp.Min(a, b, evaluate=False),
        triton="op_min({0}, {1})",
        latex=r"\min\left(#1, #2\right)",
        monotonicity=_UP_UP,
    ),
    Primitive(
        "pow",
        2,
        torch_pow,
        _scalar_pow,
        symbolic_pow,
        triton="op_pow({0}, {1})",
        latex=r"\lvert #1\rvert^{\odot #2}",
        latex_nonnegative=r"{#1}^{\odot #2}",
        monotonicity=("increasing", None),
        monotone_where="nonnegative",
        infix="**",
        precedence=4,
    ),
)

PRIMITIVES: dict[str, Primitive] = {row.name: row for row in _ROWS}
