"""A formula as one Python file that needs torch and Triton only and defines `prune` and `prune_nm`.

The kernels are copied from `gpmetric.kernels`, as much of them as the formula needs. The written file holds the score
in plain torch too, and compares the two when it is run: it is run once before it takes its place.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

import torch

from gpmetric.codegen.functions import operands_with, prune_parameters, torch_functions, triton_functions
from gpmetric.errors import GpmetricError, InputError
from gpmetric.formats import Formula
from gpmetric.operands import OPERANDS

__all__ = ["check_triton", "ready_for_triton", "triton_text"]

_FILES = ("launch", "ops", "reduce", "rows", "pattern", "layer")
_SECONDS = 600  # that the check of a written file may take


def triton_text(formula: Formula) -> str:
    """Text of the module, ASCII."""
    functions = triton_functions([formula.expression])
    group = formula.granularity
    parts = f"t.split({group.columns}, dim=1)"  # what competes in a tensor t, as [groups, size] each
    if group.across_rows:
        cut = f"[part.reshape(1, -1) for part in {parts}]" if group.columns else "[t.reshape(1, -1)]"
    else:
        cut = f"list({parts})" if group.columns else "[t]"
    launchers = formula.fill(
        "triton_prune.jinja",
        kernel="prune_layer" if group.across_rows else "prune_rows",
        size="numel()" if group.across_rows else "shape[1]",
        groups=cut,
        gather="prepare" if "def part(" in functions else "gathered",
        prune_parameters=prune_parameters("sparsity: float"),
        prune_nm_parameters=prune_parameters("n: int", "m: int"),
        named="{" + ", ".join(f'"{name}": {name}' for name in OPERANDS if name != "W") + "}",
        matrices=operands_with("out,in"),
        vectors=operands_with("in"),
        plain_score=torch_functions(formula.expression, "plain_score").strip("\n") + "\n",
    )
    functions += "\n\n" + launchers
    imports, definitions = _needed(functions)
    return formula.fill("triton.jinja", imports=imports, definitions=definitions, functions=functions)


def ready_for_triton(output: Path) -> None:
    """Refuses what could not be written or checked.

    Raises:
        InputError: Python would take a file of that name for a module that it imports.
        GpmetricError: Triton is not installed.
    """
    if output.stem in ("torch", "triton"):
        raise InputError(f"a file called {output.name!r} hides the module {output.stem} that it needs")
    if find_spec("triton") is None:
        raise GpmetricError("the format triton needs Triton, which checks the written file; it is for Linux")


def check_triton(formula: Formula, written: Path) -> None:
    """Runs the comparison that a written file holds: on a CUDA device if there is one, else in Triton's interpreter.

    Raises:
        GpmetricError: its masks differ from plain torch's.
    """
    environment = dict(os.environ)
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-P", "-W", "ignore", str(written)]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise GpmetricError(f"the exported file was not checked within {_SECONDS} s; nothing written") from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise GpmetricError(f"the check of the exported file failed; nothing written: {last[:200]}")


def _needed(text: str) -> tuple[str, str]:
    """Import lines and definitions of the kernel files, that a text uses directly or by what it uses."""
    found: dict[str, str] = {}  # a name -> its definition
    uses: dict[str, set[str]] = {}  # a name -> the names in its definition
    imports = {"Callable": ("collections.abc", "Callable")}  # a name -> module, and what is imported from it
    for file in _FILES:
        spec = find_spec(f"gpmetric.kernels.{file}")
        assert spec is not None
        assert spec.origin is not None
        source = Path(spec.origin).read_text(encoding="utf-8")
        for node in ast.parse(source).body:
            if isinstance(node, ast.Import):
                imports |= {alias.asname or alias.name: (ast.unparse(alias), "") for alias in node.names}
            if isinstance(node, ast.ImportFrom) and not str(node.module).startswith(("gpmetric", "__future__")):
                imports |= {alias.name: (str(node.module), alias.name) for alias in node.names}
            for defined in _defined(node):
                found[defined], uses[defined] = _lines(source, node), _names(node)
    wanted = _names(ast.parse(text))
    while more := {used for name in wanted & uses.keys() for used in uses[name]} - wanted:
        wanted |= more
    chosen = dict.fromkeys(found[name] for name in found if name in wanted)
    return _import_lines([imports[name] for name in imports if name in wanted]), "".join(chosen)


def _import_lines(imported: Iterable[tuple[str, str]]) -> str:
    """Sorted as ruff has them: the standard library, then torch and Triton."""
    blocks = []
    for standard in (True, False):
        ours = [pair for pair in imported if (pair[0].split(".")[0] in sys.stdlib_module_names) == standard]
        plain = sorted(f"import {module}\n" for module, name in ours if not name)
        modules = sorted({module for module, name in ours if name})
        names = {
            module: ", ".join(sorted(name for found, name in ours if found == module and name)) for module in modules
        }
        blocks.append("".join([*plain, *(f"from {module} import {names[module]}\n" for module in modules)]))
    return "\n".join(blocks)


def _defined(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name != "reference":
        yield node.name
    if isinstance(node, ast.Assign):
        for target in node.targets:
            yield from (part.id for part in ast.walk(target) if isinstance(part, ast.Name) and part.id != "__all__")


def _names(tree: ast.AST) -> set[str]:
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def _lines(source: str, node: ast.stmt) -> str:
    """A statement with its decorators and what follows on its last line, after blank lines."""
    first = min([node.lineno, *(one.lineno for one in getattr(node, "decorator_list", []))])
    text = "\n".join(source.splitlines()[first - 1 : node.end_lineno])
    return f"\n\n{text}\n"
