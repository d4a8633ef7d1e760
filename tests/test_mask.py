"""Masks against a brute force: Python's stable sort over (score, position), one comparison group at a time.

`lane_cpu.py` compares larger ones with torch's.
"""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gpmetric.errors import MaskError
from gpmetric.pruning.mask import select_mask
from gpmetric.targets import parse_target

WIDTHS = [1, 2, 3, 6, 7, 8, 9, 16, 42, 63, 64, 65, 123, 128, 129, 200, 256, 300]
SPARSITIES = ["0", "0.1", "0.33", "0.5", "0.7", "0.99"]
GROUPS = ["", "row:", "layer:", "block:"]
PATTERNS = ["2:4", "4:8", "1:4", "3:4", "1:2", "8:16", "2:3", "5:7", "1:80"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SUBNORMAL = 1e-40


def brute_force(score: Tensor, text: str) -> Tensor:
    """Removes, of each group, the first k positions in the order of (score, position)."""
    rows, columns = score.shape
    values = score.double().tolist()
    positions = [[(row, column) for column in range(columns)] for row in range(rows)]
    text = text.removeprefix("row:")
    if ":" in text and not text.startswith(("layer:", "block:")):
        keep, group = map(int, text.split(":"))
        groups = [line[start : start + group] for line in positions for start in range(0, columns, group)]
        count = group - keep
    elif text.startswith("layer:"):
        groups = [[place for line in positions for place in line]]
        count = int(rows * columns * float(text.removeprefix("layer:")))
    elif text.startswith("block:"):
        kept = [brute_force(score[:, at : at + 128], text.replace("block", "layer")) for at in range(0, columns, 128)]
        return torch.cat(kept, dim=1)
    else:
        groups, count = positions, int(columns * float(text))
    kept = torch.ones(rows, columns, dtype=torch.bool)
    for group_positions in groups:
        for row, column in sorted(group_positions, key=lambda place: values[place[0]][place[1]])[:count]:
            kept[row, column] = False
    return kept


def scores(kind: str, rows: int, columns: int, generator: torch.Generator) -> Tensor:
    normal = torch.randn(rows, columns, generator=generator)
    if kind == "ties":
        return (2 * normal).round()
    if kind == "equal":
        return torch.full((rows, columns), 0.25)
    if kind == "zeros":
        return normal.abs() * (torch.rand(rows, columns, generator=generator) > 0.6)
    if kind == "signed zeros":
        return torch.zeros(rows, columns).copysign(normal)
    if kind == "negative":
        return -normal.abs() - 1
    if kind == "subnormal":
        return normal.abs() * SUBNORMAL
    if kind == "huge":  # finite scores whose sum is not
        return normal.sign() * 3e38
    return normal


KINDS = ["normal", "ties", "equal", "zeros", "signed zeros", "negative", "subnormal", "huge"]


@pytest.mark.every(3)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", [group + sparsity for group in GROUPS for sparsity in SPARSITIES])
def test_rows_layers_and_blocks_are_the_brute_force(text: str, kind: str) -> None:
    generator = torch.Generator().manual_seed(7)
    for index, columns in enumerate(WIDTHS):
        score = scores(kind, 4, columns, generator)
        if kind != "huge":  # fp16 has no such numbers
            score = score.to(DTYPES[index % len(DTYPES)])
        assert torch.equal(select_mask(score, parse_target(text)), brute_force(score, text)), columns


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", PATTERNS)
def test_patterns_are_the_brute_force(text: str, kind: str) -> None:
    generator = torch.Generator().manual_seed(8)
    group = int(text.split(":")[1])
    for groups in (1, 2, 5):
        score = scores(kind, 4, groups * group, generator)
        for dtype in DTYPES if kind != "huge" else [torch.float32]:
            got = select_mask(score.to(dtype), parse_target(text))
            assert torch.equal(got, brute_force(score.to(dtype), text)), (groups, dtype)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 5),
    columns=st.one_of(st.integers(1, 90), st.integers(120, 300)),
    sparsity=st.floats(0, 1, exclude_max=True),
    group=st.sampled_from(GROUPS),
    seed=st.integers(0, 2**32),
)
def test_any_shape_and_sparsity_is_the_brute_force(
    rows: int, columns: int, sparsity: float, group: str, seed: int
) -> None:
    generator = random.Random(seed)
    values = [-1.0, -0.0, 0.0, SUBNORMAL, 0.5, 1.0, generator.random(), generator.random()]
    score = torch.tensor([[generator.choice(values) for _ in range(columns)] for _ in range(rows)])
    text = f"{group}{sparsity!r}"
    assert torch.equal(select_mask(score, parse_target(text)), brute_force(score, text))


@pytest.mark.parametrize("kind", KINDS)
def test_every_group_removes_exactly_k(kind: str) -> None:
    """k = int(group_size * sparsity), counted."""
    generator = torch.Generator().manual_seed(9)
    for columns in WIDTHS:
        score = scores(kind, 6, columns, generator)
        for sparsity in map(float, SPARSITIES):
            by_row = ~select_mask(score, parse_target(repr(sparsity)))
            assert set(by_row.sum(dim=1).tolist()) == {int(columns * sparsity)}
            in_all = ~select_mask(score, parse_target(f"layer:{sparsity!r}"))
            assert int(in_all.sum()) == int(6 * columns * sparsity)
            for block in (~select_mask(score, parse_target(f"block:{sparsity!r}"))).split(128, dim=1):
                assert int(block.sum()) == int(block.numel() * sparsity)


def test_two_by_four_by_hand() -> None:
    score = torch.tensor([[4.0, 1.0, 3.0, 2.0], [1.0, 1.0, 1.0, 0.0]])
    T, F = True, False
    by_hand = {
        "0.5": [[T, F, T, F], [F, T, T, F]],  # second row: 0, then the leftmost 1
        "0.25": [[T, F, T, T], [T, T, T, F]],
        "0.74": [[T, F, T, F], [F, T, T, F]],  # int(4 * 0.74) = 2
        "2:4": [[T, F, T, F], [F, T, T, F]],
        "3:4": [[T, F, T, T], [T, T, T, F]],
        "1:4": [[T, F, F, F], [F, F, T, F]],
        "1:2": [[T, F, T, F], [F, T, T, F]],
        "row:0.5": [[T, F, T, F], [F, T, T, F]],
        "layer:0.5": [[T, F, T, T], [F, F, T, F]],  # 0, then the first three of the four 1s in row-major order
        "layer:0.25": [[T, F, T, T], [T, T, T, F]],
        "block:0.5": [[T, F, T, T], [F, F, T, F]],  # a matrix of one block
        "0": [[T, T, T, T], [T, T, T, T]],
    }
    for text, expected in by_hand.items():
        assert select_mask(score, parse_target(text)).tolist() == expected, text


def test_of_equal_scores_the_lower_column_goes_first() -> None:
    score = torch.zeros(3, 100)
    assert select_mask(score, parse_target("0.3")).int().tolist() == [[0] * 30 + [1] * 70] * 3
    row_major = select_mask(score, parse_target("layer:0.5")).flatten().int().tolist()
    assert row_major == [0] * 150 + [1] * 150
    blocks = select_mask(torch.zeros(2, 130), parse_target("block:0.25"))  # 64 of 2 x 128, then 1 of 2 x 2
    assert blocks.int().tolist() == [[0] * 64 + [1] * 64 + [0, 1], [1] * 130]


def test_positive_rescaling_leaves_the_mask_unchanged() -> None:
    score = torch.randn(8, 96, generator=torch.Generator().manual_seed(1))
    for text in ("0.5", "layer:0.7", "block:0.7", "2:4"):
        assert torch.equal(select_mask(score, parse_target(text)), select_mask(score * 8, parse_target(text)))


@pytest.mark.parametrize("text", ["0", "0.5", "layer:0.5", "block:0.5", "2:4"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_is_refused(text: str, bad: float) -> None:
    score = torch.ones(3, 16)
    score[1, 5] = bad
    with pytest.raises(MaskError, match=r"^1 of 48 scores are NaN or infinite$"):
        select_mask(score, parse_target(text))


@pytest.mark.parametrize(("text", "columns"), [("2:4", 6), ("4:8", 4), ("7:11", 48), ("1:9999", 200)])
def test_a_remainder_is_refused(text: str, columns: int) -> None:
    """The published codes prune all of it."""
    with pytest.raises(MaskError, match=f"^in = {columns} is not divisible by {text.split(':')[1]} "):
        select_mask(torch.ones(2, columns), parse_target(text))


@pytest.mark.parametrize("text", ["0.5", "layer:0.5", "block:0.5", "2:4", "3:12"])
def test_strides_do_not_matter(text: str) -> None:
    """Transposed (Conv1D), sliced, expanded and tracked scores, as their plain copies."""
    base = torch.randn(24, 48, generator=torch.Generator().manual_seed(2))
    for score in (base[:, :24].t(), base[:, ::2], base[::3, 12:36], base[:1].expand(6, 48), base.requires_grad_()):
        plain = score.detach().clone(memory_format=torch.contiguous_format)
        got = select_mask(score, parse_target(text))
        assert torch.equal(got, brute_force(plain, text))
        assert (got.dtype, got.requires_grad) == (torch.bool, False)


def test_doubles_are_not_rounded() -> None:
    """Scores that fp32 cannot tell apart are still ordered."""
    score = 1 + torch.arange(80, 0, -1, dtype=torch.float64)[None] * 1e-12
    assert select_mask(score, parse_target("0.5"))[0].int().tolist() == [1] * 40 + [0] * 40


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0, 0)])
@pytest.mark.parametrize("text", ["0.5", "layer:0.5", "block:0.5", "2:4"])
def test_empty_matrices(shape: tuple[int, int], text: str) -> None:
    assert select_mask(torch.empty(shape), parse_target(text)).shape == shape


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["0.5", "layer:0.7", "block:0.7", "2:4", "3:12"])
def test_cuda_is_the_cpu(text: str, kind: str) -> None:
    score = scores(kind, 6, 240, torch.Generator().manual_seed(4))
    got = select_mask(score.cuda(), parse_target(text))
    assert got.is_cuda
    assert torch.equal(got.cpu(), select_mask(score, parse_target(text)))
