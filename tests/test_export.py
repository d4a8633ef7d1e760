"""Exported files: the Python function bit for bit, LaTeX and JSON by hand, and what is left behind on failure."""

from __future__ import annotations

import ast
import json
import os
import random
import subprocess
import sys
import textwrap
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import sympy
import torch

from gpmetric.errors import GpmetricError, InputError
from gpmetric.export import FORMATS, export_expression, python, triton_file
from gpmetric.export.latex import to_latex
from gpmetric.export.loading import load_module
from gpmetric.export.python import python_source, write_python
from gpmetric.export.text import COMPARISON, to_json, to_sympy_text
from gpmetric.expression import PRIMITIVES, Expression, parse
from gpmetric.expression.canonical import canonical
from gpmetric.expression.evaluate import evaluate
from gpmetric.expression.tree import arity
from gpmetric.operands import OPERANDS
from gpmetric.pruning.target import GRANULARITIES

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is for Linux")
each_format = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[needs_triton] if name == "triton" else []) for name in FORMATS]
)
RIA = "(abs(W)/rowsum(abs(W))+abs(W)/colsum(abs(W)))*sqrt(X)"


def random_expression(generator: random.Random, nodes: int) -> Expression:
    """A random tree of about `nodes` nodes over both tables."""
    tokens: list[str | float] = []
    missing = 1
    while missing:
        room = nodes - len(tokens) - missing
        constant = generator.choice([0.5, -2.0, generator.uniform(-3, 3)])
        leaf = generator.choice(list(OPERANDS)) if generator.random() < 0.7 else constant
        inner = generator.choice([name for name, row in PRIMITIVES.items() if row.arity == 1 or room > 0])
        tokens.append(leaf if room <= 0 or (missing > 1 and generator.random() < 0.15) else inner)
        missing += arity(tokens[-1]) - 1
    return Expression(tuple(tokens))


@pytest.mark.parametrize("name", PRIMITIVES)
def test_python_of_every_primitive(name: str, tmp_path: Path) -> None:
    """`write_python` compares the written file with the evaluator bit for bit and raises where they differ."""
    for argument in ("W", "X", "2", "W*X-G"):
        text = f"{name}({argument})" if PRIMITIVES[name].arity == 1 else f"{name}({argument},D)"
        expression = parse(f"W+{text}")
        write_python(expression, tmp_path / "metric.py", "0")
        write_python(Expression(expression.tokens[2:]), tmp_path / "metric.py", "0")


def test_python_of_random_trees(tmp_path: Path) -> None:
    generator = random.Random(11)
    for _ in range(60):
        write_python(random_expression(generator, 30), tmp_path / "metric.py", "0")


def test_python_file_needs_torch_only_and_carries_its_primitives(tmp_path: Path) -> None:
    """Run in a process where gpmetric cannot be imported; RIA's score of a 1x2 layer by hand."""
    write_python(parse(RIA), tmp_path / "ria.py", "1.2.3")
    code = (
        "import sys; sys.modules['gpmetric'] = None; import torch, ria\n"
        "print(ria.score(torch.tensor([[1.0, -3.0]]), X=torch.tensor([4.0, 9.0])).tolist())\n"
        "try: ria.score(torch.ones(2, 2))\n"
        "except ValueError as error: print(error)"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == ["[[2.5, 5.25]]", "this score needs the operand X"]
    source = (tmp_path / "ria.py").read_text()
    assert "def torch_rowsum" in source
    assert "def torch_tanh" not in source
    assert "gpmetric 1.2.3" in source
    assert "import gpmetric" not in source
    assert source.count("torch_abs(W)") == 1  # shared parts are computed once


def test_python_usage_example_runs() -> None:
    """The docstring's pruning lines remove the lower half of every row."""
    source = python_source(parse("abs(W)*X"), "0")
    lines = source.split("torch.nn.Linear:")[1].split('"""')[0]
    assert "saliency = score(linear.weight, X=X)" in lines
    linear, activation = torch.nn.Linear(6, 3), torch.rand(6)
    saliency = evaluate(parse("abs(W)*X"), {"W": linear.weight, "X": activation})
    removed = saliency.argsort(dim=1, stable=True)[:, : saliency.shape[1] // 2]
    mask = torch.ones_like(saliency, dtype=torch.bool).scatter(1, removed, False)
    assert (mask.sum(dim=1) == 3).all()
    assert (saliency[mask].view(3, 3).amin(dim=1) >= saliency[~mask].view(3, 3).amax(dim=1)).all()


def test_python_usage_follows_the_group(tmp_path: Path) -> None:
    """Sum of what is kept of a 2x130 weight, by hand: rows of 2 and 1 whose last 2 columns are 0.25 and 0.5.

    Each row keeps 65; the matrix keeps the 2s and two 1s; the columns after the first 128 keep the 0.5s.
    """
    code = "import torch\n"
    for group in COMPARISON:
        write_python(parse("abs(W)"), tmp_path / f"{group}.py", "0", group)
        usage = (tmp_path / f"{group}.py").read_text().split("torch.nn.Linear:")[1].split('"""')[0]
        code += (
            f"from {group} import score\nlinear = torch.nn.Linear(130, 2)\n"
            "linear.weight.data = torch.tensor([[2.0] * 128 + [0.25] * 2, [1.0] * 128 + [0.5] * 2])\n"
            f"{textwrap.dedent(usage)}\nprint(linear.weight.sum().item())\n"
        )
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    kept = dict(zip(COMPARISON, map(float, run.stdout.split()), strict=True))
    assert kept == {"row": 65 * 2 + 65, "layer": 128 * 2 + 2, "block": 128 * 2 + 1}


@each_format
def test_every_format_says_where_scores_compete(name: str, tmp_path: Path) -> None:
    """Nothing where it is the row."""
    assert set(COMPARISON) == set(GRANULARITIES) - {"n:m"}
    for group, words in COMPARISON.items():
        export_expression(parse("abs(W)*X"), name, tmp_path / "out", "0", group)
        text = (tmp_path / "out").read_text()
        if name == "json":
            assert json.loads(text)["group"] == group
        else:
            assert (words in text) == (group != "row")


def test_a_score_is_never_the_operand(tmp_path: Path) -> None:
    write_python(parse("W"), tmp_path / "metric.py", "0")
    module = load_module(tmp_path / "metric.py")
    weight = torch.ones(2, 3)
    assert module.score(weight).data_ptr() != weight.data_ptr()


def test_docstring_cannot_be_escaped(tmp_path: Path) -> None:
    version = '1"""\nraise SystemExit\n\\'
    write_python(parse("W"), tmp_path / "metric.py", version)
    assert "SystemExit" in (load_module(tmp_path / "metric.py").__doc__ or "")


def test_a_file_that_differs_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(python, "evaluate", lambda expression, operands: evaluate(expression, operands) + 1)
    (tmp_path / "metric.py").write_text("before")
    with pytest.raises(GpmetricError, match="differs from the formula"):
        write_python(parse("abs(W)*X"), tmp_path / "metric.py", "0")
    assert [path.name for path in tmp_path.iterdir()] == ["metric.py"]
    assert (tmp_path / "metric.py").read_text() == "before"


@pytest.mark.parametrize(
    ("formula", "latex"),
    [
        ("abs(W)*X", r"\lvert W\rvert \odot \lVert X\rVert"),
        ("-W**2", r"-{\lvert W\rvert}^{\odot 2}"),
        ("W**3", r"{W}^{\odot 3}"),
        ("sqr(W+X)", r"{\left(W + \lVert X\rVert\right)}^{\odot 2}"),
        ("sqrt(X)/W", r"\frac{\sqrt{\lVert X\rVert}}{W}"),
        ("sqrt(W)", r"\sqrt{\lvert W\rvert}"),
        ("W-(X-G)", r"W - \left(\lVert X\rVert - G\right)"),
        ("2*W", r"2 \cdot W"),
        ("W*-G", r"W \odot \left(-G\right)"),
        ("W*1.5e-9", r"W \cdot \left(1.5 \cdot 10^{-9}\right)"),
        ("max(W,0.5)", r"\max\left(W, 0.5\right)"),
    ],
)
def test_latex(formula: str, latex: str) -> None:
    assert to_latex(parse(formula)) == latex


def test_latex_is_balanced_for_random_trees() -> None:
    generator = random.Random(2)
    for _ in range(200):
        text = to_latex(random_expression(generator, 25))
        assert "#" not in text
        for left, right in (("{", "}"), (r"\left", r"\right"), (r"\lvert", r"\rvert")):
            assert text.count(left) == text.count(right)


def test_json_record() -> None:
    record = to_json(parse("X*abs(W)"))
    assert record == {
        "formula": "X*abs(W)",
        "group": "row",
        "canonical": "abs(W)*X",
        "latex": r"\lVert X\rVert \odot \lvert W\rvert",
        "sympy": "X*Abs(W)",
        "operands": ["W", "X"],
        "nodes": 4,
        "depth": 3,
        "tokens": ["mul", "X", "abs", "W"],
    }
    assert to_json(parse("((2*W)**900)**900"))["sympy"] is None


def test_sympy_text_is_a_sympy_expression() -> None:
    """Only here, on our own text, is sympify used; value against the evaluator where no guard acts."""
    formula = parse("sqrt(W)*log(X)+W**3/G")
    form = sympy.sympify(to_sympy_text(formula))
    values = {"W": -2.0, "X": 3.0, "G": 0.5}
    weight = torch.tensor([[values["W"]]])
    score = evaluate(formula, {"W": weight, "X": torch.tensor([values["X"]]), "G": torch.tensor([[values["G"]]])})
    assert float(form.subs(values)) == pytest.approx(float(score), rel=1e-6)


@each_format
def test_every_format_replaces_its_file_and_leaves_nothing_else(name: str, tmp_path: Path) -> None:
    target = tmp_path / "out.txt"
    target.write_text("the old file")
    FORMATS[name](parse(RIA), target, "0.1")
    text = target.read_text()
    assert text.isascii()
    assert text.endswith("\n")
    assert "the old file" not in text
    assert [path.name for path in tmp_path.iterdir()] == ["out.txt"]
    if name == "json":
        assert json.loads(text)["canonical"] == str(canonical(parse(RIA)))


@each_format
@pytest.mark.parametrize("place", ["missing/out.txt", ".", "nul\0.txt", "x" * 300])
def test_unwritable_output_is_one_line(name: str, place: str, tmp_path: Path) -> None:
    with pytest.raises(GpmetricError) as caught:
        FORMATS[name](parse("W"), f"{tmp_path}/{place}", "0.1")
    assert "cannot be written" in str(caught.value)
    assert str(caught.value).isprintable()
    assert not list(tmp_path.iterdir())


def test_export_expression_returns_the_record(tmp_path: Path) -> None:
    target = tmp_path / "metric.tex"
    record = export_expression(parse("abs(W)*X"), "latex", target, "0.1")
    assert (record["format"], record["output"], record["canonical"]) == ("latex", str(target), "abs(W)*X")
    with pytest.raises(InputError, match="format must be one of python triton latex sympy json, but got 'pdf'"):
        export_expression(parse("W"), "pdf", target, "0.1")


@pytest.mark.parametrize("formula", ["abs(W)*X", "zsn(W*G)*tanh(H)/rowsum(F)", "mms(colnorm(W))*W**D"])
@pytest.mark.parametrize("group", COMPARISON)
def test_a_triton_file_imports_torch_and_triton_only(formula: str, group: str) -> None:
    source = triton_file.triton_source(parse(formula), "0.1", group)
    imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]
    roots = {alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names}
    roots |= {str(node.module) for node in imports if isinstance(node, ast.ImportFrom)}
    roots = {name.partition(".")[0] for name in roots} - sys.stdlib_module_names
    assert roots == {"torch", "triton"}


@pytest.mark.parametrize("group", COMPARISON)
def test_a_triton_file_is_well_formatted(group: str, tmp_path: Path) -> None:
    """No name is missing or unused, and a linter finds nothing to do."""
    path = tmp_path / "metric.py"
    path.write_text(triton_file.triton_source(parse("W*W*G/rowsum(G)"), "0.1", group), encoding="utf-8")
    options = ["--isolated", "--line-length", "120", "--no-cache"]
    for command in (["check", "--select", "E,F,I,W"], ["format", "--check"]):
        run = subprocess.run([sys.executable, "-m", "ruff", *command, *options, path], capture_output=True, text=True)
        assert run.returncode == 0, run.stdout


def test_no_name_is_in_two_kernel_files() -> None:
    """Their definitions come into one file; the plain references do not."""
    seen: Counter[str] = Counter()
    for path in (Path(__file__).parents[1] / "kernels").glob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            seen.update(set(triton_file._defined(node)))
    assert not [name for name, count in seen.items() if count > 1]


@needs_triton
def test_a_triton_file_checks_itself(tmp_path: Path) -> None:
    export_expression(parse("W*W*G/rowsum(G)"), "triton", tmp_path / "metric.py", "0")
    (tmp_path / "torch_only").mkdir()
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "../metric.py"],
        cwd=tmp_path / "torch_only",
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout == "19584 weights compared\n"


@needs_triton
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("tl.abs(v1)", "v1"),
        ("tl.minimum(removed, valid)", "tl.minimum(removed - 1, valid)"),
        ("rank >= REMOVED", "rank > REMOVED"),
    ],
)
def test_a_triton_file_that_differs_is_not_kept(
    right: str, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = triton_file.triton_source

    def broken(*arguments: Any) -> str:
        text = source(*arguments)
        assert right in text
        return text.replace(right, wrong)

    monkeypatch.setattr(triton_file, "triton_source", broken)
    (tmp_path / "metric.py").write_text("before")
    with pytest.raises(
        GpmetricError, match="the check of the exported file failed; nothing written: RuntimeError: the masks"
    ):
        export_expression(parse("abs(W)*X"), "triton", tmp_path / "metric.py", "0")
    assert [path.name for path in tmp_path.iterdir()] == ["metric.py"]
    assert (tmp_path / "metric.py").read_text() == "before"


def test_a_triton_file_needs_triton(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_file, "find_spec", lambda name: None)
    with pytest.raises(GpmetricError, match="the format triton needs Triton"):
        export_expression(parse("abs(W)*X"), "triton", tmp_path / "metric.py", "0")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["triton.py", "torch.py"])
def test_a_triton_file_hides_no_module(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"a file called '{name}' hides the module"):
        export_expression(parse("abs(W)*X"), "triton", tmp_path / name, "0")
