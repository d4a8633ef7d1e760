"""A plug-in's primitive tried on a few numbers: what its row says of it decides how formulas are simplified."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from itertools import pairwise, product
from typing import Any

import torch
from torch import Tensor

from gpmetric.errors import InputError
from gpmetric.expression.primitives import PRIMITIVES, Primitive

__all__ = ["check_primitive", "check_tensor"]

_NUMBERS = (-1e6, -7.0, -1.0, -1e-3, -1e-20, 0.0, 1e-20, 1e-3, 1.0, 7.0, 1e6)
_SHAPES = ((3, 11), (1, 11), (3, 1), (1, 1))
_CLOSE = 1e-4  # relative, of fp32


def check_tensor(what: str, value: object, shape: tuple[int, ...]) -> Tensor:
    """The value, where it is a finite tensor of fp32 of that shape.

    Raises:
        InputError: it is something else.
    """
    wanted = f"{what} must give {list(shape)} in float32"
    if not isinstance(value, Tensor):
        raise InputError(f"{wanted}, but gave {value!r:.60}")
    if tuple(value.shape) != shape or value.dtype != torch.float32:
        raise InputError(f"{wanted}, but gave {list(value.shape)} in {str(value.dtype).removeprefix('torch.')}")
    if not value.isfinite().all():
        raise InputError(f"{what} gave NaN or infinity for finite numbers")
    return value


def check_primitive(name: str, row: Primitive, fellows: Mapping[str, Any]) -> None:
    """Refuses a row that says of its function what is not so, or a function that changes its arguments.

    Raises:
        InputError: what is wrong, with the numbers.
    """
    if name != row.name or re.fullmatch(r"[a-z][a-z0-9_]*", name) is None:
        raise InputError(f"a primitive is called in small letters, but by {name!r} and {row.name!r:.60}")
    if row.arity not in (1, 2) or (row.reduces and row.arity != 1):
        raise InputError(f"arity must be 1, or 2 where nothing is reduced, but is {row.arity}")
    if row.infix or row.algebra not in ("open", "closed") or "power" in (row.sign, row.parity):
        raise InputError("a plug-in's is written as a call, and its algebra open or closed; sign and parity no power")
    if row.algebra == "open" and row.sympy is None:
        raise InputError("algebra open needs its sympy form")
    if row.monotonicity != (None,) and len(row.monotonicity) != row.arity:
        raise InputError(f"monotonicity must have {row.arity} entries, but has {len(row.monotonicity)}")
    function = row.torch.__name__  # exported files have it, unless it is a lambda
    taken = {"score", "plain_score", *(one.torch.__name__ for one in PRIMITIVES.values())}
    if function.isidentifier() and function in taken:
        raise InputError(f"its function needs a name of its own, but {function} is taken")
    _check_triton(row)
    for shapes in product(_SHAPES, repeat=row.arity):
        if not row.reduces or row.reduces == "all" or shapes == ((3, 11),):
            _check_shapes(row, [_matrix(shape, seed) for seed, shape in enumerate(shapes)])
    nan = row.torch(*[torch.full((1, 1), math.nan)] * row.arity)
    if not nan.isnan().all():
        raise InputError(f"NaN must stay NaN, but became {nan.flatten().tolist()}")
    if not row.reduces:
        _check_values(row)


def _matrix(shape: tuple[int, int], seed: int) -> Tensor:
    mixed = torch.tensor(_NUMBERS * 3)[torch.randperm(33, generator=torch.Generator().manual_seed(seed))]
    return mixed.view(3, 11)[: shape[0], : shape[1]].clone()


def _check_triton(row: Primitive) -> None:
    count = row.arity + (row.kernel_step.results if row.kernel_step else 0)
    try:
        row.triton.format(*map(str, range(count)))
    except (LookupError, ValueError) as error:
        raise InputError(f"triton {row.triton!r:.60} is not a text with {{0}} for its argument: {error!r}") from error


def _check_shapes(row: Primitive, arguments: list[Tensor]) -> None:
    """Shape and dtype of the result; element-wise, that it is the same some rows at a time."""
    before = [one.clone() for one in arguments]
    rows, columns = torch.broadcast_shapes(*(one.shape for one in arguments))
    wanted = (rows, 1 if row.reduces == "in" else columns) if row.reduces != "out" else (1, columns)
    found = check_tensor(f"{row.torch.__name__} of {[list(one.shape) for one in arguments]}",
                         row.torch(*arguments), wanted)  # fmt: skip
    if not all(map(torch.equal, arguments, before)):
        raise InputError(f"{row.torch.__name__} writes to its argument")
    if any(found.data_ptr() == one.data_ptr() for one in arguments):
        raise InputError(f"{row.torch.__name__} gives its argument itself, and must give a new tensor")
    if row.reduces:
        return
    parts = row.torch(*(one[:1] for one in arguments)), row.torch(*(one[None, None] for one in arguments))  # of solvers
    # not bit by bit: torch's vector loops may round what is left over differently
    if not torch.allclose(parts[0], found[:1], _CLOSE, 0) or not torch.allclose(parts[1], found[None, None], _CLOSE, 0):
        raise InputError(f"{row.torch.__name__} is not element-wise, so the row must say what it reduces")


def _check_values(row: Primitive) -> None:
    """That an element-wise one is what the row says, on every number or pair of them."""
    for numbers in product(_NUMBERS, repeat=row.arity):
        value = _value(row, *numbers)
        for what, expected in _expected(row, numbers):
            if not math.isclose(value, expected, rel_tol=_CLOSE, abs_tol=1e-30):
                raise InputError(f"{what} is not so: of {numbers} it is {value:g}, and would be {expected:g}")
        if value < 0 and _never_negative(row, numbers):
            raise InputError(f"sign {row.sign} is not so: of {numbers} it is {value:g}")
    known = [one for one in _NUMBERS if row.monotone_where == "everywhere" or one >= 0]
    for place, direction in enumerate(row.monotonicity):
        for other, (low, high) in product(known if row.arity == 2 else (0.0,), pairwise(known)):
            pair = [[low, other][: row.arity], [high, other][: row.arity]]
            before, after = (_value(row, *(one[::-1] if place else one)) for one in pair)
            falls, rises = (x > y + _CLOSE * abs(y) for x, y in ((before, after), (after, before)))
            if (direction == "increasing" and falls) or (direction == "decreasing" and rises):
                raise InputError(f"it is not {direction}: of {low:g} it is {before:g}, of {high:g} {after:g}")


def _value(row: Primitive, *numbers: float) -> float:
    return float(row.torch(*(torch.full((1, 1), one) for one in numbers)))


def _expected(row: Primitive, numbers: tuple[float, ...]) -> Iterator[tuple[str, float]]:
    """What the row says that the value of these numbers is."""
    scalar = row.value(numbers)
    if scalar is not None:
        yield "scalar", scalar
    turned = [-one for one in numbers]
    if row.parity in ("even", "odd", "sum"):
        other = _value(row, *turned)
        yield f"parity {row.parity}", other if row.parity == "even" else -other
    if row.parity == "product":
        for place in range(row.arity):
            one = [turned[at] if at == place else number for at, number in enumerate(numbers)]
            yield "parity product", -_value(row, *one)
    if row.power is not None:
        size = abs(numbers[0])
        yield f"power {row.power:g}", size**row.power if size or row.power > 0 else _value(row, *numbers)
    if row.commutative:
        yield "commutative", _value(row, *reversed(numbers))


def _never_negative(row: Primitive, numbers: tuple[float, ...]) -> bool:
    known = [number >= 0 for number in numbers]
    return {"always": True, "all": all(known), "any": any(known), "product": all(known)}.get(row.sign, False)
