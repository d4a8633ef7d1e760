"""Exported Triton files in the interpreter: what they return, write and refuse; run by `test_kernels.py`."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from gpmetric.expression import parse
from gpmetric.expression.evaluate import evaluate
from gpmetric.formats import Formula
from gpmetric.formats.triton import triton_text
from gpmetric.modules import load_module
from gpmetric.pruning.mask import select_mask
from gpmetric.targets import parse_target

pytestmark = [pytest.mark.interpret, pytest.mark.filterwarnings("ignore::RuntimeWarning")]

CASES = [("W*W*G/rowsum(G)", "row"), ("abs(W)", "layer"), ("abs(W)*X", "block")]


def written(formula: str, group: str, folder: Path) -> ModuleType:
    path = folder / "metric.py"
    path.write_text(triton_text(Formula(parse(formula), "0.1", group)), encoding="utf-8")
    return load_module(path)


def drawn(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    operands = {name: torch.rand(6, 160, generator=generator) for name in "GHF"}
    operands |= {name: torch.rand(160, generator=generator) for name in "XD"}
    return operands | {"W": torch.randn(6, 160, generator=generator).to(dtype)}


@pytest.mark.parametrize(
    ("formula", "group", "dtype"),
    [(*case, dtype) for case, dtype in zip(CASES, (torch.bfloat16, torch.float32, torch.float16), strict=True)],
)
def test_masks_are_those_of_the_library(
    formula: str, group: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, operands = written(formula, group, tmp_path), drawn(dtype)
    monkeypatch.setenv("GPMETRIC_KERNELS", "0")
    scores = evaluate(parse(formula), operands)
    prefix = "" if group == "row" else f"{group}:"
    for sparsity in (0.0, 0.31, 0.5):
        mask = select_mask(scores, parse_target(f"{prefix}{sparsity}"))
        assert torch.equal(module.prune(sparsity=sparsity, **operands), operands["W"].masked_fill(~mask, 0))
    for n, m in ((1, 2), (2, 4), (5, 8), (8, 16)):
        mask = select_mask(scores, parse_target(f"{n}:{m}"))
        assert torch.equal(module.prune_nm(n=n, m=m, **operands), operands["W"].masked_fill(~mask, 0))


@pytest.mark.parametrize(("formula", "group"), CASES)
def test_out(formula: str, group: str, tmp_path: Path) -> None:
    """Without it the weight stays as it is; in place, another tensor and transposed views work."""
    module, operands = written(formula, group, tmp_path), drawn()
    W = torch.nn.Parameter(operands.pop("W"))
    before = W.detach().clone()
    expected = module.prune(W, 0.5, **operands)
    assert torch.equal(W, before)
    other = torch.empty_like(before)
    assert module.prune(W, 0.5, **operands, out=other) is other
    view = before.t().contiguous().t()
    assert module.prune(view, 0.5, **operands, out=view) is view
    assert module.prune(W, 0.5, **operands, out=W) is W
    for found in (other, view, W):
        assert torch.equal(found, expected)
    assert torch.equal(module.prune_nm(W, 2, 4, **operands, out=W), W)
    X, G, H, D = (operands[name] for name in "XGHD")
    assert module.prune(W, 0.5, X, G, H, D, W) is W  # out is the seventh
    assert module.prune_nm(W, 2, 4, X, G, H, D, W) is W


def test_nothing_to_prune(tmp_path: Path) -> None:
    module = written("W*W*G/colsum(G)", "row", tmp_path)
    for shape in ((0, 160), (6, 0)):
        empty = torch.empty(shape)
        assert module.prune(empty, 0.5, G=empty).shape == shape
        assert module.prune(empty, 0.5, G=empty, out=empty) is empty


def test_what_is_refused(tmp_path: Path) -> None:
    module, operands = written("W*W*G/rowsum(G)", "row", tmp_path), drawn()
    W, G = operands["W"], operands["G"]
    for call, message in [
        (lambda: module.prune(W, 0.5), r"needs the operand G, \[6, 160\]"),
        (lambda: module.prune(W, 0.5, G=G[1:]), r"operand G must be \[6, 160\] to go with W, but got \[5, 160\]"),
        (lambda: module.prune(W, 1.0, G=G), "sparsity must be at least 0 and below 1, but got 1.0"),
        (lambda: module.prune(W.double(), 0.5, G=G), "weight must be float32, bfloat16 or float16"),
        (lambda: module.prune(W, 0.5, G=G, out=W.half()), r"out must be \[6, 160\], torch.float32"),
        (lambda: module.prune(W[0], 0.5, G=G), r"W must be \[out, in\], but got \[160\]"),
        (lambda: module.prune_nm(W, 4, 4, G=G), "4:4 of 160 inputs"),
        (lambda: module.prune_nm(W, 2.0, 4.0, G=G), "2.0:4.0 of 160 inputs"),
        (lambda: module.prune(W, 0.5, G=G / 0), "960 of 960 scores are NaN or infinite"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
