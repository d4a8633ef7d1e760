"""The CPU path of `select_mask` against torch's stable sort; `test_kernels.py` runs this file in a process of its own.

`test_mask.py` compares small masks with Python's sort; here are every k, sizes that torch's sort can afford, and the
ends of every dtype's range. Triton is not needed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gpmetric.errors import MaskError
from gpmetric.pruning.mask import select_mask
from gpmetric.targets import Target

SMALL = [(1, 1), (1, 2), (1, 7), (1, 8), (1, 23), (5, 1), (3, 5), (2, 9)]
LARGE = [(2, 300), (7, 130), (5, 4097), (300, 2)]
GROUPS = [2, 3, 4, 5, 8, 16, 32]
# dtype -> the integers of its width, and those bits that some number well inside its range has
FIRST_BITS = {
    torch.float32: (torch.int32, 0x3F800000),
    torch.float64: (torch.int64, 0x3FF0000000000000),
    torch.bfloat16: (torch.int16, 0x0400),
    torch.float16: (torch.int16, 0x0400),
}
DTYPES = list(FIRST_BITS)
KINDS = ["distinct", "ties", "equal", "zeros", "subnormal", "huge", "negative"]


def stable_sort(score: Tensor, granularity: str, removed: int, group: int = 0) -> Tensor:
    """The `removed` first of each group in torch's stable order are False."""
    shapes = {"row": score.shape, "layer": (1, -1), "n:m": (-1, group)}
    groups = score.contiguous().view(shapes[granularity])  # [groups, size]
    first = torch.sort(groups, dim=1, stable=True).indices[:, :removed]
    return torch.ones(groups.shape, dtype=torch.bool).scatter_(1, first, False).view(score.shape)


def drawn(kind: str, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Scores of a kind."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(shape, generator=generator, dtype=torch.float64)
    size = math.prod(shape)
    info = torch.finfo(dtype)
    if kind == "distinct":  # consecutive numbers of the dtype, shuffled
        integer, first = FIRST_BITS[dtype]
        return (first + torch.randperm(size, generator=generator)).to(integer).view(dtype).view(shape)
    if kind == "ties":
        return (2 * normal).round().to(dtype)
    if kind == "equal":
        return torch.full(shape, -0.25, dtype=dtype)
    if kind == "zeros":  # of both signs, between others of both signs
        zeros = torch.zeros(shape, dtype=torch.float64).copysign(normal)
        return zeros.where(torch.rand(shape, generator=generator) < 0.7, normal).to(dtype)
    if kind == "subnormal":
        return ((4 * normal).round() * (info.smallest_normal * info.eps)).to(dtype)
    if kind == "huge":  # the sum overflows
        return ((2 * normal).round().clamp(-2, 2) * (info.max / 2)).to(dtype)
    return (-normal.abs() - 1).to(dtype)


def row(k: int, size: int) -> Target:
    """A target that removes k of a group of that size, which the caller's oracle counts on its own."""
    return Target(f"{k} of {size}", "row", min((k + 0.5) / size, math.nextafter(1, 0)))


def removals(size: int) -> Iterator[int]:
    """Every k of a small group, and of a larger one the ends and some between."""
    yield from range(size) if size <= 32 else sorted({0, 1, 2, size // 3, size // 2, size * 9 // 10, size - 1})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SMALL + LARGE)
def test_rows_and_layers(shape: tuple[int, int], kind: str, dtype: torch.dtype) -> None:
    score = drawn(kind, shape, dtype)
    for k in removals(shape[1]):
        assert torch.equal(select_mask(score, row(k, shape[1])), stable_sort(score, "row", k)), k
    for k in removals(score.numel()):
        target = row(k, score.numel()).within("layer")
        assert torch.equal(select_mask(score, target), stable_sort(score, "layer", k)), k


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 128), (7, 130), (2, 300), (5, 4097)])
def test_blocks(shape: tuple[int, int], kind: str, dtype: torch.dtype) -> None:
    """Each 128 columns a layer of their own, the last of them maybe fewer."""
    score = drawn(kind, shape, dtype)
    for sparsity in (0, 0.01, 0.5, 0.7, 0.999):
        parts = [score[:, start : start + 128] for start in range(0, shape[1], 128)]
        kept = [stable_sort(part, "layer", int(part.numel() * sparsity)) for part in parts]
        assert torch.equal(select_mask(score, Target("", "block", sparsity)), torch.cat(kept, dim=1)), sparsity


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group", GROUPS)
def test_patterns(group: int, kind: str, dtype: torch.dtype) -> None:
    for shape in ((1, group), (3, 5 * group), (2, 41 * group)):
        score = drawn(kind, shape, dtype)
        for keep in range(1, group):
            target = Target(f"{keep}:{group}", "n:m", 1 - keep / group, keep, group)
            assert torch.equal(select_mask(score, target), stable_sort(score, "n:m", group - keep, group)), keep


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_width(dtype: torch.dtype) -> None:
    """From 1 to 200 columns, ties among them."""
    for columns in range(1, 201):
        score = drawn("ties", (3, columns), dtype)
        k = columns // 2
        assert torch.equal(select_mask(score, row(k, columns)), stable_sort(score, "row", k)), columns
        k = int(3 * columns * 0.6)
        assert torch.equal(select_mask(score, Target("", "layer", 0.6)), stable_sort(score, "layer", k)), columns


@settings(max_examples=300, deadline=None, derandomize=True)
@given(data=st.data(), granularity=st.sampled_from(["row", "layer", "n:m"]), dtype=st.sampled_from(DTYPES))
def test_any_k_of_any_scores(data: st.DataObject, granularity: str, dtype: torch.dtype) -> None:
    """Of few distinct numbers, among them the ends of the dtype's range, at any k."""
    rows, group = data.draw(st.integers(1, 6)), data.draw(st.sampled_from(GROUPS))
    columns = group * data.draw(st.integers(1, 10)) if granularity == "n:m" else data.draw(st.integers(1, 400))
    info = torch.finfo(dtype)
    least = info.smallest_normal * info.eps
    ends = [0.0, -0.0, least, -least, info.smallest_normal, 1.0, 1.0 + info.eps, info.max, -info.max]
    chosen = data.draw(st.lists(st.sampled_from(ends), min_size=1, max_size=9, unique=True))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    places = torch.randint(len(chosen), (rows, columns), generator=generator)
    score = torch.tensor(chosen, dtype=torch.float64)[places].to(dtype)
    size = {"row": columns, "layer": score.numel(), "n:m": group}[granularity]
    k = data.draw(st.integers(1, group - 1) if granularity == "n:m" else st.integers(0, size - 1))
    pattern = (group - k, group) if granularity == "n:m" else (0, 0)
    target = Target("", granularity, row(k, size).sparsity, *pattern)
    assert torch.equal(select_mask(score, target), stable_sort(score, granularity, k, group))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["distinct", "ties", "zeros"])
def test_scores_that_are_not_contiguous(kind: str, dtype: torch.dtype) -> None:
    """Transposed, sliced either way, with negative reach into a larger matrix, and one row or column repeated."""
    base = drawn(kind, (96, 160), dtype)
    repeated = (base[:1].expand(6, 160), base[:, :1].expand(96, 32))
    for score in (base.t(), base[::3, ::2], base[5:9, 7:135], base.flip(1)[:, 3:131:4], *repeated):
        assert not score.is_contiguous()
        before = score.clone()
        rows, columns = score.shape
        for target, expected in [
            (row(columns // 3, columns), stable_sort(score, "row", columns // 3)),
            (Target("", "layer", 0.5), stable_sort(score, "layer", rows * columns // 2)),
            (Target("2:4", "n:m", 0.5, 2, 4), stable_sort(score, "n:m", 2, 4)),
        ]:
            assert torch.equal(select_mask(score, target), expected), (score.shape, score.stride(), target)
        assert torch.equal(score, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_are_refused(bad: float, dtype: torch.dtype) -> None:
    """One, a whole row, opposite infinities, and one among numbers whose sum overflows anyway."""
    for kind in ("distinct", "huge"):
        for places in ([(0, 0)], [(2, 47)], [(1, column) for column in range(48)], [(0, 3), (2, 5)]):
            score = drawn(kind, (3, 48), dtype)
            for number, (at, column) in enumerate(places):
                score[at, column] = -bad if number % 2 else bad
            for target in (row(24, 48), *(Target("", wide, 0.5) for wide in ("layer", "block"))):
                with pytest.raises(MaskError, match=rf"^{len(places)} of 144 scores are NaN or infinite$"):
                    select_mask(score, target)
            with pytest.raises(MaskError, match=rf"^{len(places)} of 144 scores"):
                select_mask(score, Target("2:4", "n:m", 0.5, 2, 4))
