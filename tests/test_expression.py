"""The formula language: tables, trees, parse and print, bad input, and scores against hand-worked matrices."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gpmetric.errors import ExpressionError
from gpmetric.expression import PRIMITIVES, Expression, parse
from gpmetric.expression.evaluate import evaluate
from gpmetric.expression.parse import MAX_DEPTH, MAX_NODES
from gpmetric.expression.primitives import Primitive
from gpmetric.expression.torch_forms import EXP_LIMIT, TINY
from gpmetric.expression.tree import MAX_CONSTANT, arity
from gpmetric.operands import OPERANDS

W = torch.tensor([[1.0, -2.0, 3.0, -4.0], [0.0, 5.0, -6.0, 7.0]])
X = torch.tensor([1.0, 2.0, 3.0, 4.0])
NAMES = st.sampled_from([*OPERANDS, *PRIMITIVES])
CONSTANTS = st.floats(-MAX_CONSTANT, MAX_CONSTANT, exclude_min=True, exclude_max=True)


@st.composite
def trees(draw: Callable[..., object], nodes: int = 24) -> Expression:
    """Any valid tree over both tables and the constants."""
    tokens: list[str | float] = []
    missing = 1
    while missing:
        room = nodes - len(tokens) - missing
        leaf = st.one_of(st.sampled_from(list(OPERANDS)), CONSTANTS, st.sampled_from([0.5, -0.5, 2.0, -1.0, 1e16]))
        inner = st.sampled_from([name for name, row in PRIMITIVES.items() if row.arity == 1 or room > 1])
        tokens.append(draw(st.one_of(inner, inner, leaf) if room > 0 else leaf))  # type: ignore[arg-type]
        missing += arity(tokens[-1]) - 1
    return Expression(tuple(tokens))


# Tables


def test_tables_are_keyed_by_name_and_disjoint() -> None:
    assert [row.name for row in OPERANDS.values()] == list(OPERANDS)
    assert [row.name for row in PRIMITIVES.values()] == list(PRIMITIVES)
    assert not set(OPERANDS) & set(PRIMITIVES)
    assert list(OPERANDS) == ["W", "X", "G", "H", "D", "F", "R"]
    assert len({row.torch.__name__ for row in PRIMITIVES.values()}) == len(PRIMITIVES)


@pytest.mark.parametrize("row", PRIMITIVES.values(), ids=lambda row: row.name)
def test_every_primitive_is_total_on_finite_values(row: Primitive) -> None:
    """Zeros, negatives, tiny and large values give a finite result (overflow of fp32 aside) that broadcasts."""
    value = torch.tensor([[0.0, -1.5, 2.0], [1e-35, -1e-25, 1e6]])
    result = row.torch(*[value, value.flip(1) * 0.5][: row.arity])
    assert result.expand(2, 3).shape == (2, 3)
    assert result.dtype == torch.float32
    if row.name != "pow":  # 1e6 ** 5e5 overflows
        assert torch.isfinite(result).all()


@pytest.mark.parametrize("row", PRIMITIVES.values(), ids=lambda row: row.name)
@pytest.mark.parametrize("place", [0, 1])
def test_nan_is_never_hidden(row: Primitive, place: int) -> None:
    """One NaN shows at least where it stands, also under nan**0, 1**nan, max, masked divisors and scaling."""
    arguments = [torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([[0.0, 1.0, 2.0]])][: row.arity]
    for column in range(3):
        poisoned = [value.clone() for value in arguments]
        poisoned[place % row.arity][0, column] = float("nan")
        assert row.torch(*poisoned).expand(1, 3)[0, column].isnan()


def test_guards_select_as_they_say() -> None:
    """The divisor and the power with masks in place of arithmetic, to the last bit, at and around every limit."""
    limits = [TINY, torch.nextafter(torch.tensor(TINY), torch.tensor(0.0)).item(), 0.0, 1e-45, 0.5, 1, 2, 3, 3e38]
    values = torch.tensor([*limits, *(-limit for limit in limits), torch.inf, -torch.inf, torch.nan])
    a, b = values[:, None], values[None]
    divisor = b.masked_fill(b.abs() < TINY, TINY)
    size = a.abs().where(b >= 0, a.abs().clamp(min=TINY)).pow(b)
    power = (-size).where((a < 0) & (b % 2 == 1), size).masked_fill(a.isnan() | b.isnan(), torch.nan)
    for name, expected in (("div", a / divisor), ("pow", power)):
        found = PRIMITIVES[name].torch(a, b)
        assert ((found.view(torch.int32) == expected.view(torch.int32)) | (found.isnan() & expected.isnan())).all()
    found = PRIMITIVES["inv"].torch(b).view(torch.int32)
    assert (found == (1 / divisor).view(torch.int32))[~b.isnan()].all()


@pytest.mark.parametrize("row", [row for row in PRIMITIVES.values() if row.scalar], ids=lambda row: row.name)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_scalar_column_equals_torch_column(row: Primitive, data: st.DataObject) -> None:
    number = st.one_of(st.floats(-50, 50), st.sampled_from([0.0, 1.0, -1.0, 2.0, -3.0, 1e-31, -1e-31, 100.0]))
    values = [data.draw(number) for _ in range(row.arity)]
    result = row.torch(*[torch.tensor([[value]], dtype=torch.float64) for value in values])
    assert row.scalar is not None
    try:
        expected = row.scalar(*values)
    except OverflowError:
        expected = math.copysign(math.inf, float(result))
    torch.testing.assert_close(float(result), float(expected), rtol=1e-12, atol=1e-300)


@pytest.mark.parametrize("row", [row for row in PRIMITIVES.values() if any(row.monotonicity)], ids=lambda row: row.name)
def test_monotonicity_column_is_true(row: Primitive) -> None:
    """Each argument with a known direction is moved over a grid, the other fixed; scaling is moved as a whole."""
    low = 0.0 if row.monotone_where == "nonnegative" else -3.0
    grid = torch.linspace(low, 3.0, 25, dtype=torch.float64)[None]
    for place, direction in enumerate(row.monotonicity):
        for other in [value for value in (-2.0, -1.0, 0.0, 0.5, 1.0, 2.0) if value >= low]:
            arguments = [torch.full_like(grid, other) for _ in range(row.arity)]
            arguments[place] = grid
            steps = row.torch(*arguments).diff()
            assert direction is None or (steps * (1 if direction == "increasing" else -1) >= 0).all()


# Protected semantics, by hand


@pytest.mark.parametrize(
    ("formula", "expected"),
    [
        ("W", W.tolist()),
        ("sqrt(W)", W.abs().sqrt().tolist()),
        ("W/0", (W / TINY).tolist()),
        ("log(W*0)+0*W", [[math.log(TINY)] * 4] * 2),
        (
            "exp(0*W+1000)",
            [[math.exp(EXP_LIMIT)] * 4] * 2,
        ),
        ("inv(W*0)", [[1e30] * 4] * 2),
        ("W**2", (W * W).tolist()),
        ("W**3", (W**3).tolist()),
        ("W**0", [[1.0] * 4] * 2),
        ("W**0.5", W.abs().sqrt().tolist()),
        ("(W*0)**-1", [[1e30] * 4] * 2),
        ("(-2)**W", [[-2.0, 0.25, -8.0, 0.0625], [1.0, -32.0, 1 / 64, -128.0]]),
        ("mms(W)", [[7 / 13, 4 / 13, 9 / 13, 2 / 13], [6 / 13, 11 / 13, 0.0, 1.0]]),
        ("mms(W*0+3)", [[0.0] * 4] * 2),
        ("zsn(W*0+0.1)", [[0.0] * 4] * 2),
        ("rowsum(W)", [[-2.0] * 4, [6.0] * 4]),
        ("colsum(W)", [[1.0, 3.0, -3.0, 3.0]] * 2),
        ("rownorm(W)", [[math.sqrt(30)] * 4, [math.sqrt(110)] * 4]),
        ("colnorm(W)", [[1.0, math.sqrt(29), math.sqrt(45), math.sqrt(65)]] * 2),
        ("rowsum(X)+0*W", [[10.0] * 4] * 2),
        ("colsum(X)+0*W", [[2.0, 4.0, 6.0, 8.0]] * 2),
        ("rowsum(1)+0*W", [[4.0] * 4] * 2),
        ("colsum(rowsum(W))", [[4.0] * 4] * 2),
        ("rowsum(rowsum(W))", [[-8.0] * 4, [24.0] * 4]),
        ("max(W,X)", [[1.0, 2.0, 3.0, 4.0], [1.0, 5.0, 3.0, 7.0]]),
        ("min(W,X)", [[1.0, -2.0, 3.0, -4.0], [0.0, 2.0, -6.0, 4.0]]),
        ("abs(W)*X", [[1.0, 4.0, 9.0, 16.0], [0.0, 10.0, 18.0, 28.0]]),
    ],
)
def test_worked_2x4_matrix(formula: str, expected: list[list[float]]) -> None:
    expression = parse(formula) if "W" in formula else Expression(parse(f"W+{formula}").tokens[2:])
    torch.testing.assert_close(evaluate(expression, {"W": W, "X": X}), torch.tensor(expected), rtol=1e-5, atol=0)


def test_zsn_equals_its_definition_also_where_squares_vanish() -> None:
    """(x - mean) / population deviation, for values near 1e-28 whose squares are 0 in fp32."""
    value = torch.randn(6, 42, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = (value - value.mean()) / value.std(correction=0)
    score = evaluate(parse("zsn(W)"), {"W": (value * 1e-28).float()})
    torch.testing.assert_close(score.double(), expected, rtol=1e-4, atol=1e-5)  # fp32 statistics


def _brute(
    tokens: tuple[str | float, ...], cell: Callable[[str, int, int], float], shape: tuple[int, int]
) -> list[list[float]]:
    """Every value a nested list of Python floats, reductions as loops: independent of torch and of storage."""
    out, columns = shape
    stack: list[list[list[float]]] = []
    for token in reversed(tokens):
        parts = [stack.pop() for _ in range(arity(token))]
        if isinstance(token, float):
            value = [[token] * columns for _ in range(out)]
        elif token in OPERANDS:
            value = [[cell(token, i, j) for j in range(columns)] for i in range(out)]
        elif token == "rowsum":
            value = [[math.fsum(row)] * columns for row in parts[0]]
        elif token == "colsum":
            value = [[math.fsum(row[j] for row in parts[0]) for j in range(columns)] for _ in range(out)]
        elif token == "rownorm":
            value = [[math.hypot(*row)] * columns for row in parts[0]]
        elif token == "colnorm":
            value = [[math.hypot(*(row[j] for row in parts[0])) for j in range(columns)] for _ in range(out)]
        elif token in ("mms", "zsn"):
            flat = [x for row in parts[0] for x in row]
            mean, low, span = math.fsum(flat) / len(flat), min(flat), max(flat) - min(flat)
            deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in flat) / len(flat))
            shift, scale = (low, span) if token == "mms" else (mean, deviation)
            assume(span == 0 or span > 1e-3 * max(abs(x) for x in flat))
            value = [[(x - shift) / scale if span else 0.0 for x in row] for row in parts[0]]
        else:
            scalar = PRIMITIVES[token].scalar
            assert scalar is not None
            value = [[scalar(*(part[i][j] for part in parts)) for j in range(columns)] for i in range(out)]
        assume(all(abs(x) < 1e5 and (x == 0 or abs(x) > 1e-5) for row in value for x in row))
        stack.append(value)
    return stack[0]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(0, 2**20))
def test_evaluate_equals_brute_force_on_floats(seed: int) -> None:
    """Well-conditioned random trees: the tolerance is fp32 rounding amplified by sums and products."""
    generator = torch.Generator().manual_seed(seed)
    names = [name for name in PRIMITIVES if name not in ("sub", "neg", "zsn", "pow", "exp", "log")]  # no cancellation
    tokens: list[str | float] = []
    missing = 1
    while missing:
        pool: list[str | float] = [*OPERANDS, 2.0] if len(tokens) + missing > 9 else [*names, *OPERANDS]
        tokens.append(pool[int(torch.randint(len(pool), (), generator=generator))])
        missing += arity(tokens[-1]) - 1
    shape = (3, 5)
    operands = {
        name: torch.rand(shape if row.axes == "out,in" else shape[1:], generator=generator) + 0.5
        for name, row in OPERANDS.items()
    }
    expected = _brute(
        tuple(tokens),
        lambda name, i, j: float(operands[name][i, j] if operands[name].dim() == 2 else operands[name][j]),
        shape,
    )
    score = evaluate(Expression(tuple(tokens)), operands)
    torch.testing.assert_close(score, torch.tensor(expected), rtol=2e-3, atol=1e-3)


def test_result_is_fp32_contiguous_and_owns_its_memory() -> None:
    for formula in ("W", "abs(W)*X", "W*0+X", "rowsum(W)"):
        for weight in (W, W.bfloat16(), W.double(), W.t().contiguous().t(), torch.nn.Parameter(W)):
            score = evaluate(parse(formula), {"W": weight, "X": X.half()})
            assert score.dtype == torch.float32
            assert score.shape == (2, 4)
            assert score.is_contiguous()
            assert not score.requires_grad
            assert score.data_ptr() != weight.data_ptr()


def test_missing_or_misshapen_operand() -> None:
    with pytest.raises(ExpressionError, match=r"W\*G needs operand G; available: W X"):
        evaluate(parse("W*G"), {"W": W, "X": X})
    with pytest.raises(ExpressionError, match="needs operand W; available: none"):
        evaluate(parse("W"), {})
    with pytest.raises(ExpressionError, match=r"operand X must have shape \[4\] to go with W, but got \[3\]"):
        evaluate(parse("W*X"), {"W": W, "X": X[:3]})
    with pytest.raises(ExpressionError, match=r"W must be \[out, in\], but got shape \[4\]"):
        evaluate(parse("W*X"), {"W": X, "X": X})


# Trees


def test_tree_of_a_worked_expression() -> None:
    expression = parse("abs(W)*(X+0.5)")
    assert expression.tokens == ("mul", "abs", "W", "add", "X", 0.5)
    assert (len(expression), expression.depth, expression.operands, expression.constants) == (6, 3, ("W", "X"), (0.5,))
    assert expression.children(0) == (1, 3)
    assert expression.subtree(3) == slice(3, 6)
    assert {expression: 1}[Expression(("mul", "abs", "W", "add", "X", 0.5))] == 1
    assert parse("D*G*W*X*H").operands == ("W", "X", "G", "H", "D")
    assert parse("W").depth == 1


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ((), "1 more"),
        (("add", "W"), "1 more"),
        (("W", "X"), "go on after"),
        (("foo", "W"), "unknown token 'foo'"),
        (("add", "W", float("nan")), "but got nan"),
        (("add", "W", math.inf), "but got inf"),
        (("add", "W", 1e30), "below 1e[+]30"),
        (("add", "W", 10**5000), "but got a long integer"),
        (("add", "W", True), "name or a number"),
        (("add", "W", None), "name or a number"),
    ],
)
def test_invalid_tokens(tokens: tuple[str | float, ...], message: str) -> None:
    with pytest.raises(ExpressionError, match=message):
        Expression(tokens)


def test_deep_trees_need_no_recursion() -> None:
    deep = Expression(("neg",) * 20_000 + ("W",))
    assert deep.depth == len(deep) == 20_001
    assert evaluate(deep, {"W": W}).equal(W)
    assert hash(deep) == hash(Expression(deep.tokens))


# Parse and print


@settings(max_examples=600, deadline=None, derandomize=True)
@given(trees())
def test_parse_of_print_is_the_same_tree(expression: Expression) -> None:
    tokens = ("add", *expression.tokens, "W")
    try:
        read = parse(str(Expression(tokens)))
    except ExpressionError as error:
        assume("is not finite" not in str(error))  # a constant part beyond the cap
        raise
    assert read.tokens == tokens


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("-W**2", ("neg", "pow", "W", 2.0)),
        ("W**-2", ("pow", "W", -2.0)),
        ("W**-X**2", ("pow", "W", "neg", "pow", "X", 2.0)),
        ("W**X**2", ("pow", "W", "pow", "X", 2.0)),
        ("(W**X)**2", ("pow", "pow", "W", "X", 2.0)),
        ("-2*W", ("mul", -2.0, "W")),
        ("-2**W", ("neg", "pow", 2.0, "W")),
        ("(-2)**W", ("pow", -2.0, "W")),
        ("-W*X", ("mul", "neg", "W", "X")),
        ("-(W*X)", ("neg", "mul", "W", "X")),
        ("neg(2)*W", ("mul", "neg", 2.0, "W")),
        ("W-X-G", ("sub", "sub", "W", "X", "G")),
        ("W-(X-G)", ("sub", "W", "sub", "X", "G")),
        ("W/X/G", ("div", "div", "W", "X", "G")),
        ("W/(X*G)", ("div", "W", "mul", "X", "G")),
        ("W+X*G", ("add", "W", "mul", "X", "G")),
        ("(W+X)*G", ("mul", "add", "W", "X", "G")),
        ("W*1e-07", ("mul", "W", 1e-7)),
        ("W*2", ("mul", "W", 2.0)),
        ("max(W,-X)", ("max", "W", "neg", "X")),
    ],
)
def test_structure_and_minimal_print(text: str, tokens: tuple[str | float, ...]) -> None:
    assert parse(text).tokens == tokens
    assert str(Expression(tokens)) == text


@pytest.mark.parametrize(
    ("text", "same"),
    [
        (" ( abs( W )\t* X ) ", "abs(W)*X"),
        ("pow(add(W,X),2)", "(W+X)**2"),
        ("W*2.50e0", "W*2.5"),
        ("W*.5", "W*0.5"),
        ("W--2", "W-(-2)"),
        ("--W", "-(-W)"),
        ("((((W))))", "W"),
        # as pasted
        ("W\r\n", "W"),
        ("|W|*||X||_2", "abs(W)*X"),
        ("|W| * ‖X‖", "abs(W)*X"),
        (r"\left|W\right| \cdot X", "abs(W)*X"),
        (r"$\lvert \mathbf{W} \rvert \cdot \lVert X \rVert_{2}$", "abs(W)*X"),
        (r"\frac{|W|}{D} \times \sqrt{X}", "abs(W)/D*sqrt(X)"),
        (r"W^{2} \odot H", "W**2*H"),
        ("torch.abs(W)*X", "abs(W)*X"),
        ("np.sqrt(np.abs(W))", "sqrt(abs(W))"),
        ("W²·X", "W**2*X"),
        ("|W|*√X", "abs(W)*sqrt(X)"),
        ("W*√(X+G)", "W*sqrt(X+G)"),
        ("|W|−|G*W|", "abs(W)-abs(G*W)"),
    ],
)
def test_other_spellings(text: str, same: str) -> None:
    assert str(parse(text)) == same


@pytest.mark.parametrize(
    "text",
    [
        "W-W",
        "W/0",
        "log(-1)*W",
        "exp(exp(exp(W)))",
        "sqrt(neg(W))",
        "W*H*X*D*G",
        "(abs(W)/rowsum(abs(W))+abs(W)/colsum(abs(W)))*sqrt(X)",
    ],
)
def test_accepted(text: str) -> None:
    """Bad inputs 14, 15 and 20: odd, but each has a value for every weight."""
    score = evaluate(parse(text), {"W": W, "X": X, "G": W.abs(), "H": W * W, "D": X})
    assert score.shape == W.shape


BAD = [
    # 1, 2, 3, 4: empty, long, deep, wide
    ("", "the formula is empty"),
    (" \t ", "the formula is empty"),
    ("W*" * 50_000 + "W", "100001 characters, at most 65536"),
    ("abs(" * 10_000 + "W" + ")" * 10_000, "more than 512 nodes"),
    ("abs(" * 64 + "W" + ")" * 64, "65 levels deep, at most 64"),
    ("+".join(["W"] * 100_000), "characters, at most"),
    ("+".join(["W"] * 1000), "more than 512 nodes"),
    ("(" * 30_000 + "W", "never closed"),
    # 5, 6, 7, 8: code
    ("__import__('os').system('x')", 'unexpected character "\'" at column 12'),
    ("W.__class__", "unexpected character '.' at column 2"),
    ("().__class__", "unexpected character '.' at column 3"),
    ("lambda x: W", "unexpected character ':' at column 9"),
    ("[x for x in W]", "unexpected character '[' at column 1"),
    ("(W:=3)", "unexpected character ':' at column 3"),
    ("f'{W}'", "unexpected character"),
    ("W if X else G", "expected an operator, but got 'if' at column 3"),
    # 9, 10, 11: names and arity
    ("foo(W)", "unknown name 'foo' at column 1"),
    ("W*sqroot(X)", "unknown name 'sqroot' at column 3 of 'W*sqroot(X)'; did you mean sqrt?"),
    ("w*X", "unknown name 'w' at column 1 of 'w*X'; did you mean W? operands: W X G H D F R; functions: neg abs"),
    ("Q*W", "unknown name 'Q'"),
    ("abs(W,X)", "abs takes 1 argument, but got 2, at column 1"),
    ("W+max(W)", "max takes 2 arguments, but got 1, at column 3"),
    ("abs()", "abs takes 1 argument, but got 0"),
    ("max(W,)", "expected a value, but got ')' at column 7"),
    ("abs W", "abs needs its arguments in parentheses, abs(x), found at column 1"),
    ("W(X)", "W is an operand and cannot be called"),
    # 12, 13: no weight
    ("1", "must use the weight W"),
    ("X*2", "must use the weight W"),
    # 16, 18: numbers
    ("W*1e999", "the constant 1e999 is not below 1e+30 at column 3"),
    ("W*nan", "unknown name 'nan' at column 3"),
    ("W*inf", "unknown name 'inf' at column 3"),
    ("W*0x10", "malformed number '0x' at column 3"),
    ("W*1_000", "malformed number '1_' at column 3"),
    ("W*1.2.3", "malformed number"),
    ("2W", "malformed number '2W' at column 1"),
    ("W*" + "9" * 5000, "a number of 5000 characters at column 3"),
    ("W*9**9**9", "the constant '9**9**9' is not finite and below 1e+30 at column 3"),
    ("exp(100)*W", "the constant 'exp(100)'"),
    ("W*(2/0)", "the constant '2/0'"),
    # 17: characters
    ("\uff37*X", "unexpected character '\\uff37' at column 1"),
    ("W\u200b*X", "unexpected character '\\u200b' at column 2"),
    ("\u202eW", "unexpected character '\\u202e' at column 1"),
    ("\ufeffW", "unexpected character '\\ufeff' at column 1"),
    ("W\0", "unexpected character '\\x00' at column 2"),
    ("W\r\nX", "unexpected character '\\r' at column 2"),
    ("W*\ud800", "unexpected character '\\ud800' at column 3"),
    # 19: balance and junk
    ("(W", "'(' is never closed, opened at column 1"),
    ("abs(W", "'(' is never closed"),
    ("W)", "')' without '(' at column 2"),
    ("W;X", "unexpected character ';' at column 2"),
    ("W X", "expected an operator, but got 'X' at column 3"),
    ("W*/X", "expected a value, but got '/' at column 3"),
    ("W+", "the formula ends where a value is expected, at column 3"),
    ("max(W,(X,G))", "a comma outside the arguments of a function at column 9"),
    ("W^2", "a power is written **"),
    ("|W*|G||", "a size is written abs(W), a norm rownorm(W) or colnorm(W)"),
    ("||W||_2*X", "a norm rownorm(W) or colnorm(W)"),
    (r"\sum W", "of LaTeX, "),
    ("W*norm(X)", "did you mean rownorm?"),
    ("W*square(X)", "did you mean sqr?"),
    # 22: markup
    ("[/red]", "unexpected character '['"),
    ("<script>", "unexpected character '<'"),
    ("=cmd()", "unexpected character '='"),
]


@pytest.mark.parametrize(("text", "message"), BAD, ids=range(len(BAD)))
def test_bad_formula(text: str, message: str) -> None:
    with pytest.raises(ExpressionError) as caught:
        parse(text)
    said = str(caught.value)
    assert message in said
    assert said.isascii()
    assert said.isprintable()
    assert len(said) < 330


def test_not_text() -> None:
    with pytest.raises(ExpressionError, match="must be text, but got NoneType"):
        parse(None)  # type: ignore[arg-type]


def test_caps_are_reached_exactly() -> None:
    assert parse("abs(" * (MAX_DEPTH - 1) + "W" + ")" * (MAX_DEPTH - 1)).depth == MAX_DEPTH
    wide = "W"
    while 2 * len(parse(wide)) + 1 <= MAX_NODES:
        wide = f"({wide}+{wide})"
    assert len(parse(f"-({wide})" if MAX_NODES % 2 == 0 else wide)) <= MAX_NODES


def test_a_bad_formula_loads_nothing_heavy() -> None:
    """Bad input costs milliseconds: neither torch nor sympy is imported before a formula is refused."""
    code = (
        "import sys; from gpmetric.expression import parse\n"
        "from gpmetric.errors import ExpressionError\n"
        "try: parse('foo(W)')\n"
        "except ExpressionError: print(sorted({'torch', 'sympy', 'numpy'} & set(sys.modules)))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": ":".join(sys.path)}
    )
    assert run.stdout.strip() == "[]"
