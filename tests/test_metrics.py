"""Baselines against the formulas of the published codes, written in plain torch on raw activations and gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gpmetric.calibration.accumulators import LayerStatistics, curvature
from gpmetric.errors import ExpressionError, InputError
from gpmetric.expression.evaluate import evaluate
from gpmetric.formats import FORMATS, export_expression
from gpmetric.formats.latex import to_latex
from gpmetric.metrics import BASELINES, Metric, masks_only, resolve_metric, spelled
from gpmetric.operands import GRAM, OPERANDS
from gpmetric.provenance import gpmetric_version
from gpmetric.pruning.mask import select_mask
from gpmetric.pruning.updaters import needed_statistics
from gpmetric.targets import GRANULARITIES, parse_target
from tests.pruning_helpers import prune_weight


@dataclass(frozen=True)
class Sample:
    """What the published codes see, all float64: weight w [out, in], inputs [N, L, in], gradients g [N, out, in].

    `regional` are gradients, too, of the norm of the block's output.
    """

    w: Tensor
    inputs: Tensor
    g: Tensor

    @property
    def regional(self) -> Tensor:
        """Others, of a size that makes both terms of Wanda++ count."""
        return 10 * self.g.roll(1, dims=1)

    @property
    def x2(self) -> Tensor:
        """Mean over sequences of the sum over tokens of the squared input, [1, in]."""
        return self.inputs.square().sum(dim=1).mean(dim=0)[None]

    def statistics(self) -> LayerStatistics:
        """The same sample in our operands, fp32."""
        rows = self.inputs.flatten(0, 1)  # [N * L, in]
        gram = (rows.t() @ rows / len(rows)).float()
        G, H = self.g.abs().mean(dim=0).float(), self.g.square().mean(dim=0).float()
        X, R = rows.square().mean(dim=0).sqrt().float(), self.regional.square().mean(dim=0).sqrt().float()
        return LayerStatistics(X=X, D=curvature(gram), G=G, H=H, R=R, gram=gram)


def make_sample(sequences: int, length: int, rows: int = 12, columns: int = 48) -> Sample:
    generator = torch.Generator().manual_seed(sequences * length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    inputs = normal(sequences, length, columns) * normal(columns).exp()
    # gradients of a size that makes both terms of GBLM count
    return Sample(normal(rows, columns), inputs, normal(sequences, rows, columns) * normal(rows, columns).exp() / 100)


def minmax(values: Tensor) -> Tensor:
    return (values - values.min()) / (values.max() - values.min())


def obs_diagonal(sample: Sample) -> Tensor:
    """diag(chol(H^-1)) as SparseGPT's code builds it: H = 2 / N sum x x^T, 1 % of the mean diagonal added."""
    rows = sample.inputs.flatten(0, 1)
    hessian = 2 / len(sample.inputs) * rows.t() @ rows
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    return torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True).diagonal()


# name -> score, and what a plain number's threshold is taken over (sparsegpt: a block of 128 columns, here all of them)
PUBLISHED: dict[str, tuple[Callable[[Sample], Tensor], str]] = {
    "magnitude": (lambda s: s.w.abs(), "layer"),
    "magnitude_row": (lambda s: s.w.abs(), "row"),
    "wanda": (lambda s: s.w.abs() * s.x2.sqrt(), "row"),
    "ria": (
        lambda s: (s.w.abs() / s.w.abs().sum(dim=0) + s.w.abs() / s.w.abs().sum(dim=1)[:, None]) * s.x2.sqrt() ** 0.5,
        "row",
    ),
    "gblm_l1": (lambda s: s.w.abs() * s.x2.sqrt() + s.w.abs() * (100 * s.g).abs().sum(dim=0), "row"),
    "gblm_l2": (lambda s: s.w.abs() * s.x2.sqrt() + s.w.abs() * (100 * s.g).square().sum(dim=0).sqrt(), "row"),
    "wandapp_rgs": (
        lambda s: s.w.abs() * (100 * s.regional.square().mean(dim=0).sqrt() + s.inputs.flatten(0, 1).norm(dim=0)),
        "row",
    ),
    "pruner_zero": (lambda s: s.w * s.w * minmax(100 * s.g.square().sum(dim=0).sqrt()), "row"),
    "sparsegpt": (lambda s: s.w**2 / obs_diagonal(s) ** 2, "layer"),
    "alps": (lambda s: s.w.abs() * s.x2.sqrt(), "layer"),
}


def test_every_baseline_has_its_published_formula_here() -> None:
    assert set(PUBLISHED) == set(BASELINES)


@pytest.mark.parametrize(("sequences", "length"), [(1, 64), (4, 32), (32, 8), (3, 123)])
@pytest.mark.parametrize("name", BASELINES)
def test_masks_are_the_published_ones(name: str, sequences: int, length: int) -> None:
    sample = make_sample(sequences, length)
    published, granularity = PUBLISHED[name]
    metric = resolve_metric(name, sequences, length)
    for text in ("0.5", "0.3", "row:0.6", "layer:0.6", "block:0.6", "2:4", "4:8"):
        if metric.update == "admm" or (metric.update == "obs-blockwise" and ":" in text):
            continue  # chosen on updated weights: tests/test_admm.py, tests/test_sparsegpt.py
        target = parse_target(text)
        pruned = prune_weight(sample.w.float(), metric, target, sample.statistics(), metric.update or "none")
        assert torch.equal(pruned != 0, select_mask(published(sample), target.resolved(granularity))), text


@pytest.mark.parametrize("name", [name for name in BASELINES if name != "sparsegpt"])
def test_scores_are_the_published_ones_up_to_a_factor(name: str) -> None:
    sample = make_sample(5, 20)
    operands = sample.statistics().operands | {"W": sample.w.float()}
    score = evaluate(resolve_metric(name, 5, 20).expression, operands).double()
    published = PUBLISHED[name][0](sample)
    # fp32 against float64, a handful of operations
    torch.testing.assert_close(score / score.mean(), published / published.mean(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["gblm_l1", "gblm_l2"])
def test_gblm_depends_on_the_sample_size(name: str) -> None:
    """A mean and a sum: with another N or L the same statistics give another mask."""
    sample = make_sample(4, 32)
    statistics, target = sample.statistics(), parse_target("0.5")
    masks = [
        prune_weight(sample.w.float(), resolve_metric(name, *size), target, statistics) != 0
        for size in [(4, 32), (64, 32), (4, 512)]
    ]
    assert not torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


@pytest.mark.parametrize("name", BASELINES)
def test_what_a_baseline_needs(name: str) -> None:
    """Read off the published formulas."""
    metric = resolve_metric(name, 8, 16)
    assert metric.name == name
    assert metric.needs_gradients == (name in ("gblm_l1", "gblm_l2", "pruner_zero"))
    assert ("D" in metric.operands) == (name == "sparsegpt")
    assert (GRAM in needed_statistics([metric], "none")) == (name in ("sparsegpt", "alps"))
    assert metric.granularity == ("layer" if name in ("magnitude", "alps") else "row")
    assert metric.update == {"sparsegpt": "obs-blockwise", "alps": "admm"}.get(name)
    assert BASELINES[name].source


def test_magnitudes_are_the_same_under_patterns() -> None:
    sample = make_sample(2, 8)
    masks = [
        prune_weight(sample.w.float(), resolve_metric(name), parse_target("2:4"), sample.statistics())
        for name in ("magnitude", "magnitude_row")
    ]
    assert torch.equal(*masks)


@pytest.mark.parametrize(
    ("formula", "gradients", "operands"),
    [
        ("abs(W)", False, ""),
        ("abs(W)*X", False, "X"),
        ("W*G", True, "G"),
        ("W*sqrt(H)", True, "H"),
        ("W*F", True, "F"),
        ("W*R", False, "R"),
        ("W*W*D", False, "D"),
        ("W*X*D", False, "XD"),
    ],
)
def test_what_a_formula_needs(formula: str, gradients: bool, operands: str) -> None:
    metric = resolve_metric(formula, 8, 16)
    assert (metric.name, str(metric.expression)) == (formula, formula)
    assert (metric.needs_gradients, set(metric.operands)) == (gradients, set(operands))
    assert needed_statistics([metric], "none") == set(operands)
    assert needed_statistics([metric], "obs") == {*operands, GRAM}
    assert (metric.granularity, metric.update) == ("row", None)


@pytest.mark.parametrize(
    ("text", "meant"),
    [("wandaa", "wanda"), ("Wanda", "wanda"), ("SparseGPT", "sparsegpt"), ("gblm", "gblm_l"), ("magnitude-row",) * 2],
)
def test_a_mistyped_name_is_answered_with_the_right_one(text: str, meant: str) -> None:
    with pytest.raises(ExpressionError, match="did you mean") as caught:
        resolve_metric(text)
    assert f"unknown metric {text!r}" in str(caught.value)
    assert meant.replace("-", "_") in str(caught.value).partition("Accepted")[0]


@pytest.mark.parametrize("text", ["zzzz", "random", "x" * 10_000])
def test_an_unknown_name_is_answered_with_all_names(text: str) -> None:
    with pytest.raises(ExpressionError) as caught:
        resolve_metric(text)
    message = str(caught.value)
    assert all(name in message for name in BASELINES)
    assert "did you mean" not in message
    assert len(message) < 300
    assert message.isprintable()


@pytest.mark.parametrize("text", ["", "X", "1", "abs(W", "W W", "Ｗ", "wanda*2", "abs(W)*Q"])
def test_a_wrong_formula_is_the_parsers_to_refuse(text: str) -> None:
    with pytest.raises(ExpressionError, match=r"column|formula"):
        resolve_metric(text)


@pytest.mark.parametrize("rule", [*BASELINES, "abs(W)*X", " abs(W) * G "])
@pytest.mark.parametrize("group", ["row", "layer", "block"])
def test_a_comparison_group_before_a_metric(group: str, rule: str) -> None:
    """Only where a plain number competes changes, and the name stays the text."""
    plain = resolve_metric(rule, 8, 16)
    grouped = resolve_metric(f"{group}:{rule}", 8, 16)
    assert grouped == replace(plain, name=f"{group}:{rule}".strip(), granularity=group)


@pytest.mark.parametrize("target", ["0.5", "row:0.5", "layer:0.5", "block:0.5", "2:4"])
def test_a_comparison_group_holds_for_plain_numbers_only(target: str) -> None:
    generator = torch.Generator().manual_seed(5)
    weight, X = torch.randn(6, 200, generator=generator), torch.rand(200, generator=generator)
    statistics = LayerStatistics(X=X)
    masks = {}
    for group in ("row", "layer", "block"):
        masks[group] = prune_weight(weight, resolve_metric(f"{group}:wanda"), parse_target(target), statistics) != 0
        written = f"{group}:0.5" if target == "0.5" else target
        assert torch.equal(masks[group], select_mask(weight.abs() * X, parse_target(written)))
    assert torch.equal(masks["layer"], masks["block"]) == (target != "0.5")


@pytest.mark.parametrize("group", ["", "n:m", "2", "Layer", "layer:row", "column", "x" * 10_000])
@pytest.mark.parametrize("rule", ["wanda", "abs(W)*X", "4"])
def test_an_unknown_comparison_group_is_answered_with_all(group: str, rule: str) -> None:
    with pytest.raises(ExpressionError) as caught:
        resolve_metric(f"{group}:{rule}")
    message = str(caught.value)
    assert message.startswith(f"unknown comparison group {group!r:.60} in ")
    assert message.endswith("accepted are row:, layer:, block:")
    assert len(message) < 250
    assert message.isprintable()


@pytest.mark.parametrize("text", ["layer:wandaa", "block:Wanda"])
def test_a_mistyped_name_behind_a_group_is_answered_too(text: str) -> None:
    with pytest.raises(ExpressionError, match=f"unknown metric {text.partition(':')[2]!r}: did you mean 'wanda'"):
        resolve_metric(text)


@pytest.mark.parametrize("group", [name for name, row in GRANULARITIES.items() if not row.counted])
def test_spelled_is_what_resolve_metric_reads(group: str) -> None:
    metric = resolve_metric(f"{group}:abs(W)*X**0.5")
    again = resolve_metric(spelled(metric.expression, group))
    assert (again.expression, again.granularity) == (metric.expression, group)
    assert spelled(metric.expression, "row") == "abs(W)*X**0.5"


def test_only_sparsegpt_and_alps_update() -> None:
    assert [name for name in BASELINES if not masks_only(name)] == ["sparsegpt", "alps"]


def test_a_metric_is_called_by_place_or_by_name() -> None:
    """In the order of the table of operands; each of the shape that its row says."""
    drawn = torch.Generator().manual_seed(0)
    given = {
        name: torch.rand((4, 6) if row.axes == "out,in" else (6,), generator=drawn) for name, row in OPERANDS.items()
    }
    metric = Metric.parse("W*X+G*H-D/F")
    expected = given["W"] * given["X"] + given["G"] * given["H"] - given["D"] / given["F"]
    torch.testing.assert_close(metric(**given), expected)
    assert torch.equal(metric(*given.values()), metric(**given))
    assert torch.equal(Metric.parse("abs(W)*D")(given["W"], D=given["D"]), given["W"].abs() * given["D"])
    with pytest.raises(ExpressionError, match="needs operand F"):
        metric(**given | {"F": None})
    with pytest.raises(ExpressionError, match="operand X must have shape"):
        metric(given["W"], given["G"], *list(given.values())[2:])
    with pytest.raises(ExpressionError, match="unknown operand 'Q': accepted are W, X, G, H, D, F, R"):
        metric(given["W"], Q=given["X"])


def test_an_operand_given_twice_or_beyond_the_last_is_refused() -> None:
    weight = torch.ones(2, 3)
    for metric in (Metric.parse("abs(W)"), Metric.parse("abs(W)*X")):
        with pytest.raises(ExpressionError, match="given once, in the order of W, X, G, H, D, F, R or by name"):
            metric(weight, torch.ones(3), X=torch.ones(3))
        with pytest.raises(ExpressionError, match="each operand is given once"):
            metric(weight, *[torch.ones(3)] * len(OPERANDS))


# How a metric shows itself, and becomes a file


def test_a_metric_shows_its_formula() -> None:
    plain, baseline = Metric.parse("layer: abs(W)*X**0.5"), Metric.parse("sparsegpt")
    assert (str(plain), str(baseline), str(Metric.parse("magnitude"))) == (
        "layer:abs(W)*X**0.5", "W*W*D", "layer:abs(W)"
    )  # fmt: skip
    assert resolve_metric(str(plain)).expression == plain.expression
    assert repr(baseline) == "<Metric sparsegpt: W*W*D; update obs-blockwise>"
    assert repr(Metric.parse("abs(W)*X")) == "<Metric abs(W)*X>"
    assert plain.latex == to_latex(plain.expression)
    assert plain._repr_latex_() == rf"$\displaystyle {plain.latex}$"


@pytest.mark.parametrize("format", [name for name in FORMATS if name != "triton"])
def test_a_metric_exports_what_the_command_writes(format: str, tmp_path: Path) -> None:
    metric, path = Metric.parse("layer:abs(W)*X"), tmp_path / "metric.txt"
    text = metric.export(format)
    export_expression(metric.expression, format, path, gpmetric_version(), "layer")
    assert text == path.read_text()
    assert metric.export(format, path) == text  # over a file of ours
    path.write_text("mine")
    with pytest.raises(InputError, match="gpmetric did not write it"):
        metric.export(format, path)
    assert path.read_text() == "mine"
    assert metric.export(format, path, force=True) == path.read_text() == text
    with pytest.raises(InputError, match="format must be one of python"):
        metric.export("pickle")
