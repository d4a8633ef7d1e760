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

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ATOM", "EXP_LIMIT", "PRIMITIVES", "TINY", "Monotonicity", "Primitive", "Reduction"]

TINY = 1e-30  # smallest size of a divisor; normal in fp32
EXP_LIMIT = 80.0  # exp(80) = 5.5e34 stays below the fp32 maximum of 3.4e38

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
    latex: str
    latex_nonnegative: str = ""
    opposite: str | None = None
    monotonicity: tuple[Monotonicity, ...] = (None,)
    monotone_where: Literal["everywhere", "nonnegative"] = "everywhere"
    reduces: Reduction = None
    infix: str = ""
    precedence: int = ATOM


# Torch semantics. The Python export copies these sources, so each uses only tensor methods, TINY, EXP_LIMIT and
# other functions of this section.


def _neg(x: Tensor) -> Tensor:
    return -x


def _abs(x: Tensor) -> Tensor:
    return x.abs()


def _sqr(x: Tensor) -> Tensor:
    return x * x


def _sqrt(x: Tensor) -> Tensor:
    """Square root of |x|."""
    return x.abs().sqrt()


def _log(x: Tensor) -> Tensor:
    """Natural logarithm of |x| + TINY."""
    return (x.abs() + TINY).log()


def _exp(x: Tensor) -> Tensor:
    """Exponential of min(x, EXP_LIMIT)."""
    return x.clamp(max=EXP_LIMIT).exp()


def _tanh(x: Tensor) -> Tensor:
    return x.tanh()


def _inv(x: Tensor) -> Tensor:
    """1 / x, with x replaced by TINY where |x| < TINY."""
    return 1.0 / x.masked_fill(x.abs() < TINY, TINY)


def _mms(x: Tensor) -> Tensor:
    """Min-max scaling over the whole value to [0, 1]; 0 where the value is constant."""
    span = x.amax() - x.amin()
    return ((x - x.amin()) / span).where(span != 0, 0.0)


def _zsn(x: Tensor) -> Tensor:
    """Z-score over the whole value (population deviation); 0 where the value is constant."""
    centred = x - x.mean()
    unit = centred / centred.abs().amax()  # in [-1, 1]: squares of values near 1e-25 would vanish in fp32
    return (unit / (unit * unit).mean().sqrt()).where(x.amax() - x.amin() != 0, 0.0)


def _rowsum(x: Tensor) -> Tensor:
    """Sum over the inputs of each row: [out, in] -> [out, 1]."""
    return x.sum(dim=1, keepdim=True)


def _colsum(x: Tensor) -> Tensor:
    """Sum over the outputs of each column: [out, in] -> [1, in]."""
    return x.sum(dim=0, keepdim=True)


def _rownorm(x: Tensor) -> Tensor:
    """Euclidean norm of each row: [out, in] -> [out, 1]."""
    return (x * x).sum(dim=1, keepdim=True).sqrt()


def _colnorm(x: Tensor) -> Tensor:
    """Euclidean norm of each column: [out, in] -> [1, in]."""
    return (x * x).sum(dim=0, keepdim=True).sqrt()


def _add(a: Tensor, b: Tensor) -> Tensor:
    return a + b


def _sub(a: Tensor, b: Tensor) -> Tensor:
    return a - b


def _mul(a: Tensor, b: Tensor) -> Tensor:
    return a * b


def _div(a: Tensor, b: Tensor) -> Tensor:
    """a / b, with b replaced by TINY where |b| < TINY."""
    return a / b.masked_fill(b.abs() < TINY, TINY)


def _max(a: Tensor, b: Tensor) -> Tensor:
    return a.maximum(b)


def _min(a: Tensor, b: Tensor) -> Tensor:
    return a.minimum(b)


def _pow(a: Tensor, b: Tensor) -> Tensor:
    """|a|**b, keeping the sign of a where b is an odd integer; |a| is at least TINY where b < 0."""
    size = a.abs().where(b >= 0, a.abs().clamp(min=TINY)).pow(b)
    signed = size.where((a >= 0) | (b % 2 != 1), -size)
    return signed.masked_fill(a.isnan() | b.isnan(), float("nan"))  # C's pow hides NaN: 1**nan, nan**0


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
        _neg,
        operator.neg,
        lambda sp, x: -x,
        latex="-#1",
        opposite="neg",
        monotonicity=("decreasing",),
        precedence=3,
        infix="-",
    ),
    Primitive(
        "abs", 1, _abs, abs, symbolic_abs, latex=r"\lvert #1\rvert", monotonicity=_UP, monotone_where="nonnegative"
    ),
    Primitive(
        "sqr",
        1,
        _sqr,
        lambda x: x * x,
        lambda sp, x: x**2,
        latex=r"{#1}^{\odot 2}",
        opposite="sqrt",
        monotonicity=_UP,
        monotone_where="nonnegative",
    ),
    Primitive(
        "sqrt",
        1,
        _sqrt,
        lambda x: math.sqrt(abs(x)),
        lambda sp, x: sp.sqrt(symbolic_abs(sp, x)),
        latex=r"\sqrt{\lvert #1\rvert}",
        latex_nonnegative=r"\sqrt{#1}",
        opposite="sqr",
        monotonicity=_UP,
        monotone_where="nonnegative",
    ),
    Primitive(
        "log",
        1,
        _log,
        lambda x: math.log(abs(x) + TINY),
        lambda sp, x: sp.log(symbolic_abs(sp, x)),
        latex=r"\log\lvert #1\rvert",
        latex_nonnegative=r"\log\left(#1\right)",
        opposite="exp",
        monotonicity=_UP,
        monotone_where="nonnegative",
    ),
    Primitive(
        "exp",
        1,
        _exp,
        lambda x: math.exp(min(x, EXP_LIMIT)),
        lambda sp, x: sp.exp(x),
        latex=r"\exp\left(#1\right)",
        opposite="log",
        monotonicity=_UP,
    ),
    Primitive("tanh", 1, _tanh, math.tanh, lambda sp, x: sp.tanh(x), latex=r"\tanh\left(#1\right)", monotonicity=_UP),
    Primitive(
        "inv",
        1,
        _inv,
        lambda x: _scalar_div(1.0, x),
        lambda sp, x: 1 / x,
        latex=r"\frac{1}{#1}",
        opposite="inv",
        monotonicity=("decreasing",),
        monotone_where="nonnegative",
    ),
    Primitive(
        "mms",
        1,
        _mms,
        _zero,
        lambda sp, x: opaque(sp, "mms", True)(x),
        latex=r"\operatorname{mms}\left(#1\right)",
        monotonicity=_UP,
        reduces="all",
    ),
    Primitive(
        "zsn",
        1,
        _zsn,
        _zero,
        lambda sp, x: opaque(sp, "zsn", False)(x),
        latex=r"\operatorname{zsn}\left(#1\right)",
        monotonicity=_UP,
        reduces="all",
    ),
    Primitive(
        "rowsum", 1, _rowsum, None, reduction("rowsum"), latex=r"\operatorname{rowsum}\left(#1\right)", reduces="in"
    ),
    Primitive(
        "colsum", 1, _colsum, None, reduction("colsum"), latex=r"\operatorname{colsum}\left(#1\right)", reduces="out"
    ),
    Primitive(
        "rownorm",
        1,
        _rownorm,
        None,
        lambda sp, x: opaque(sp, "rownorm", True)(x),
        latex=r"\left\lVert #1\right\rVert_{\mathrm{row}}",
        reduces="in",
    ),
    Primitive(
        "colnorm",
        1,
        _colnorm,
        None,
        lambda sp, x: opaque(sp, "colnorm", True)(x),
        latex=r"\left\lVert #1\right\rVert_{\mathrm{col}}",
        reduces="out",
    ),
    Primitive(
        "add",
        2,
        _add,
        operator.add,
        lambda sp, a, b: a + b,
        latex="#1 + #2",
        opposite="sub",
        monotonicity=_UP_UP,
        infix="+",
        precedence=1,
    ),
    Primitive(
        "sub",
        2,
        _sub,
        operator.sub,
        lambda sp, a, b: a - b,
        latex="#1 - #2",
        opposite="add",
        monotonicity=("increasing", "decreasing"),
        infix="-",
        precedence=1,
    ),
    Primitive(
        "mul",
        2,
        _mul,
        operator.mul,
        lambda sp, a, b: a * b,
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
        _div,
        _scalar_div,
        lambda sp, a, b: a / b,
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
        _max,
        max,
        lambda sp, a, b: sp.Max(a, b, evaluate=False),
        latex=r"\max\left(#1, #2\right)",
        monotonicity=_UP_UP,
    ),
    Primitive(
        "min",
        2,
        _min,
        min,
        lambda sp, a, b: sp.Min(a, b, evaluate=False),
        latex=r"\min\left(#1, #2\right)",
        monotonicity=_UP_UP,
    ),
    Primitive(
        "pow",
        2,
        _pow,
        _scalar_pow,
        symbolic_pow,
        latex=r"\lvert #1\rvert^{\odot #2}",
        latex_nonnegative=r"{#1}^{\odot #2}",
        monotonicity=("increasing", None),
        monotone_where="nonnegative",
        infix="**",
        precedence=4,
    ),
)

PRIMITIVES: dict[str, Primitive] = {row.name: row for row in _ROWS}
