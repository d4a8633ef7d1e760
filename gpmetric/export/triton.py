"""A formula as Triton functions: its score, and what has to be summed up before that.

The text is written as a module into a cache folder and imported from there; text is never executed as text. The
launchers of `gpmetric.kernels` take the functions it holds.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from gpmetric.export.loading import load_module
from gpmetric.expression.primitives import PRIMITIVES
from gpmetric.expression.tree import Expression, Tokens, arity, subtree_end
from gpmetric.operands import OPERANDS
from gpmetric.provenance import write_text

__all__ = ["load_functions", "triton_functions"]

# reduction -> the field of Operands that it adds to, how many tensors, and the call that computes them
_PROLOGUES = {
    "rowsum": ("rows", 1, "(row_sums(W, {part}, operands),)"),
    "rownorm": ("rows", 1, "(row_sums(W, {part}, operands).sqrt(),)"),
    "colsum": ("columns", 1, "(column_sums(W, {part}, operands),)"),
    "colnorm": ("columns", 1, "(column_sums(W, {part}, operands).sqrt(),)"),
    "mms": ("numbers", 2, "extremes(W, {part}, operands)"),
    "zsn": ("numbers", 5, "moments(W, {part}, operands)"),
}
_SQUARED = ("rownorm", "colnorm")
_SCALINGS = ("mms", "zsn")  # what they are of is computed again in the score; of the others the result is enough
_SIGNATURE = "(w, matrices, columns, rows, numbers)"

_IMPORTS = '''"""Triton functions of a pruning metric, written by gpmetric."""

import triton
import triton.language as tl

from gpmetric.kernels.ops import *
from gpmetric.kernels.reduce import column_sums, extremes, moments, row_sums


'''


def triton_functions(expression: Expression) -> str:
    """Python text of `score`, of the parts that its reductions go over, and of `prepare`.

    `prepare(W, X=None, G=None, H=None, D=None, F=None)` gives the `gpmetric.kernels.ops.Operands` that `score` is
    called with, the results of its reductions among them.
    """
    return _Writer(expression).text


def load_functions(expression: Expression, folder: Path | None = None) -> ModuleType:
    """The module of `triton_functions`, imported from a file named after its content.

    Args:
        expression: the formula.
        folder: where modules are kept; gpmetric's folder of the user's cache by default.

    Raises:
        ImportError: Triton is not installed.
    """
    text = _IMPORTS + triton_functions(expression)
    if folder is None:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpmetric" / "kernels"
    path = folder / f"metric_{hashlib.sha256(text.encode()).hexdigest()[:32]}.py"
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    return load_module(path)


class _Writer:
    """Writes the functions of one formula; those of its reductions before what contains them."""

    def __init__(self, expression: Expression) -> None:
        names = [name for name in expression.operands if name != "W"]
        given = {
            "matrices": [name for name in names if OPERANDS[name].axes == "out,in"],
            "columns": [name for name in names if OPERANDS[name].axes == "in"],
        }
        self._names = {"W": "w"}
        for field, found in given.items():
            self._names |= {name: f"{field}[{place}]" for place, name in enumerate(found)}
        self._used = {"columns": len(given["columns"]), "rows": 0, "numbers": 0}
        self._reduced: dict[Tokens, list[str]] = {}  # a reduction with what it is of -> where its results are
        functions: list[str] = []
        steps = []
        for subtree in _reductions(expression.tokens):
            field, count, call = _PROLOGUES[str(subtree[0])]
            part = f"part{len(functions)}"
            functions.append(self._function(part, subtree[1:], squared=subtree[0] in _SQUARED))
            start = self._used[field]
            self._reduced[subtree] = [f"{field}[{place}]" for place in range(start, start + count)]
            self._used[field] += count
            steps.append(f"    operands = operands._replace({field}=operands.{field} + {call.format(part=part)})\n")
        functions.append(self._function("score", expression.tokens))
        matrices = "".join(f"{name}.contiguous(), " for name in given["matrices"])
        columns = "".join(f"{name}.contiguous(), " for name in given["columns"])
        prepare = (
            f"def prepare(W, {', '.join(f'{name}=None' for name in OPERANDS if name != 'W')}):\n"
            f"    operands = Operands(matrices=({matrices.rstrip()}), columns=({columns.rstrip()}))\n"
            f"{''.join(steps)}    return operands\n"
        )
        self.text = "\n\n".join([*functions, prepare])

    def _function(self, name: str, tokens: Tokens, squared: bool = False) -> str:
        """A jit function that computes a subtree, every shared sub-expression once."""
        lines: dict[str, str] = {}  # right side -> variable

        def variable(text: str) -> str:
            return lines.setdefault(text, f"v{len(lines)}")

        stack: list[str] = []
        skipped: set[int] = set()  # tokens inside a reduction whose results are vectors
        for start in range(len(tokens)):
            if tokens[start] in _PROLOGUES and tokens[start] not in _SCALINGS:
                skipped.update(range(start + 1, subtree_end(tokens, start)))
        for index in reversed(range(len(tokens))):
            token = tokens[index]
            if index in skipped:
                continue
            if isinstance(token, float):
                stack.append(variable(f"tl.full(w.shape, {token!r}, tl.float32)"))
            elif token in self._names:
                stack.append(variable(self._names[token]))
            else:
                reduced = self._reduced.get(tokens[index : subtree_end(tokens, index)], [])
                inputs = [] if reduced and token not in _SCALINGS else [stack.pop() for _ in range(arity(token))]
                stack.append(variable(PRIMITIVES[token].triton.format(*inputs, *reduced)))
        result = stack.pop()
        if squared:
            result = variable(f"{result} * {result}")
        body = "".join(f"    {name} = {text}\n" for text, name in lines.items())
        return f"@triton.jit\ndef {name}{_SIGNATURE}:\n{body}    return {result}\n"


def _reductions(tokens: Tokens) -> Iterator[Tokens]:
    """Every distinct subtree that is a reduction, inner ones first."""
    seen = set()
    for index in reversed(range(len(tokens))):
        subtree = tokens[index : subtree_end(tokens, index)]
        if tokens[index] in _PROLOGUES and subtree not in seen:
            seen.add(subtree)
            yield subtree
