"""A formula as one Python file that needs torch only and defines `score(W, X=None, G=None, H=None, D=None, F=None)`.

The primitives are copied from the table with `inspect.getsource`, and the written file is imported and compared bit by
bit with the evaluator before it takes its place.
"""

from __future__ import annotations

import hashlib
import inspect
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpmetric.errors import GpmetricError
from gpmetric.export.loading import load_module
from gpmetric.export.text import COMPARISON
from gpmetric.expression import torch_forms
from gpmetric.expression.canonical import canonical
from gpmetric.expression.evaluate import evaluate
from gpmetric.expression.primitives import ATOM, PRIMITIVES
from gpmetric.expression.tree import Expression, Tokens, arity
from gpmetric.operands import OPERANDS
from gpmetric.provenance import write_text

__all__ = ["header", "python_source", "torch_functions", "write_python"]

_INFIX = ("neg", "add", "sub", "mul")  # written with Python's operator, which is what their function does
_WIDTH = 72  # a part longer than this becomes a line of its own

_MODULE = '''"""Pruning score: {formula}

Every weight of a linear layer [out, in] gets one number; the lowest are removed. Made by gpmetric {version}.
{comparison}sha256 of the canonical form: {digest}

Operands{operands}

{usage}
"""

from __future__ import annotations

import torch
from torch import Tensor
{functions}'''

_FUNCTION = '''@torch.no_grad()
def {name}(
    W: Tensor,
    X: Tensor | None = None,
    G: Tensor | None = None,
    H: Tensor | None = None,
    D: Tensor | None = None,
    F: Tensor | None = None,
) -> Tensor:
    """Score [out, in] in float32, larger means keep, of W, G, H, F [out, in] and X, D [in].

    Raises:
        ValueError: an operand that the formula uses is None.
    """
{body}
'''

_USAGE_ROWS = """Usage, removing the lower half of every row of a torch.nn.Linear:

    with torch.no_grad():
        saliency = score({call})
        removed = saliency.argsort(dim=1, stable=True)[:, : saliency.shape[1] // 2]
        mask = torch.ones_like(saliency, dtype=torch.bool).scatter(1, removed, False)  # True = kept
        linear.weight.mul_(mask)"""

_USAGE_COLUMNS = """Usage, removing the lower half of {which} of a torch.nn.Linear:

    with torch.no_grad():
        saliency = score({call})
        for weight, group in zip(linear.weight.split({width}, dim=1), saliency.split({width}, dim=1)):
            removed = group.flatten().argsort(stable=True)[: group.numel() // 2]
            mask = torch.ones(group.numel(), dtype=torch.bool, device=group.device)  # True = kept
            mask[removed] = False
            weight.mul_(mask.view_as(group))"""

# comparison group -> usage example
_USAGE = {
    "row": _USAGE_ROWS,
    "layer": _USAGE_COLUMNS.replace("{which}", "the weight").replace("{width}", "linear.in_features"),
    "block": _USAGE_COLUMNS.replace("{which}", "every 128 columns").replace("{width}", "128"),
}


def python_source(expression: Expression, version: str, group: str = "row") -> str:
    """Text of the module, ASCII; see `write_python` for the checked file."""
    fields = header(expression, version, group)
    usage = _USAGE[group].format(call=f"linear.weight{fields['arguments']}")
    return _MODULE.format(**fields, usage=usage, functions=torch_functions(expression, "score"))


def torch_functions(expression: Expression, name: str) -> str:
    """Text of a function of that name that gives the score, after the constants and functions that it uses."""
    functions = list(_functions(expression))
    names = {used for function in functions for used in function.__code__.co_names}
    constants = [f"{used} = {getattr(torch_forms, used)!r}\n" for used in ("TINY", "EXP_LIMIT") if used in names]
    body = "\n".join(f"    {line}" for line in _body(expression))
    parts = ["\n" + "".join(constants)] if constants else [""]
    parts += [f"{inspect.getsource(function).rstrip()}\n" for function in functions]
    return "\n\n".join([*parts, _FUNCTION.format(name=name, body=body)])


def header(expression: Expression, version: str, group: str) -> dict[str, str]:
    """What an exported file's docstring says of a formula: the fields of a template."""
    rows = [OPERANDS[name] for name in expression.operands]
    return {
        "formula": _escaped(str(expression)),
        "version": _escaped(version),
        "digest": hashlib.sha256(str(canonical(expression)).encode()).hexdigest(),
        "operands": "".join(
            f"\n    {row.name} [{row.axes.replace(',', ', ')}]: {_escaped(row.meaning)}" for row in rows
        ),
        "comparison": f"{COMPARISON[group]}\n" if group != "row" else "",
        "arguments": "".join(f", {row.name}={row.name}" for row in rows if row.name != "W"),
    }


def write_python(expression: Expression, path: str | Path, version: str, group: str = "row") -> None:
    """Writes the module, having imported it and found its scores equal to `evaluate`, bit for bit.

    Raises:
        GpmetricError: the file cannot be written, or its scores differ; nothing is then left at `path`.
    """
    source = python_source(expression, version, group)
    write_text(Path(path), source, lambda written: _verify(expression, written))


def _escaped(text: str) -> str:
    """ASCII that neither ends nor escapes out of a docstring."""
    return text.encode("unicode_escape").decode("ascii").replace("\\", "\\\\").replace('"', "'")


def _functions(expression: Expression) -> Iterator[Any]:
    """Functions of the primitives used and of those they call, in the order of the table."""
    used = {PRIMITIVES[t].torch for t in expression.tokens if t in PRIMITIVES and t not in _INFIX}
    waiting = list(used)
    while waiting:
        called = waiting.pop().__code__.co_names
        found = {row.torch for row in PRIMITIVES.values() if row.torch.__name__ in called} - used
        used |= found
        waiting.extend(found)
    return (row.torch for row in PRIMITIVES.values() if row.torch in used)


def _body(expression: Expression) -> list[str]:
    """Lines of `score`: operands to fp32, constants, one line per shared or long part, the result."""
    lines: list[str] = []
    for name in expression.operands:
        if name != "W":
            lines += [f"if {name} is None:", f'    raise ValueError("this score needs the operand {name}")']
    lines.append("W = W.detach().to(torch.float32)")
    for name in expression.operands:
        shape = ".unsqueeze(0)  # [1, in]" if OPERANDS[name].axes == "in" else ""
        if name != "W":
            lines.append(f"{name} = {name}.detach().to(device=W.device, dtype=torch.float32){shape}")
    result = _Writer(expression, lines).run()
    if len(expression) == 1:
        return [*lines, f"return {result}.clone(memory_format=torch.contiguous_format)  # never the operand itself"]
    return [*lines, f"score = {result}", "return score.contiguous()"]


class _Writer:
    """Turns a tree into straight-line code; `lines` grows by the assignments."""

    def __init__(self, expression: Expression, lines: list[str]) -> None:
        self.expression = expression
        self.lines = lines
        self.names: dict[Tokens, str] = {}
        parts = (expression.tokens[expression.subtree(index)] for index in range(len(expression)))
        self.uses = Counter(parts)

    def run(self) -> str:
        stack: list[tuple[str, int, Tokens]] = []  # text, precedence, tokens
        for token in reversed(self.expression.tokens):
            arguments = [stack.pop() for _ in range(arity(token))]
            tokens: Tokens = (token, *(inner for argument in arguments for inner in argument[2]))
            stack.append(self._part(tokens, arguments))
        text, precedence, tokens = stack[0]
        return text if _is_matrix(tokens) else _expanded(text, precedence)

    def _part(self, tokens: Tokens, arguments: list[tuple[str, int, Tokens]]) -> tuple[str, int, Tokens]:
        token = tokens[0]
        if tokens in self.names:
            return self.names[tokens], ATOM, tokens
        if isinstance(token, float):
            return self._named(tokens, f"W.new_full((1, 1), {token!r})", "c"), ATOM, tokens
        if token in OPERANDS:
            return token, ATOM, tokens
        text, precedence = _operation(token, arguments)
        if self.uses[tokens] > 1 or len(text) > _WIDTH:
            return self._named(tokens, text, "v"), ATOM, tokens
        return text, precedence, tokens

    def _named(self, tokens: Tokens, text: str, letter: str) -> str:
        name = f"{letter}{1 + sum(name[0] == letter for name in self.names.values())}"
        self.names[tokens] = name
        self.lines.append(f"{name} = {text}")
        return name


def _operation(token: str, arguments: list[tuple[str, int, Tokens]]) -> tuple[str, int]:
    row = PRIMITIVES[token]
    if token not in _INFIX:
        texts = [text for text, _, _ in arguments]
        if row.reduces in ("in", "out"):  # sums count the repeats of a vector
            texts = [text if _is_matrix(tokens) else _expanded(text, level) for text, level, tokens in arguments]
        return f"{row.torch.__name__}({', '.join(texts)})", ATOM
    needed = (row.precedence,) if token == "neg" else (row.precedence, row.precedence + 1)
    texts = [text if level >= need else f"({text})" for (text, level, _), need in zip(arguments, needed, strict=True)]
    return ("-" + texts[0] if token == "neg" else f"{texts[0]} {row.infix} {texts[1]}"), row.precedence


def _expanded(text: str, precedence: int) -> str:
    return f"{text if precedence == ATOM else f'({text})'}.expand_as(W)"


def _is_matrix(tokens: Tokens) -> bool:
    """Whether the value is stored as [out, in], not as one row, one column or one number."""
    stack: list[tuple[bool, bool]] = []  # spans the outputs, spans the inputs
    for token in reversed(tokens):
        parts = [stack.pop() for _ in range(arity(token))]
        rows, columns = any(part[0] for part in parts), any(part[1] for part in parts)
        if token in OPERANDS:
            rows, columns = OPERANDS[str(token)].axes == "out,in", True
        elif token in PRIMITIVES and PRIMITIVES[str(token)].reduces in ("in", "out"):
            rows = PRIMITIVES[str(token)].reduces == "in"
            columns = not rows
        stack.append((rows, columns))
    return stack[0] == (True, True)


def _verify(expression: Expression, path: Path) -> None:
    module = load_module(path)
    for seed, (shape, dtype) in enumerate(
        [((6, 42), torch.float32), ((5, 123), torch.bfloat16), ((1, 1), torch.float16)]
    ):
        operands = _random_operands(shape, dtype, seed)
        written, expected = module.score(**operands), evaluate(expression, operands)
        if written.shape != expected.shape or not torch.equal(written.view(torch.int32), expected.view(torch.int32)):
            raise GpmetricError(
                f"the exported function differs from the formula at shape {list(shape)}; nothing written"
            )


def _random_operands(shape: tuple[int, int], dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    """Every operand, with zeros in it, from a fixed seed."""
    generator = torch.Generator().manual_seed(seed)
    operands = {}
    for name, row in OPERANDS.items():
        value = torch.randn(shape if row.axes == "out,in" else shape[1:], generator=generator)
        value = value * (torch.rand(value.shape, generator=generator) > 0.1)
        operands[name] = value.to(dtype) if name == "W" else value.abs()
    return operands
