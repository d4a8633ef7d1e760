"""Formulas and their files grow by a row of PRIMITIVES, OPERANDS, FORMATS or GRANULARITIES, and by nothing else."""

from __future__ import annotations

import ast
import inspect
import signal
import subprocess
import sys
import textwrap
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gpmetric import cli
from gpmetric.codegen.functions import triton_functions
from gpmetric.errors import ExpressionError
from gpmetric.expression import PRIMITIVES, parse
from gpmetric.expression.canonical import canonical, to_sympy
from gpmetric.expression.columns import ColumnScores
from gpmetric.expression.evaluate import evaluate
from gpmetric.expression.primitives import KernelStep, Latex, Primitive
from gpmetric.expression.rank import rank_form
from gpmetric.expression.shared_program import SharedProgram
from gpmetric.expression.sign import nonnegative, parity
from gpmetric.formats import FORMATS, Format, Formula, export_expression
from gpmetric.formats.latex import to_latex
from gpmetric.formats.triton import triton_text
from gpmetric.modules import load_module
from gpmetric.operands import OPERANDS, Operand
from gpmetric.pruning.bench import bench
from gpmetric.targets import GRANULARITIES, Granularity

W = torch.tensor([[1.0, -3.0], [0.0, 2.0]])
X = torch.tensor([2.0, 0.5])


def torch_softsign(x: Tensor) -> Tensor:
    """x / (1 + |x|)."""
    return x / (x.abs() + 1)


def torch_rowenergy(x: Tensor) -> Tensor:
    """Sum of the squares of each row: [out, in] -> [out, 1]."""
    return (x * x).sum(dim=1, keepdim=True)


def torch_rem(a: Tensor, b: Tensor) -> Tensor:
    """Remainder of a / (|b| + 1), with the sign of the divisor."""
    return a.remainder(b.abs() + 1)


SOFTSIGN = Primitive(
    "softsign",
    1,
    torch_softsign,
    lambda x: x / (abs(x) + 1),
    None,
    "op_div({0}, tl.abs({0}) + 1.0)",
    Latex(r"\operatorname{softsign}\left(#1\right)"),
    sign="all",
    parity="odd",
    monotonicity=("increasing",),
)
ROWENERGY = Primitive(
    "rowenergy",
    1,
    torch_rowenergy,
    None,
    None,
    "{0}",
    Latex(r"\operatorname{rowenergy}\left(#1\right)"),
    sign="always",
    parity="even",
    reduces="in",
    kernel_step=KernelStep("rowsum", squares=True),
)
REM = Primitive(
    "rem",
    2,
    torch_rem,
    lambda a, b: a % (abs(b) + 1),
    None,
    "op_rem({0}, {1})",
    Latex(r"#1 \bmod #2", needs=(2, 3)),
    infix="%",
    precedence=2,
)
SIGNED = Operand("S", "in", "skewness of the input activation", "inputs", r"\gamma", signed=True)
NARROW = Granularity("each 64 consecutive inputs of one output", columns=64)


@pytest.fixture
def grown(monkeypatch: pytest.MonkeyPatch) -> None:
    for row in (SOFTSIGN, ROWENERGY, REM):
        monkeypatch.setitem(PRIMITIVES, row.name, row)
    monkeypatch.setitem(OPERANDS, "S", SIGNED)
    monkeypatch.setitem(GRANULARITIES, "narrow", NARROW)
    monkeypatch.setitem(FORMATS, "prefix", Format(lambda formula: f"{formula.expression.tokens}\n"))


def everywhere(text: str, folder: Path) -> None:
    """The same scores by the evaluator, a shared program, a scorer of columns and an exported file (checks itself)."""
    expression, operands = parse(text), {"W": W, "X": X, "S": X}
    score = evaluate(expression, operands)
    [(_, shared)] = SharedProgram([expression]).scores(operands)
    assert torch.equal(shared, score)
    assert torch.equal(ColumnScores(expression, [operands])(W[None, None], 0, 2)[0, 0], score)
    export_expression(expression, "python", folder / "metric.py", "0")


@pytest.mark.usefixtures("grown")
def test_a_primitive_is_a_row(tmp_path: Path) -> None:
    """softsign of a 2x2 matrix by hand; it is odd, increases, and has the sign of its argument."""
    expression = parse("softsign(W)*X")
    assert str(expression) == "softsign(W)*X"
    assert evaluate(expression, {"W": W, "X": X}).tolist() == [[1.0, -0.375], [0.0, torch.tensor(1 / 3).item()]]
    assert nonnegative(parse("softsign(abs(W))").tokens)
    assert not nonnegative(parse("softsign(W)").tokens)
    assert parity(expression.tokens) == "odd"
    assert str(canonical(parse("abs(softsign(-W))+softsign(1)-0.5"))) == "abs(softsign(W))"
    assert str(rank_form(parse("2*softsign(abs(W)*X)"), "row")) == "abs(W)*X"
    assert to_latex(expression) == r"\operatorname{softsign}\left(W\right) \odot \lVert X\rVert"
    assert str(to_sympy(expression)) == "X*softsign(W)"
    assert "op_div(v1, tl.abs(v1) + 1.0)" in triton_functions([expression])
    everywhere("softsign(W)*X", tmp_path)
    with pytest.raises(ExpressionError, match="did you mean softsign"):
        parse("softsing(W)")


@pytest.mark.usefixtures("grown")
def test_a_reduction_is_a_row(tmp_path: Path) -> None:
    """rowenergy: 10 and 4 of the rows (1, -3) and (0, 2)."""
    expression = parse("abs(W)*X/rowenergy(W)")
    assert evaluate(parse("rowenergy(W)"), {"W": W}).tolist() == [[10.0, 10.0], [4.0, 4.0]]
    assert nonnegative(expression.tokens)
    assert parity(expression.tokens) == "even"
    assert str(canonical(parse("rowenergy(-abs(W))"))) == "rowenergy(W)"
    assert (str(rank_form(expression, "row")), rank_form(expression, "layer")) == ("abs(W)*X", expression)
    assert to_latex(parse("rowenergy(W)")) == r"\operatorname{rowenergy}\left(W\right)"
    assert str(to_sympy(parse("rowenergy(W)"))) == "rowenergy(W)"
    functions = triton_functions([expression])
    assert "return v1" in functions.partition("def part")[2]  # the square of v0
    assert 'LAYOUT = Layout((), ("X",), 1, 0, 0, part, (((0, "rowsum", 0),),))' in functions
    everywhere("abs(W)*X/rowenergy(W)", tmp_path)


@pytest.mark.usefixtures("grown")
def test_an_operator_is_a_row(tmp_path: Path) -> None:
    """-3 % (2 + 1) is 0, and it binds as * does."""
    expression = parse("(W+X)%X*2")
    assert expression.tokens == ("mul", "rem", "add", "W", "X", "X", 2.0)
    assert str(expression) == "(W+X)%X*2"
    assert evaluate(parse("W%X"), {"W": W, "X": X}).tolist() == [[1.0, 0.0], [0.0, 0.5]]
    assert to_latex(parse("W%(X*W)")) == r"W \bmod \left(\lVert X\rVert \odot W\right)"
    assert str(canonical(parse("W*(5%1)+X%W"))) == "W+X%W"
    everywhere("W%X", tmp_path)


@pytest.mark.usefixtures("grown")
def test_an_operand_is_a_row(tmp_path: Path) -> None:
    """A signed vector; in exported files it comes after those there are, `out` included."""
    expression = parse("abs(W)*S")
    assert evaluate(expression, {"W": W, "S": X}).tolist() == [[2.0, 1.5], [0.0, 1.0]]
    with pytest.raises(ExpressionError, match=r"operand S must have shape \[2\]"):
        evaluate(expression, {"W": W, "S": W})
    assert not nonnegative(expression.tokens)
    assert parity(expression.tokens) == "even"
    assert str(canonical(parse("sqrt(sqr(S))*W"))) == "W*abs(S)"
    assert to_latex(expression) == r"\lvert W\rvert \odot \gamma"
    everywhere("abs(W)*S", tmp_path)
    module = load_module(tmp_path / "metric.py")
    assert list(inspect.signature(module.score).parameters) == ["W", "X", "G", "H", "D", "F", "R", "S"]
    assert "S [in]: skewness of the input activation" in (module.__doc__ or "")
    functions = {
        node.name: [argument.arg for argument in node.args.args]
        for node in ast.parse(triton_text(Formula(expression, "0"))).body
        if isinstance(node, ast.FunctionDef)
    }
    operands = ["X", "G", "H", "D", "out", "F", "R", "S"]
    assert functions["prune"] == ["W", "sparsity", *operands]
    assert functions["prune_nm"] == ["W", "n", "m", *operands]


@pytest.mark.usefixtures("grown")
def test_a_format_is_a_row(tmp_path: Path) -> None:
    record = export_expression(parse("abs(W)*X"), "prefix", tmp_path / "out", "0")
    assert (tmp_path / "out").read_text() == "('mul', 'abs', 'W', 'X')\n"
    assert (record["format"], record["canonical"]) == ("prefix", "abs(W)*X")


@pytest.mark.usefixtures("grown")
@pytest.mark.parametrize("form", ["prefix", "python", "latex"])
def test_the_commands_take_what_was_added(
    form: str, tiny_llama: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`export` a formula of an added primitive and reduction in an added format, and `bench` it."""
    formula = "narrow:abs(softsign(W))*X/rowenergy(W)"
    command = ["gpmetric", "export", formula, "--format", form, "-o", str(tmp_path / "out.py")]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr(signal, "signal", lambda *arguments: None)  # that of this process stays
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0
    assert "softsign" in (tmp_path / "out.py").read_text()
    result = bench(
        str(tiny_llama), calibration=str(tiny_text), text=[str(tiny_text)], metric=[formula, "narrow:wanda"],
        target=["0.5"], samples=2, windows=2, sequence_length=32, device="cpu",
    )  # fmt: skip
    assert [row["error"] for row in result["results"]] == [None, None]
    assert result["results"][0]["sparsity"] == result["results"][1]["sparsity"] > 0.45


@pytest.mark.usefixtures("grown")
def test_a_granularity_is_a_row(tmp_path: Path) -> None:
    """The example of use keeps, of 130 inputs, the larger half of 64, 64 and 2: of a row 1, 2, ... this sum."""
    path = tmp_path / "narrow.py"
    export_expression(parse("abs(W)"), "python", path, "0", "narrow")
    text = path.read_text()
    assert "Scores compete within each 64 consecutive columns, row by row." in text
    usage = text.split("every 64 columns of every row of a torch.nn.Linear:")[1].split('"""')[0]
    code = "import torch\nfrom narrow import score\nlinear = torch.nn.Linear(130, 2)\n"
    code += "linear.weight.data = torch.arange(1.0, 131).repeat(2, 1)\n"
    code += f"{textwrap.dedent(usage)}\nprint(linear.weight.sum().item())\n"
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert float(run.stdout) == 2 * (sum(range(33, 65)) + sum(range(97, 129)) + 130)
    assert export_expression(parse("W"), "json", tmp_path / "out", "0", "narrow")["group"] == "narrow"


@pytest.mark.slow
@pytest.mark.usefixtures("grown")
@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is for Linux")
def test_all_of_it_in_a_triton_file(tmp_path: Path) -> None:
    """The written file compares its kernels with plain torch before it takes its place."""
    text = "abs(softsign(W))*X/rowenergy(W)*(S+1)"
    export_expression(parse(text), "triton", tmp_path / "metric.py", "0", "narrow")
    assert "lowest scores of every 64 columns of every row set to zero" in (tmp_path / "metric.py").read_text()
