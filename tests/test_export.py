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
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sympy
import torch

from gpmetric.errors import GpmetricError, InputError
from gpmetric.expression import PRIMITIVES, Expression, parse
from gpmetric.expression.canonical import canonical
from gpmetric.expression.evaluate import evaluate
from gpmetric.expression.tree import arity
from gpmetric.formats import FORMATS, Formula, export_expression, python, triton
from gpmetric.formats.latex import to_latex
from gpmetric.formats.python import python_text
from gpmetric.formats.triton import triton_text
from gpmetric.modules import load_module
from gpmetric.operands import OPERANDS
from gpmetric.targets import plain_granularities

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is for Linux")
each_format = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[needs_triton, pytest.mark.slow] if name == "triton" else []) for name in FORMATS]
)
# comparison group -> what a file says of it; nothing where it is the row
COMPARISON = {
    "row": "",
    "layer": "Scores compete within the whole matrix.",
    "block": "Scores compete within each 128 consecutive columns, over all rows.",
}
RIA = "(abs(W)/rowsum(abs(W))+abs(W)/colsum(abs(W)))*sqrt(X)"


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton files are written without the comparison that each begins a process for."""
    monkeypatch.setitem(FORMATS, "triton", replace(FORMATS["triton"], check=None))


def write_python(expression: Expression, path: Path, version: str = "0", group: str = "row") -> None:
    export_expression(expression, "python", path, version, group)


def source_of_triton(formula: str, group: str) -> str:
    return triton_text(Formula(parse(formula), "0.1", group))


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


# What the primitives mean away from their guards, in double precision and on whole [out, in] matrices.
MEANING: dict[str, Any] = {
    "neg": lambda a: -a,
    "abs": np.abs,
    "sqr": lambda a: a * a,
    "sqrt": lambda a: np.sqrt(np.abs(a)),
    "log": lambda a: np.log(np.abs(a)),
    "exp": np.exp,
    "tanh": np.tanh,
    "inv": lambda a: 1 / a,
    "mms": lambda a: (a - a.min()) / np.ptp(a) if np.ptp(a) else 0 * a,
    "zsn": lambda a: (a - a.mean()) / a.std() if np.ptp(a) else 0 * a,
    "rowsum": lambda a: a.sum(axis=1, keepdims=True) + 0 * a,
    "colsum": lambda a: a.sum(axis=0, keepdims=True) + 0 * a,
    "rownorm": lambda a: np.sqrt((a * a).sum(axis=1, keepdims=True)) + 0 * a,
    "colnorm": lambda a: np.sqrt((a * a).sum(axis=0, keepdims=True)) + 0 * a,
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "max": np.maximum,
    "min": np.minimum,
    "pow": lambda a, b: np.abs(a) ** b,
}


def drawn(shape: tuple[int, int], seed: int) -> dict[str, torch.Tensor]:
    """Operands of which none is near zero or large."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {name: shape if row.axes == "out,in" else shape[1:] for name, row in OPERANDS.items()}
    operands = {name: 0.3 + torch.rand(size, generator=generator) for name, size in sizes.items()}
    return operands | {"W": operands["W"] * (torch.rand(shape, generator=generator) - 0.5).sign()}


@pytest.mark.parametrize("name", PRIMITIVES)
def test_python_of_every_primitive(name: str, tmp_path: Path) -> None:
    """The written file's scores are those of MEANING, which shares no code with the evaluator."""
    operands = drawn((6, 42), seed=3)
    W, X, G, D = (operands[one].double().numpy() + np.zeros((6, 42)) for one in "WXGD")
    arguments = {"W": W, "X": X, "2": np.full_like(W, 2.0), "W*X-G": W * X - G}
    for argument, value in arguments.items():
        values = (value, D)[: PRIMITIVES[name].arity]
        text = f"{name}({argument})" if len(values) == 1 else f"{name}({argument},D)"
        for formula, expected in ((f"W+{text}", W + MEANING[name](*values)), (text, MEANING[name](*values))):
            tokens = parse(f"W+{text}").tokens
            expression = Expression(tokens if formula != text else tokens[2:])
            write_python(expression, tmp_path / "metric.py", "0")
            score = load_module(tmp_path / "metric.py").score(**operands)
            np.testing.assert_allclose(score.numpy(), expected, rtol=1e-4, atol=1e-4, err_msg=formula)  # sums of fp32


def test_python_of_random_trees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit the evaluator's scores, also where the writer's own comparison is off."""
    monkeypatch.setattr(python, "check_python", lambda formula, written: None)
    generator, operands = random.Random(11), drawn((5, 23), seed=4)
    for _ in range(60):
        expression = random_expression(generator, 30)
        write_python(expression, tmp_path / "metric.py", "0")
        found, expected = load_module(tmp_path / "metric.py").score(**operands), evaluate(expression, operands)
        assert torch.equal(found.view(torch.int32), expected.view(torch.int32)), str(expression)


@pytest.mark.slow
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
    source = python_text(Formula(parse("abs(W)*X"), "0"))
    lines = source.split("torch.nn.Linear:")[1].split('"""')[0]
    assert "saliency = score(linear.weight, X=X)" in lines
    linear, activation = torch.nn.Linear(6, 3), torch.rand(6)
    saliency = evaluate(parse("abs(W)*X"), {"W": linear.weight, "X": activation})
    removed = saliency.argsort(dim=1, stable=True)[:, : saliency.shape[1] // 2]
    mask = torch.ones_like(saliency, dtype=torch.bool).scatter(1, removed, False)
    assert (mask.sum(dim=1) == 3).all()
    assert (saliency[mask].view(3, 3).amin(dim=1) >= saliency[~mask].view(3, 3).amax(dim=1)).all()


@pytest.mark.slow
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


@pytest.mark.usefixtures("unchecked")
@each_format
def test_every_format_says_where_scores_compete(name: str, tmp_path: Path) -> None:
    """Nothing where it is the row."""
    assert set(COMPARISON) == set(plain_granularities())
    for group, words in COMPARISON.items():
        export_expression(parse("abs(W)*X"), name, tmp_path / "out", "0", group)
        text = (tmp_path / "out").read_text()
        if name == "json":
            assert json.loads(text)["group"] == group
        else:
            assert words in text
            assert ("Scores compete" in text) == bool(words)


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
    record = Formula(parse("X*abs(W)"), "0").record()
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
    assert Formula(parse("((2*W)**900)**900"), "0").record()["sympy"] is None


def test_sympy_text_is_a_sympy_expression() -> None:
    """Only here, on our own text, is sympify used; value against the evaluator where no guard acts."""
    formula = parse("sqrt(W)*log(X)+W**3/G")
    form = sympy.sympify(Formula(formula, "0").sympy)
    values = {"W": -2.0, "X": 3.0, "G": 0.5}
    weight = torch.tensor([[values["W"]]])
    score = evaluate(formula, {"W": weight, "X": torch.tensor([values["X"]]), "G": torch.tensor([[values["G"]]])})
    assert float(form.subs(values)) == pytest.approx(float(score), rel=1e-6)


@each_format
def test_every_format_replaces_its_file_and_leaves_nothing_else(name: str, tmp_path: Path) -> None:
    target = tmp_path / "out.txt"
    target.write_text("the old file")
    export_expression(parse(RIA), name, target, "0.1")
    text = target.read_text()
    assert text.isascii()
    assert text.endswith("\n")
    assert "the old file" not in text
    assert [path.name for path in tmp_path.iterdir()] == ["out.txt"]
    if name == "json":
        assert json.loads(text)["canonical"] == str(canonical(parse(RIA)))


@pytest.mark.usefixtures("unchecked")
@each_format
@pytest.mark.parametrize("place", ["missing/out.txt", ".", "nul\0.txt", "x" * 300])
def test_unwritable_output_is_one_line(name: str, place: str, tmp_path: Path) -> None:
    with pytest.raises(GpmetricError) as caught:
        export_expression(parse("W"), name, f"{tmp_path}/{place}", "0.1")
    assert "cannot be written" in str(caught.value)
    assert str(caught.value).isprintable()
    assert not list(tmp_path.iterdir())


def test_export_expression_returns_the_record(tmp_path: Path) -> None:
    target = tmp_path / "metric.tex"
    record = export_expression(parse("abs(W)*X"), "latex", target, "0.1")
    assert (record["format"], record["output"], record["canonical"]) == ("latex", str(target), "abs(W)*X")
    with pytest.raises(InputError, match="format must be one of python triton latex sympy json, but got 'pdf'"):
        export_expression(parse("W"), "pdf", target, "0.1")
    with pytest.raises(InputError, match="group must be one of row layer block, but got 'n:m'"):
        export_expression(parse("W"), "latex", target, "0.1", "n:m")


@pytest.mark.parametrize("formula", ["abs(W)*X", "zsn(W*G)*tanh(H)/rowsum(F)", "mms(colnorm(W))*W**D"])
@pytest.mark.parametrize("group", COMPARISON)
def test_a_triton_file_imports_torch_and_triton_only(formula: str, group: str) -> None:
    source = source_of_triton(formula, group)
    imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom)]
    roots = {alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names}
    roots |= {str(node.module) for node in imports if isinstance(node, ast.ImportFrom)}
    roots = {name.partition(".")[0] for name in roots} - sys.stdlib_module_names
    assert roots == {"torch", "triton"}


@pytest.mark.parametrize("group", COMPARISON)
def test_a_triton_file_is_well_formatted(group: str, tmp_path: Path) -> None:
    """No name is missing or unused, and a linter finds nothing to do."""
    path = tmp_path / "metric.py"
    path.write_text(source_of_triton("W*W*G/rowsum(G)", group), encoding="utf-8")
    options = ["--isolated", "--line-length", "120", "--no-cache"]
    for command in (["check", "--select", "E,F,I,W"], ["format", "--check"]):
        run = subprocess.run([sys.executable, "-m", "ruff", *command, *options, path], capture_output=True, text=True)
        assert run.returncode == 0, run.stdout


def test_no_name_is_in_two_kernel_files() -> None:
    """Their definitions come into one file; the plain references do not."""
    seen: Counter[str] = Counter()
    for path in (Path(__file__).parents[1] / "kernels").glob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            seen.update(set(triton._defined(node)))
    assert not [name for name, count in seen.items() if count > 1]


@pytest.mark.slow
@needs_triton
@pytest.mark.usefixtures("unchecked")
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


@pytest.mark.every(3)
@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("tl.abs(v1)", "v1"),
        ("tl.minimum(removed, valid)", "tl.minimum(removed - 1, valid)"),
        ("rank >= removed", "rank > removed"),
    ],
)
def test_a_triton_file_that_differs_is_not_kept(
    right: str, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(formula: Formula) -> str:
        text = triton_text(formula)
        assert right in text
        return text.replace(right, wrong)

    monkeypatch.setitem(FORMATS, "triton", replace(FORMATS["triton"], text=broken))
    (tmp_path / "metric.py").write_text("before")
    with pytest.raises(
        GpmetricError, match="the check of the exported file failed; nothing written: RuntimeError: the masks"
    ):
        export_expression(parse("abs(W)*X"), "triton", tmp_path / "metric.py", "0")
    assert [path.name for path in tmp_path.iterdir()] == ["metric.py"]
    assert (tmp_path / "metric.py").read_text() == "before"


def test_a_triton_file_needs_triton(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "find_spec", lambda name: None)
    with pytest.raises(GpmetricError, match="the format triton needs Triton"):
        export_expression(parse("abs(W)*X"), "triton", tmp_path / "metric.py", "0")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["triton.py", "torch.py"])
def test_a_triton_file_hides_no_module(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"a file called '{name}' hides the module"):
        export_expression(parse("abs(W)*X"), "triton", tmp_path / name, "0")
