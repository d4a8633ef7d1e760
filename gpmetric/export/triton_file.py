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

from gpmetric.errors import GpmetricError, InputError
from gpmetric.export.python import header, torch_functions
from gpmetric.export.triton import triton_functions
from gpmetric.expression.tree import Expression
from gpmetric.provenance import write_text

__all__ = ["triton_source", "write_triton"]

_FILES = ("launch", "ops", "reduce", "rows", "pattern", "layer")
_SECONDS = 600  # that the check of a written file may take

_HEAD = '''"""Pruning metric: {formula}

Triton kernels that score, select exactly k and write the masked weight. Made by gpmetric {version}.
{comparison}sha256 of the canonical form: {digest}

Operands{operands}

Usage, on a CUDA device:

    pruned = prune(linear.weight, 0.5{arguments})  # a new tensor
    prune(linear.weight, 0.5{arguments}, out=linear.weight)  # in place
    pruned = prune_nm(linear.weight, 2, 4{arguments})  # 2 kept of each 4 inputs

`python FILE` compares the kernels with plain torch on random numbers; with TRITON_INTERPRET=1 it needs no GPU.
"""

from __future__ import annotations

'''

# comparison group -> how the pruned weight is made
_PRUNE = {
    "row": """    def run(weight: Tensor, operands: Operands, out: Tensor | None, bad: Tensor) -> Tensor:
        return prune_rows(weight, int(weight.shape[1] * sparsity), score, operands, out=out, bad=bad)
""",
    "layer": """    def run(weight: Tensor, operands: Operands, out: Tensor | None, bad: Tensor) -> Tensor:
        return prune_layer(weight, int(weight.numel() * sparsity), score, operands, out=out, bad=bad)
""",
    "block": """    def run(weight: Tensor, operands: Operands, out: Tensor | None, bad: Tensor) -> Tensor:
        pruned = [
            prune_layer(part, int(part.numel() * sparsity), score, its, bad=bad)
            for part, its in pieces(weight, operands, 128)
        ]
        return torch.cat(pruned, dim=1) if out is None else torch.cat(pruned, dim=1, out=out)
""",
}

# comparison group -> its name, and the expression that cuts a tensor t into groups [groups, size]
_GROUP = {
    "row": ("every row", "[t]"),
    "layer": ("the matrix", "[t.reshape(1, -1)]"),
    "block": ("each 128 columns", "[part.reshape(1, -1) for part in t.split(128, dim=1)]"),
}

_TAIL = '''
def prune(
    W: Tensor,
    sparsity: float,
    X: Tensor | None = None,
    G: Tensor | None = None,
    H: Tensor | None = None,
    D: Tensor | None = None,
    out: Tensor | None = None,
    F: Tensor | None = None,
) -> Tensor:
    """W with the int(size * sparsity) lowest scores of {group} set to zero, of equals the lower column first.

    Args:
        W: [out, in], float32, bfloat16 or float16, on a CUDA device.
        sparsity: at least 0 and below 1.
        X, D: [in]. G, H, F: [out, in]. Those that the metric uses.
        out: where to write, like W; W itself for in place. A new tensor by default.

    Raises:
        ValueError: a tensor or number that cannot be used, or scores that are NaN or infinite; `out` is written then.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must be at least 0 and below 1, but got {{sparsity}}")

{prune}
    return _launch(run, W, {named}, out)


def prune_nm(
    W: Tensor,
    n: int,
    m: int,
    X: Tensor | None = None,
    G: Tensor | None = None,
    H: Tensor | None = None,
    D: Tensor | None = None,
    out: Tensor | None = None,
    F: Tensor | None = None,
) -> Tensor:
    """The same with the n highest scores of each m consecutive inputs kept; m is 2, 4, 8 or 16 and divides `in`."""

    def run(weight: Tensor, operands: Operands, out: Tensor | None, bad: Tensor) -> Tensor:
        return prune_pattern(weight, n, m, score, operands, out=out, bad=bad)

    return _launch(run, W, {named}, out)


def _launch(
    run: Callable[[Tensor, Operands, Tensor | None, Tensor], Tensor],
    W: Tensor,
    named: dict[str, Tensor | None],
    out: Tensor | None,
) -> Tensor:
    if W.dim() != 2:
        raise ValueError(f"W must be [out, in], but got {{list(W.shape)}}")
    if out is not None and (out.shape != W.shape or out.dtype != W.dtype or out.device != W.device):
        raise ValueError(f"out must be {{list(W.shape)}}, {{W.dtype}}, on {{W.device}} as W")
    if not W.numel():
        return W.detach().clone() if out is None else out
    weight = W.detach().contiguous()
    check(weight, Operands())
    bad = torch.zeros(1, dtype=torch.int64, device=W.device)
    direct = out is not None and out.is_contiguous()
    pruned = run(weight, {operands}(weight, named, LAYOUT), out.detach() if direct else None, bad)
    if out is not None and not direct:
        out.detach().copy_(pruned)
    if bad:
        raise ValueError(f"{{int(bad)}} of {{W.numel()}} scores are NaN or infinite")
    return pruned if out is None else out


{plain}

def _groups(t: Tensor) -> list[Tensor]:
    """[groups, size] each: what competes in `prune`."""
    return {groups}


def compare(device: str) -> str:
    """Compares the kernels with plain torch on random numbers, and tells how much was compared.

    Masks may differ where a score is within a thousandth of its group's standard deviation from the threshold: exp,
    log, powers and sums may differ by their last bits.

    Raises:
        RuntimeError: they differ elsewhere, or the number of zeros is wrong.
    """
    cases = [
        (lambda W, named: prune(W, 0.5, **named), _groups, lambda size: int(size * 0.5)),
        (lambda W, named: prune_nm(W, 2, 4, **named), lambda t: [t.reshape(-1, 4)], lambda size: 2),
        (lambda W, named: prune_nm(W, 4, 8, **named), lambda t: [t.reshape(-1, 8)], lambda size: 4),
    ]
    generator = torch.Generator().manual_seed(0)
    compared = 0
    for dtype in (torch.float32, torch.bfloat16):
        W = torch.randn(12, 272, generator=generator).to(device, dtype)
        named = {{name: torch.rand(12, 272, generator=generator).to(device) for name in "GHF"}}
        named |= {{name: torch.rand(272, generator=generator).to(device) for name in "XD"}}
        scores = plain_score(W, **named)
        if not scores.isfinite().all():
            continue
        for run, cut, count in cases:
            for pruned, weight, score in zip(cut(run(W, named)), cut(W), cut(scores), strict=True):
                removed = count(score.shape[1])
                lowest = score.sort(dim=1, stable=True)
                gone = torch.zeros_like(score, dtype=torch.bool).scatter(1, lowest.indices[:, :removed], True)
                distance = (score - lowest.values[:, removed - 1 : removed]).abs()
                close = distance <= 1e-3 * score.std(dim=1, keepdim=True)
                wrong = (pruned != weight.masked_fill(gone, 0)) & ~close
                if wrong.any() or ((pruned == 0).sum(dim=1) != removed).any():
                    raise RuntimeError(f"the masks of the kernels and of torch differ at {{int(wrong.sum())}} weights")
                compared += pruned.numel()
    return f"{{compared}} weights compared" if compared else "nothing compared: random scores are NaN or infinite"


if __name__ == "__main__":
    print(compare("cuda" if torch.cuda.is_available() else "cpu"))
'''


def triton_source(expression: Expression, version: str, group: str = "row") -> str:
    """Text of the module, ASCII; see `write_triton` for the checked file."""
    name, cut = _GROUP[group]
    head = _HEAD.format(**header(expression, version, group))
    functions = triton_functions([expression])
    rest = _TAIL.format(
        group=name,
        prune=_PRUNE[group],
        groups=cut,
        operands="prepare" if "def part(" in functions else "gathered",
        named="{" + ", ".join(f'"{operand}": {operand}' for operand in "XGHDF") + "}",
        plain=torch_functions(expression, "plain_score").strip("\n") + "\n",
    )
    tail = f"\n\n{functions}\n{rest}"
    imports, definitions = _needed(tail)
    return head + imports + definitions + tail


def write_triton(expression: Expression, path: str | Path, version: str, group: str = "row") -> None:
    """Writes the module, having run its comparison: on a CUDA device if there is one, else in Triton's interpreter.

    Raises:
        InputError: Python would take a file of that name for a module that it imports.
        GpmetricError: Triton is not installed, the file cannot be written, or its masks differ from plain torch's;
            nothing is then left at `path`.
    """
    if Path(path).stem in ("torch", "triton"):
        raise InputError(f"a file called {Path(path).name!r} hides the module {Path(path).stem} that it needs")
    if find_spec("triton") is None:
        raise GpmetricError("the format triton needs Triton, which checks the written file; it is for Linux")
    write_text(Path(path), triton_source(expression, version, group), _verify)


def _verify(path: Path) -> None:
    environment = dict(os.environ)
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-P", "-W", "ignore", str(path)]
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
