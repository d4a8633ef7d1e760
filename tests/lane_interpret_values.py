"""What kernels compute before they choose: primitives, sums and extremes, in the interpreter against torch.

`test_kernels.py` runs this file in one process with `lane_interpret.py`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from gpmetric.codegen.loading import load_functions
from gpmetric.expression import PRIMITIVES, parse
from gpmetric.expression.evaluate import evaluate
from gpmetric.kernels.launch import Operands, scored
from gpmetric.kernels.reduce import column_sums, extremes, moments, prepare, row_sums

pytestmark = [pytest.mark.interpret, pytest.mark.filterwarnings("ignore::RuntimeWarning")]

ELEMENTWISE = [name for name, row in PRIMITIVES.items() if not row.reduces]
REDUCING = [name for name, row in PRIMITIVES.items() if row.reduces]
INEXACT = ("exp", "log", "tanh", "pow")  # others are bit-equal
GUARD = 1e-30  # least size of a divisor
EDGES = [0.0, 1e-44, 1e-38, 0.1, 0.19999, 0.2, 0.5, 1.0, 2.0, 3.0, 79.9, 80.0, 81.0, 1e25, 3e38, torch.inf]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Below and above one block: 1024 columns of a row; 64 rows, beyond which a column is summed in parts of several.
SHAPES = [(1, 1), (1, 5), (5, 1), (3, 7), (2, 1024), (2, 1025), (1, 2100), (64, 3), (130, 257)]


@triton.jit
def _store_scores(W, OUT, matrices, columns, rows, numbers, n_in, SCORE: tl.constexpr, BLOCK: tl.constexpr):
    row, column = tl.program_id(0), tl.arange(0, BLOCK)
    inside = column < n_in
    _, score = scored(W, matrices, columns, rows, numbers, 0, row, column, n_in, inside, SCORE)
    tl.store(OUT + row * n_in + column, score, mask=inside)


def values_of(formula: str, operands: dict[str, Tensor], folder: Path) -> Tensor:
    """[out, in]: the scores that a kernel sees."""
    W, functions = operands["W"], load_functions([parse(formula)], folder)
    prepared, got = prepare(W, operands, functions.LAYOUT), torch.empty(W.shape)
    block = triton.next_power_of_2(W.shape[1])
    _store_scores[(len(W),)](W, got, *prepared[:4], W.shape[1], SCORE=functions.score, BLOCK=block)
    return got


def drawn(shape: tuple[int, int], integers: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(shape[0])
    operands = {name: torch.randn(shape, generator=generator) for name in "WG"}
    operands["X"] = torch.randn(shape[1], generator=generator)
    return {name: one.round() for name, one in operands.items()} if integers else operands


@pytest.fixture(scope="module")
def part(tmp_path_factory: pytest.TempPathFactory) -> triton.JITFunction:
    """W*G + X, which some reduction goes over."""
    return load_functions([parse("rowsum(W*G + X)")], tmp_path_factory.mktemp("kernels")).part


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_primitives_at_the_edges_of_their_ranges(name: str, tmp_path: Path) -> None:
    """Of all pairs of zeros, subnormals, guards, large numbers, infinities and NaN."""
    guard = torch.tensor([GUARD])
    sizes = torch.cat([torch.tensor(EDGES), guard, guard.nextafter(0 * guard), guard.nextafter(2 * guard)])
    values = torch.cat([sizes, -sizes, torch.tensor([torch.nan])])
    W, G = (one.contiguous() for one in torch.meshgrid(values, values, indexing="ij"))
    row = PRIMITIVES[name]
    got = values_of(f"{name}(W, G)" if row.arity == 2 else f"{name}(W)", {"W": W, "G": G}, tmp_path)
    expected = row.torch(*(W, G)[: row.arity])
    if name == "sqrt":  # torch's own is an ulp off at a fifth of all numbers on some CPUs
        expected = row.torch(W.double()).float()
    tolerance = {"rtol": 1e-5, "atol": 1e-38} if name in INEXACT else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(got, expected, equal_nan=True, **tolerance)


@pytest.mark.parametrize("shape", SHAPES)
def test_sums_and_extremes_of_integers_are_exact(shape: tuple[int, int], part: triton.JITFunction) -> None:
    W, G, X = drawn(shape, integers=True).values()
    operands, values = Operands((G,), (X,)), W * G + X
    assert torch.equal(row_sums(W, part, operands), values.sum(dim=1))
    assert torch.equal(column_sums(W, part, operands), values.sum(dim=0))
    low, high = extremes(W, part, operands)
    assert (low.shape, low.item()) == ((1,), values.min())
    assert (high.shape, high.item()) == ((1,), values.max())


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != (1, 1)])
def test_moments(shape: tuple[int, int], part: triton.JITFunction) -> None:
    """Against fp64, of weights and matrices whose dtypes take turns."""
    W, G, X = drawn(shape).values()
    W, G = W.to(DTYPES[shape[1] % 3]), G.to(DTYPES[shape[0] % 3])
    values = W.double() * G.double() + X.double()
    mean = values.mean()
    reach = (values - mean).abs().max()
    spread = values.std(correction=0) / reach
    got = moments(W, part, Operands((G,), (X,)))
    assert all(one.shape == (1,) and one.dtype == torch.float32 for one in got)
    expected = torch.stack([values.min(), values.max(), mean, reach, spread]).float()
    torch.testing.assert_close(torch.cat(got), expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("bad", [torch.nan, -torch.inf])
@pytest.mark.parametrize(
    ("shape", "place"), [((3, 9), (0, 0)), ((3, 1030), (1, 1023)), ((3, 1030), (2, 1029)), ((65, 3), (64, 1))]
)
def test_a_value_that_is_not_finite_stays_where_it_is(
    shape: tuple[int, int], place: tuple[int, int], bad: float, part: triton.JITFunction
) -> None:
    W, G, X = drawn(shape, integers=True).values()
    operands = Operands((G,), (X,))
    G[place] = bad
    W[place] = 1
    values = W * G + X
    by_row, by_column = row_sums(W, part, operands), column_sums(W, part, operands)
    torch.testing.assert_close(by_row, values.sum(dim=1), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(by_column, values.sum(dim=0), rtol=0, atol=0, equal_nan=True)
    assert [int((~sums.isfinite()).sum()) for sums in (by_row, by_column)] == [1, 1]
    expected = torch.stack([values.amin(), values.amax()])
    torch.testing.assert_close(torch.cat(extremes(W, part, operands)), expected, rtol=0, atol=0, equal_nan=True)
    assert moments(W, part, operands)[4].isnan()


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1), (3, 7), (2, 1030), (20, 40)])
@pytest.mark.parametrize("formula", [*(f"{name}(W*G)" for name in REDUCING), "zsn(X)*W", "mms(rowsum(W)+G)"])
def test_reductions_in_scores(formula: str, shape: tuple[int, int], tmp_path: Path) -> None:
    operands = drawn(shape)
    expected = evaluate(parse(formula), operands).expand(shape)
    # Sums of a thousand numbers of either sign, in another order.
    torch.testing.assert_close(values_of(formula, operands, tmp_path), expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("formula", ["colsum(rownorm(W)*G)", "rowsum(colnorm(W)*X)", "zsn(mms(W)*rowsum(G))*colsum(X)"])
def test_reductions_of_reductions(formula: str, tmp_path: Path) -> None:
    operands = drawn((9, 33))
    expected = evaluate(parse(formula), operands).expand(9, 33)
    torch.testing.assert_close(values_of(formula, operands, tmp_path), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("formula", ["mms(W)", "zsn(W)", "zsn(W*0)", "mms(W)+zsn(X-X)"])
@pytest.mark.parametrize("value", [0.0, 0.1, -3e38])
def test_a_constant_matrix_scales_to_zero(formula: str, value: float, tmp_path: Path) -> None:
    operands = {"W": torch.full((3, 7), value), "X": torch.rand(7)}
    assert torch.equal(values_of(formula, operands, tmp_path), torch.zeros(3, 7))
    assert torch.equal(evaluate(parse(formula), operands).expand(3, 7), torch.zeros(3, 7))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", REDUCING)
def test_reductions_of_what_is_not_finite(name: str, bad: float, tmp_path: Path) -> None:
    """NaN and infinities are where torch has them."""
    operands = drawn((4, 9))
    operands["W"][1, 3] = bad
    got, expected = values_of(f"{name}(W)", operands, tmp_path), evaluate(parse(f"{name}(W)"), operands).expand(4, 9)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("scale", [1e-25, 1e-18, 1e17])
def test_a_z_score_of_small_and_large_values(scale: float, tmp_path: Path) -> None:
    """Squares of these leave the range of fp32, or nearly."""
    operands = drawn((3, 40))
    at_one = values_of("zsn(W)", operands, tmp_path)
    operands["W"] *= scale
    torch.testing.assert_close(values_of("zsn(W)", operands, tmp_path), at_one, rtol=1e-5, atol=1e-6)
