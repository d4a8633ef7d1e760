"""Formulas as Triton functions: their score, and what has to be summed up before that.

The text is written as a module into a cache folder and imported from there; text is never executed as text. The
launchers of `gpmetric.kernels` take the functions it holds.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import ModuleType

from gpmetric.errors import GpmetricError
from gpmetric.export.loading import load_module
from gpmetric.expression.primitives import PRIMITIVES
from gpmetric.expression.tree import Expression, Tokens, arity, subtree_end
from gpmetric.operands import OPERANDS
from gpmetric.provenance import write_text

__all__ = ["load_functions", "triton_functions"]

# reduction -> the field of Operands that has its results, and how many
_REDUCTIONS = {
    "rowsum": ("rows", 1),
    "rownorm": ("rows", 1),
    "colsum": ("columns", 1),
    "colnorm": ("columns", 1),
    "mms": ("numbers", 2),
    "zsn": ("numbers", 5),
}
_SQUARED = ("rownorm", "colnorm")
_SCALINGS = ("mms", "zsn")  # what they are of is computed again in the score; of the others the result is enough
# field of Operands -> the function that reads it
_READERS = {"matrices": "from_matrix", "columns": "from_column", "rows": "from_row", "numbers": "from_number"}
_SIGNATURE = "(w, matrices, columns, rows, numbers, place, which)"

_IMPORTS = '''"""Triton functions of pruning metrics, written by gpmetric."""

import triton
import triton.language as tl

from gpmetric.kernels.launch import Layout, from_column, from_matrix, from_number, from_row
from gpmetric.kernels.ops import *


'''


def triton_functions(expressions: Sequence[Expression]) -> str:
    """Python text of `score`, of the `part` that reductions go over, if any, and of `LAYOUT`, a `launch.Layout`.

    Several formulas are one score, which computes the one that it is asked for: they share a kernel's compilation.
    """
    return _Writer(expressions).text


def load_functions(expressions: Sequence[Expression], folder: Path | None = None) -> ModuleType:
    """The module of `triton_functions`, imported from a file named after its content.

    Args:
        expressions: the formulas.
        folder: where modules are kept; gpmetric's folder of the user's cache by default, or where that cannot be
            written a temporary one.

    Raises:
        ImportError: Triton is not installed.
        GpmetricError: the folder cannot be written.
    """
    text = _IMPORTS + triton_functions(expressions)
    name = f"metric_{hashlib.sha256(text.encode()).hexdigest()[:32]}.py"
    if folder is not None:
        return load_module(_kept(folder / name, text))
    try:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        return load_module(_kept(root / "gpmetric" / "kernels" / name, text))
    except (GpmetricError, RuntimeError):  # RuntimeError: there is no home
        return load_module(_kept(_temporary_folder() / name, text))


def _kept(path: Path, text: str) -> Path:
    """The file, written unless it holds that text already."""
    try:
        written = path.read_bytes()
    except OSError:
        written = b""
    if written != text.encode():
        with suppress(OSError):  # told by the next line, with the path
            path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    return path


@cache
def _temporary_folder() -> Path:
    folder = tempfile.TemporaryDirectory(prefix="gpmetric-")
    atexit.register(folder.cleanup)
    return Path(folder.name)


class _Writer:
    """Writes the functions of some formulas; inner reductions before what contains them."""

    def __init__(self, expressions: Sequence[Expression]) -> None:
        names = [name for name in OPERANDS if any(name in expression.operands for expression in expressions)]
        matrices = [name for name in names if OPERANDS[name].axes == "out,in" and name != "W"]
        columns = [name for name in names if OPERANDS[name].axes == "in"]
        self._names = {"W": "w"} | {
            name: _read(field, index)
            for field, found in (("matrices", matrices), ("columns", columns))
            for index, name in enumerate(found)
        }
        used = {"columns": len(columns), "rows": 0, "numbers": 0}
        self._reduced: dict[Tokens, list[str]] = {}  # a reduction with what it is of -> where its results are
        found: dict[Tokens, tuple[int, str, int]] = {}  # the same -> its step
        parts: list[list[str]] = []
        steps = []
        for expression in expressions:
            needed = list(_reductions(expression.tokens))
            for subtree in needed:
                if subtree not in found:
                    name = str(subtree[0])
                    field, count = _REDUCTIONS[name]
                    found[subtree] = (len(parts), name, used[field])
                    parts.append(self._body(subtree[1:], squared=name in _SQUARED))
                    self._reduced[subtree] = [_read(field, used[field] + index) for index in range(count)]
                    used[field] += count
            steps.append(tuple(found[subtree] for subtree in needed))
        layout = f"{tuple(matrices)}, {tuple(columns)}"
        if parts:
            layout += f", {used['rows']}, {used['columns'] - len(columns)}, {used['numbers']}, part, {tuple(steps)}"
        functions = [_function("score", [self._body(expression.tokens) for expression in expressions])]
        functions += [_function("part", parts)] if parts else []
        self.text = "\n\n".join([*functions, f"LAYOUT = Layout({layout})\n"]).replace("'", '"')

    def _body(self, tokens: Tokens, squared: bool = False) -> list[str]:
        """Lines that return a subtree, every shared sub-expression computed once."""
        lines: dict[str, str] = {}  # right side -> variable

        def variable(text: str) -> str:
            return lines.setdefault(text, f"v{len(lines)}")

        stack: list[str] = []
        skipped: set[int] = set()  # tokens inside a reduction whose results are vectors
        for start in range(len(tokens)):
            if tokens[start] in _REDUCTIONS and tokens[start] not in _SCALINGS:
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
                results = [variable(text) for text in reduced]
                stack.append(variable(PRIMITIVES[token].triton.format(*inputs, *results)))
        result = stack.pop()
        if squared:
            result = variable(f"{result} * {result}")
        return [*(f"{name} = {text}" for text, name in lines.items()), f"return {result}"]


def _read(field: str, index: int) -> str:
    return f"{_READERS[field]}({field}[{index}], place)"


def _function(name: str, bodies: Sequence[Sequence[str]]) -> str:
    """A jit function of some bodies that `which` chooses from; each but a single one is a function that it calls."""

    def text(name: str, lines: Iterable[str]) -> str:
        return f"@triton.jit\ndef {name}{_SIGNATURE}:\n" + "".join(f"    {line}\n" for line in lines)

    if len(bodies) == 1:
        return text(name, bodies[0])
    choices = []
    for number in range(len(bodies)):
        condition = f"elif which == {number}:" if number else "if which == 0:"
        choices += [condition if number < len(bodies) - 1 else "else:", f"    result = {name}{number}{_SIGNATURE}"]
    functions = [text(f"{name}{number}", lines) for number, lines in enumerate(bodies)]
    return "\n\n".join([*functions, text(name, [*choices, "return result"])])


def _reductions(tokens: Tokens) -> Iterator[Tokens]:
    """Every distinct subtree that is a reduction, inner ones first."""
    seen = set()
    for index in reversed(range(len(tokens))):
        subtree = tokens[index : subtree_end(tokens, index)]
        if tokens[index] in _REDUCTIONS and subtree not in seen:
            seen.add(subtree)
            yield subtree
