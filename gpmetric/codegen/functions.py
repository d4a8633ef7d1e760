"""A formula as the text of Python functions: in plain torch, and in Triton for the launchers of `gpmetric.kernels`.

What every function takes follows from the table of operands.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from gpmetric.errors import InputError
from gpmetric.expression import torch_forms
from gpmetric.expression.primitives import ATOM, PRIMITIVES, Primitive
from gpmetric.expression.tree import Expression, Token, Tokens, arity, fold, rooted, subtree_end
from gpmetric.operands import OPERANDS, Axes

__all__ = ["has_kernels", "operands_with", "prune_parameters", "remaining_score", "torch_functions", "triton_functions"]

_WIDTH = 72  # a part longer than this becomes a line of its own
_OUT_AFTER = "D"  # files are called by position: `out` stays where it was when this was the last operand

_READERS = {"matrices": "from_matrix", "columns": "from_column", "rows": "from_row", "numbers": "from_number"}
_RESULTS = {"in": "rows", "out": "columns", "all": "numbers"}  # a reduction's axis -> field of Operands for its results
_TRITON_PARAMETERS = "(w, matrices, columns, rows, numbers, place, which)"


# Parameters


def operands_with(axes: Axes) -> list[str]:
    """Names of the operands of that shape, but for the weight."""
    return [name for name, row in OPERANDS.items() if row.axes == axes and name != "W"]


def prune_parameters(*own: str) -> list[str]:
    """Parameters of a function that prunes: the weight, its own, then the operands and the tensor to write to."""
    found = ["W: Tensor", *own]
    for name in OPERANDS:
        found += [_parameter(name)] * (name != "W") + [_parameter("out")] * (name == _OUT_AFTER)
    return found


def _parameter(name: str) -> str:
    return f"{name}: Tensor | None = None"


# Plain torch


def torch_functions(expression: Expression, name: str) -> str:
    """Text of a function of that name that gives the score, after the constants and functions that it uses.

    The primitives are copied from the table with `inspect.getsource`.

    Raises:
        InputError: a plug-in's needs more than torch.
    """
    functions = list(_torch_forms(expression))
    for function in functions:
        _check_alone(function)
    names = {used for function in functions for used in function.__code__.co_names}
    constants = [f"{used} = {getattr(torch_forms, used)!r}\n" for used in ("TINY", "EXP_LIMIT") if used in names]
    parts = ["\n" + "".join(constants)] if constants else [""]
    parts += [f"{inspect.getsource(function).rstrip()}\n" for function in functions]
    return "\n\n".join([*parts, _score_function(expression, name)])


def _score_function(expression: Expression, name: str) -> str:
    others = "".join(f"    {_parameter(one)},\n" for one in OPERANDS if one != "W")
    lines = "".join(f"    {line}\n" for line in _torch_lines(expression))
    matrices, vectors = ", ".join(["W", *operands_with("out,in")]), ", ".join(operands_with("in"))
    return f'''@torch.no_grad()
def {name}(
    W: Tensor,
{others}) -> Tensor:
    """Score [out, in] in float32, larger means keep, of {matrices} [out, in] and {vectors} [in].

    Raises:
        ValueError: an operand that the formula uses is None.
    """
{lines}'''


def _torch_forms(expression: Expression) -> Iterator[Any]:
    """Functions of the primitives used and of those they call, in the order of the table."""
    known = {name: inspect.unwrap(row.torch) for name, row in PRIMITIVES.items()}
    used = {known[str(token)] for token in expression.tokens if token in known and not PRIMITIVES[str(token)].in_ring}
    waiting = list(used)
    while waiting:
        code = getattr(waiting.pop(), "__code__", None)  # one of a plug-in may be a class, say
        called = code.co_names if code else ()
        found = {function for function in known.values() if function.__name__ in called} - used
        used |= found
        waiting.extend(found)
    return (function for function in known.values() if function in used)


def _check_alone(function: Any) -> None:
    """Refuses a function whose text does not run in a file that has torch, Tensor and the functions of primitives."""
    known = {"torch", "Tensor", "TINY", "EXP_LIMIT", *(row.torch.__name__ for row in PRIMITIVES.values())}
    told = f"the function {function.__name__} of a plug-in cannot stand in a file of its own"
    try:
        text, used = inspect.getsource(function), inspect.getclosurevars(function)
    except (OSError, TypeError) as error:
        raise InputError(f"{told}: its text is not to be had ({error})") from error
    if not text.startswith("def "):
        raise InputError(f"{told}: it must be a plain def at the beginning of a line")
    if foreign := {*used.nonlocals, *used.globals} - known:
        raise InputError(f"{told}: it uses {', '.join(sorted(foreign))}, and torch only may be used")


def _torch_lines(expression: Expression) -> list[str]:
    """Lines of `score`: operands to fp32, constants, one line per shared or long part, the result."""
    lines: list[str] = []
    others = [name for name in expression.operands if name != "W"]
    for name in others:
        lines += [f"if {name} is None:", f'    raise ValueError("this score needs the operand {name}")']
    lines.append("W = W.detach().to(torch.float32)")
    for name in others:
        shape = ".unsqueeze(0)  # [1, in]" if OPERANDS[name].axes == "in" else ""
        lines.append(f"{name} = {name}.detach().to(device=W.device, dtype=torch.float32){shape}")
    result = _TorchWriter(expression, lines).result
    if len(expression) == 1:
        return [*lines, f"return {result}.clone(memory_format=torch.contiguous_format)  # never the operand itself"]
    return [*lines, f"score = {result}", "return score.contiguous()"]


_Written = tuple[str, int, Tokens]  # the text of a part, how tightly it binds, and the part


class _TorchWriter:
    """Turns a tree into straight-line code: `lines` grows by the assignments, `result` is the score."""

    def __init__(self, expression: Expression, lines: list[str]) -> None:
        self._lines = lines
        self._names: dict[Tokens, str] = {}
        self._uses = Counter(expression.tokens[expression.subtree(index)] for index in range(len(expression)))
        self.result = _as_matrix(fold(expression.tokens, self._part))

    def _part(self, token: Token, arguments: list[_Written]) -> _Written:
        tokens = rooted(token, [part for _, _, part in arguments])
        if tokens in self._names:
            return self._names[tokens], ATOM, tokens
        if isinstance(token, float):
            return self._named(tokens, f"W.new_full((1, 1), {token!r})", "c"), ATOM, tokens
        if token in OPERANDS:
            return token, ATOM, tokens
        text, precedence = _torch_operation(PRIMITIVES[token], arguments)
        if self._uses[tokens] > 1 or len(text) > _WIDTH:
            return self._named(tokens, text, "v"), ATOM, tokens
        return text, precedence, tokens

    def _named(self, tokens: Tokens, text: str, letter: str) -> str:
        name = f"{letter}{1 + sum(name[0] == letter for name in self._names.values())}"
        self._names[tokens] = name
        self._lines.append(f"{name} = {text}")
        return name


def _torch_operation(row: Primitive, arguments: list[_Written]) -> tuple[str, int]:
    """A call of the primitive's function, or Python's operator where that is what the function does."""
    if not row.in_ring:
        counts_repeats = row.reduces in ("in", "out")  # a sum goes over all entries, also of a vector
        texts = [_as_matrix(argument) if counts_repeats else argument[0] for argument in arguments]
        return f"{row.torch.__name__}({', '.join(texts)})", ATOM
    needed = range(row.precedence, row.precedence + row.arity)
    texts = [text if level >= need else f"({text})" for (text, level, _), need in zip(arguments, needed, strict=True)]
    return (row.infix + texts[0] if row.arity == 1 else f"{texts[0]} {row.infix} {texts[1]}"), row.precedence


def _as_matrix(part: _Written) -> str:
    """The text, expanded unless the value is stored as [out, in], not as one row, one column or one number."""
    text, precedence, tokens = part
    if fold(tokens, _stored_axes) == {"out", "in"}:
        return text
    return f"{text if precedence == ATOM else f'({text})'}.expand_as(W)"


def _stored_axes(token: Token, arguments: list[frozenset[str]]) -> frozenset[str]:
    if token in OPERANDS:
        return frozenset(OPERANDS[str(token)].axes.split(","))
    reduces = PRIMITIVES[str(token)].reduces if token in PRIMITIVES else None
    if reduces in ("in", "out"):
        return frozenset({"out", "in"} - {reduces})
    return frozenset[str]().union(*arguments)


# Triton


def has_kernels(tokens: Tokens) -> bool:
    """Whether every primitive has a Triton form; one of a plug-in may have none."""
    return _without_kernel(tokens) is None


def _without_kernel(tokens: Tokens) -> str | None:
    return next((str(one) for one in tokens if one in PRIMITIVES and not PRIMITIVES[str(one)].triton), None)


def triton_functions(expressions: Sequence[Expression]) -> str:
    """Python text of `score`, of the `part` that reductions go over, if any, and of `LAYOUT`, a `launch.Layout`.

    Several formulas are one score, which computes the one that it is asked for: they share a kernel's compilation.

    Raises:
        InputError: a primitive has no Triton form.
    """
    for expression in expressions:
        if name := _without_kernel(expression.tokens):
            raise InputError(f"primitive {name} has no Triton form: its plug-in would have to say it, as triton=...")
    return _TritonWriter(expressions).text


def remaining_score(tokens: Tokens, fields: Mapping[str, str]) -> str:
    """Text of a `score` whose parts without W are operands too.

    Args:
        tokens: of the formula, each such part being one token; W is in no reduction.
        fields: by that token, the field of `launch.Operands` where the part is; in the field they are in this order.
    """
    places: Counter[str] = Counter()
    names = {"W": "w"}
    for token, field in fields.items():
        names[token] = _read(field, places[field])
        places[field] += 1
    return _choice("score", [_lines(tokens, names)]).replace("'", '"')


class _TritonWriter:
    """Writes the functions of some formulas; inner reductions before what contains them."""

    def __init__(self, expressions: Sequence[Expression]) -> None:
        used = {name for expression in expressions for name in expression.operands}
        self._matrices = [name for name in operands_with("out,in") if name in used]
        self._columns = [name for name in operands_with("in") if name in used]
        self._names = {"W": "w"}
        for field, names in (("matrices", self._matrices), ("columns", self._columns)):
            self._names |= {name: _read(field, index) for index, name in enumerate(names)}
        self._taken = {"rows": 0, "columns": len(self._columns), "numbers": 0}  # places in the fields of Operands
        self._results: dict[Tokens, list[str]] = {}  # a reduction with what it is of -> where its results are
        self._numbered: dict[Tokens, tuple[int, str, int]] = {}  # the same -> its step
        self._parts: list[list[str]] = []  # lines of what each step goes over
        steps = tuple(tuple(map(self._step, _reductions(expression.tokens))) for expression in expressions)
        functions = [_choice("score", [self._score(expression.tokens) for expression in expressions])]
        functions += [_choice("part", self._parts)] if self._parts else []
        self.text = "\n\n".join([*functions, f"LAYOUT = Layout({self._layout(steps)})\n"]).replace("'", '"')

    def _layout(self, steps: tuple[tuple[tuple[int, str, int], ...], ...]) -> str:
        operands = f"{tuple(self._matrices)}, {tuple(self._columns)}"
        if not self._parts:
            return operands
        rows, columns, numbers = self._taken.values()
        return f"{operands}, {rows}, {columns - len(self._columns)}, {numbers}, part, {steps}"

    def _step(self, subtree: Tokens) -> tuple[int, str, int]:
        """What is computed before the score: number of the part, name of the step, first place of its results."""
        if subtree not in self._numbered:
            row = PRIMITIVES[str(subtree[0])]
            step, field = row.kernel_step, _RESULTS[str(row.reduces)]
            assert step is not None
            place = self._taken[field]
            self._numbered[subtree] = len(self._parts), step.name, place
            self._parts.append(self._score(subtree[1:], step.squares))
            self._results[subtree] = [_read(field, place + index) for index in range(step.results)]
            self._taken[field] += step.results
        return self._numbered[subtree]

    def _score(self, tokens: Tokens, squared: bool = False) -> list[str]:
        return _lines(tokens, self._names, self._results, squared)


def _lines(
    tokens: Tokens, names: Mapping[str, str], results: Mapping[Tokens, list[str]] | None = None, squared: bool = False
) -> list[str]:
    """Lines that return a subtree, every shared sub-expression computed once.

    Args:
        names: by leaf, the text that reads it.
        results: by subtree that is a reduction, the texts that read its results.
    """
    lines: dict[str, str] = {}  # right side -> variable

    def variable(text: str) -> str:
        return lines.setdefault(text, f"v{len(lines)}")

    stack: list[str] = []
    skipped = {inside for start in range(len(tokens)) for inside in _not_computed(tokens, start)}
    for index in reversed(range(len(tokens))):
        token = tokens[index]
        if index in skipped:
            continue
        if isinstance(token, float):
            stack.append(variable(f"tl.full(w.shape, {token!r}, tl.float32)"))
        elif token in names:
            stack.append(variable(names[token]))
        else:
            computed = not _not_computed(tokens, index)
            inputs = [stack.pop() for _ in range(arity(token))] if computed else []
            reduced = (results or {}).get(tokens[index : subtree_end(tokens, index)], [])
            stack.append(variable(PRIMITIVES[token].triton.format(*inputs, *map(variable, reduced))))
    result = stack.pop()
    if squared:
        result = variable(f"{result} * {result}")
    return [*(f"{name} = {text}" for text, name in lines.items()), f"return {result}"]


def _reductions(tokens: Tokens) -> list[Tokens]:
    """Every distinct subtree that is a reduction, inner ones first."""
    rows = [PRIMITIVES.get(str(token)) for token in tokens]
    starts = [index for index in reversed(range(len(tokens))) if (row := rows[index]) and row.reduces]
    return list(dict.fromkeys(tokens[start : subtree_end(tokens, start)] for start in starts))


def _not_computed(tokens: Tokens, start: int) -> range:
    """Tokens that a score leaves out: those inside a reduction to a vector, which is all that is read of it."""
    row = PRIMITIVES.get(str(tokens[start]))
    inside = row is not None and row.reduces in ("in", "out")
    return range(start + 1, subtree_end(tokens, start) if inside else start + 1)


def _read(field: str, index: int) -> str:
    return f"{_READERS[field]}({field}[{index}], place)"


def _choice(name: str, bodies: Sequence[Sequence[str]]) -> str:
    """A jit function of some bodies that `which` chooses from; each but a single one is a function that it calls."""

    def text(name: str, lines: Iterable[str]) -> str:
        return f"@triton.jit\ndef {name}{_TRITON_PARAMETERS}:\n" + "".join(f"    {line}\n" for line in lines)

    if len(bodies) == 1:
        return text(name, bodies[0])
    choices = []
    for number in range(len(bodies)):
        condition = f"elif which == {number}:" if number else "if which == 0:"
        choices += [condition if number < len(bodies) - 1 else "else:"]
        choices += [f"    result = {name}{number}{_TRITON_PARAMETERS}"]
    functions = [text(f"{name}{number}", lines) for number, lines in enumerate(bodies)]
    return "\n\n".join([*functions, text(name, [*choices, "return result"])])
