"""The closed table of primitives a formula may use, one row each, with protected semantics written down in the row.

Torch is not imported: the torch functions use tensor methods only, so a formula is read and checked in milliseconds.
Every value is an [out, in] matrix in meaning; [1, in], [out, 1] and [1, 1] are compact storage of repeated values, and
the evaluator expands the argument of a row or column reduction to [out, in] first. NaN always propagates.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from gpmetric.expression import torch_forms as forms
from gpmetric.expression.sympy_forms import opaque, symbolic_abs, symbolic_pow
from gpmetric.expression.torch_forms import EXP_LIMIT, TINY
from gpmetric.lazy import lazy
from gpmetric.plugins import open_table

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "ATOM",
    "PRIMITIVES",
    "Algebra",
    "KernelStep",
    "Latex",
    "Monotonicity",
    "ParityRule",
    "Primitive",
    "Reduction",
    "SignRule",
]

Monotonicity = Literal["increasing", "decreasing"] | None
Reduction = Literal["in", "out", "all"] | None
SignRule = Literal["unknown", "always", "all", "any", "product", "power"]
ParityRule = Literal["none", "even", "odd", "sum", "product", "power"]
Algebra = Literal["linear", "product", "open", "closed"]
ATOM = 9  # precedence of names, numbers and calls; of infix operators: 1 (+ -), 2 (* /), 3 (unary -), 4 (**)


@dataclass(frozen=True)
class Latex:
    """How a primitive is written in TeX, with #1 and #2 for its arguments.

    Attributes:
        template: where no guard shows.
        guarded: where an argument, which may be negative, is taken by its size; "" for the same.
        scaled: where an argument is a number; "" for the same.
        needs: how tightly each argument must bind to go without parentheses, 0 where the template encloses it.
        precedence: how tightly the result binds, 0 for as tightly as in the text form.
    """

    template: str
    guarded: str = ""
    scaled: str = ""
    needs: tuple[int, int] = (0, 0)
    precedence: int = 0


@dataclass(frozen=True)
class KernelStep:
    """What the kernels compute of a reduction's argument before they score.

    Attributes:
        name: of the step, as `gpmetric.kernels.reduce.prepare` knows it.
        results: how many vectors or numbers it results in.
        squares: whether it goes over the squares of the argument.
    """

    name: str
    results: int = 1
    squares: bool = False


@dataclass(frozen=True)
class Primitive:
    """One operation of the formula language.

    Attributes:
        name: as written in a call, `abs(W)`.
        arity: 1 or 2.
        torch: protected semantics on floating tensors that broadcast to [out, in].
        scalar: the same on floats; None when the result depends on the shape. May raise OverflowError.
        sympy: form without guards, called with the sympy module and the arguments; None for an undefined function.
        triton: Triton text, {0} and {1} for the arguments, with functions of `gpmetric.kernels.ops`; of a reduction,
            {0} is its vector, or {1} and on are the numbers it needs besides the argument; "" for no kernels.
        latex: how it is written in TeX; by default as a function of its name.
        sign: where it is known to be >= 0: never, always, where all or any of its arguments are, or as a product or a
            power is.
        parity: how it answers to a change of sign of its arguments: an even or odd function, a sum, product or power;
            "none" is even in W where its arguments are.
        power: for a power of the argument's size, its exponent.
        algebra: what sympy does with it: sums and signs are "linear", "product" the other ring operation, both without
            guards; it simplifies through "open" ones; "closed" ones are symbols to it.
        commutative: whether the order of the arguments is without meaning.
        monotonicity: per argument, the others fixed; None where unknown. Weak: guards and rounding make ties.
        monotone_where: "nonnegative" when `monotonicity` holds only while all arguments are >= 0.
        reduces: axis over which values meet: "in", "out", "all" (whole matrix), or None for element-wise.
        kernel_step: of a reduction, what the kernels compute before they score.
        infix: operator in the text form, "" when written as a call.
        precedence: how tightly the operator binds; see `ATOM`.
        right_associative: whether a**b**c is a**(b**c).
    """

    name: str
    arity: int
    torch: Callable[..., Tensor]
    scalar: Callable[..., float] | None = None
    sympy: Callable[..., Any] | None = None
    triton: str = ""
    latex: Latex = Latex("")
    sign: SignRule = "unknown"
    parity: ParityRule = "none"
    power: float | None = None
    algebra: Algebra = "closed"
    commutative: bool = False
    monotonicity: tuple[Monotonicity, ...] = (None,)
    monotone_where: Literal["everywhere", "nonnegative"] = "everywhere"
    reduces: Reduction = None
    kernel_step: KernelStep | None = None
    infix: str = ""
    precedence: int = ATOM
    right_associative: bool = False

    def __post_init__(self) -> None:
        needed = self.reduces is not None and bool(self.triton)
        assert needed == (self.kernel_step is not None), "a reduction says what the kernels compute before"
        if not self.latex.template:
            arguments = ", ".join(f"#{place + 1}" for place in range(self.arity))
            name = self.name.replace("_", r"\_")
            called = Latex(rf"\operatorname{{{name}}}\left({arguments}\right)")
            object.__setattr__(self, "latex", called)

    @property
    def in_ring(self) -> bool:
        """Whether it is the sum, difference, product or negative of numbers, which no guard protects."""
        return self.algebra in ("linear", "product")

    @property
    def grows(self) -> bool:
        """Whether it increases with its only argument, everywhere."""
        return self.monotonicity == ("increasing",) and self.monotone_where == "everywhere"

    @property
    def grows_with_size(self) -> bool:
        """Whether it is an element-wise function of its only argument's size, and increases with that."""
        return self.parity == "even" and self.monotonicity == ("increasing",) and not self.reduces

    @property
    def is_odd(self) -> bool:
        """Whether it is an element-wise function of one argument whose sign it keeps: f(-x) = -f(x)."""
        return self.parity == "odd" and self.arity == 1 and not self.reduces

    def value(self, arguments: Sequence[float]) -> float | None:
        """Value on constants: inf or NaN beyond the float range, None if it depends on the shape."""
        if self.scalar is None:
            return None
        try:
            return self.scalar(*arguments)
        except OverflowError:
            return math.inf

    def to_sympy(self, sp: Any, *forms: Any) -> Any:
        """The sympy form on those of the arguments."""
        if self.sympy:
            return self.sympy(sp, *forms)
        known = self.sign == "always" or (self.sign == "all" and all(form.is_nonnegative for form in forms))
        return opaque(sp, self.name, known)(*forms)


# The same on floats, for folding constants.


def _scalar_div(a: float, b: float) -> float:
    return a / (TINY if abs(b) < TINY else b)


def _scalar_pow(a: float, b: float) -> float:
    size = float((max(abs(a), TINY) if b < 0 else abs(a)) ** b)
    return -size if a < 0 and b % 2 == 1 else size


def _zero(x: float) -> float:
    return 0.0


_UP: tuple[Monotonicity, ...] = ("increasing",)
_DOWN: tuple[Monotonicity, ...] = ("decreasing",)

# A row: what it computes; how it is written; what is known of it.
# fmt: off
_ROWS = (
    Primitive("neg", 1, forms.torch_neg, operator.neg, lambda sp, x: -x,
              "-{0}", Latex("-#1", needs=(3, 0)), infix="-", precedence=3,
              parity="odd", algebra="linear", monotonicity=_DOWN),
    Primitive("abs", 1, forms.torch_abs, abs, symbolic_abs,
              "tl.abs({0})", Latex(r"\lvert #1\rvert"),
              sign="always", parity="even", power=1.0, algebra="open",
              monotonicity=_UP, monotone_where="nonnegative"),
    Primitive("sqr", 1, forms.torch_sqr, lambda x: x * x, lambda sp, x: x**2,
              "{0} * {0}", Latex(r"{#1}^{\odot 2}", needs=(ATOM, 0), precedence=4),
              sign="always", parity="even", power=2.0, algebra="open",
              monotonicity=_UP, monotone_where="nonnegative"),
    Primitive("sqrt", 1, forms.torch_sqrt, lambda x: math.sqrt(abs(x)), lambda sp, x: sp.sqrt(symbolic_abs(sp, x)),
              "op_sqrt({0})", Latex(r"\sqrt{#1}", guarded=r"\sqrt{\lvert #1\rvert}"),
              sign="always", parity="even", power=0.5, algebra="open",
              monotonicity=_UP, monotone_where="nonnegative"),
    Primitive("log", 1, forms.torch_log, lambda x: math.log(abs(x) + TINY), lambda sp, x: sp.log(symbolic_abs(sp, x)),
              "op_log({0})", Latex(r"\log\left(#1\right)", guarded=r"\log\lvert #1\rvert"),
              parity="even", algebra="open", monotonicity=_UP, monotone_where="nonnegative"),
    Primitive("exp", 1, forms.torch_exp, lambda x: math.exp(min(x, EXP_LIMIT)), lambda sp, x: sp.exp(x),
              "op_exp({0})", Latex(r"\exp\left(#1\right)"),
              sign="always", algebra="open", monotonicity=_UP),
    Primitive("tanh", 1, forms.torch_tanh, math.tanh, lambda sp, x: sp.tanh(x),
              "op_tanh({0})", Latex(r"\tanh\left(#1\right)"),
              sign="all", parity="odd", monotonicity=_UP),
    Primitive("inv", 1, forms.torch_inv, lambda x: _scalar_div(1.0, x), lambda sp, x: 1 / x,
              "op_inv({0})", Latex(r"\frac{1}{#1}"),
              sign="all", parity="odd", algebra="open", monotonicity=_DOWN, monotone_where="nonnegative"),
    Primitive("mms", 1, forms.torch_mms, _zero, None,
              "op_mms({0}, {1}, {2})", Latex(r"\operatorname{mms}\left(#1\right)"),
              sign="always", monotonicity=_UP, reduces="all", kernel_step=KernelStep("mms", results=2)),
    Primitive("zsn", 1, forms.torch_zsn, _zero, None,
              "op_zsn({0}, {1}, {2}, {3}, {4}, {5})", Latex(r"\operatorname{zsn}\left(#1\right)"),
              parity="odd", monotonicity=_UP, reduces="all", kernel_step=KernelStep("zsn", results=5)),
    Primitive("rowsum", 1, forms.torch_rowsum, None, None,
              "{0}", Latex(r"\operatorname{rowsum}\left(#1\right)"),
              sign="all", parity="odd", reduces="in", kernel_step=KernelStep("rowsum")),
    Primitive("colsum", 1, forms.torch_colsum, None, None,
              "{0}", Latex(r"\operatorname{colsum}\left(#1\right)"),
              sign="all", parity="odd", reduces="out", kernel_step=KernelStep("colsum")),
    Primitive("rownorm", 1, forms.torch_rownorm, None, None,
              "{0}", Latex(r"\left\lVert #1\right\rVert_{\mathrm{row}}"),
              sign="always", parity="even", reduces="in", kernel_step=KernelStep("rownorm", squares=True)),
    Primitive("colnorm", 1, forms.torch_colnorm, None, None,
              "{0}", Latex(r"\left\lVert #1\right\rVert_{\mathrm{col}}"),
              sign="always", parity="even", reduces="out", kernel_step=KernelStep("colnorm", squares=True)),
    Primitive("add", 2, forms.torch_add, operator.add, lambda sp, a, b: a + b,
              "{0} + {1}", Latex("#1 + #2", needs=(1, 2)), infix="+", precedence=1,
              sign="all", parity="sum", algebra="linear", commutative=True, monotonicity=_UP + _UP),
    Primitive("sub", 2, forms.torch_sub, operator.sub, lambda sp, a, b: a - b,
              "{0} - {1}", Latex("#1 - #2", needs=(1, 2)), infix="-", precedence=1,
              parity="sum", algebra="linear", monotonicity=_UP + _DOWN),
    Primitive("mul", 2, forms.torch_mul, operator.mul, lambda sp, a, b: a * b,
              "{0} * {1}", Latex(r"#1 \odot #2", scaled=r"#1 \cdot #2", needs=(2, 3)), infix="*", precedence=2,
              sign="product", parity="product", algebra="product", commutative=True,
              monotonicity=_UP + _UP, monotone_where="nonnegative"),
    Primitive("div", 2, forms.torch_div, _scalar_div, lambda sp, a, b: a / b,
              "op_div({0}, {1})", Latex(r"\frac{#1}{#2}"), infix="/", precedence=2,
              sign="all", parity="product", algebra="open",
              monotonicity=_UP + _DOWN, monotone_where="nonnegative"),
    Primitive("max", 2, forms.torch_max, max, lambda sp, a, b: sp.Max(a, b, evaluate=False),
              "op_max({0}, {1})", Latex(r"\max\left(#1, #2\right)"),
              sign="any", commutative=True, monotonicity=_UP + _UP),
    Primitive("min", 2, forms.torch_min, min, lambda sp, a, b: sp.Min(a, b, evaluate=False),
              "op_min({0}, {1})", Latex(r"\min\left(#1, #2\right)"),
              sign="all", commutative=True, monotonicity=_UP + _UP),
    Primitive("pow", 2, forms.torch_pow, _scalar_pow, symbolic_pow,
              "op_pow({0}, {1})",
              Latex(r"{#1}^{\odot #2}", guarded=r"{\lvert #1\rvert}^{\odot #2}", needs=(ATOM, 0)),
              infix="**", precedence=4, right_associative=True,
              sign="power", parity="power", algebra="open",
              monotonicity=("increasing", None), monotone_where="nonnegative"),
)
# fmt: on

PRIMITIVES: dict[str, Primitive] = {row.name: row for row in _ROWS}
open_table("primitive", PRIMITIVES, Primitive, lazy("gpmetric.expression.trial:check_primitive"))
