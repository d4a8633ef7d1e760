"""Probe layers: fingerprints against masks compared directly, reconstruction errors against random inputs' outputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gpmetric.calibration.accumulators import LayerStatistics, curvature
from gpmetric.calibration.collect import Statistics
from gpmetric.evolution.mask_fingerprint import ProbeLayers, _is_tied, reconstruction_error
from gpmetric.evolution.tasks import MaskFingerprint, NoMasks
from gpmetric.metrics import Metric, resolve_metric
from gpmetric.models import Block, Layer, Model
from gpmetric.pruning.mask import select_mask
from gpmetric.targets import Target, parse_target

TARGETS = [parse_target(text) for text in ("0.5", "layer:0.6", "2:4")]
SHAPES = [(6, 16), (9, 24), (5, 12)]


class Room:
    """A few linear layers with random weights and inputs, and the statistics that follow from them by definition."""

    def __init__(self, shapes: list[tuple[int, int]] = SHAPES, seed: int = 0, gram: bool = True) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.layers, self.inputs, found = [], [], {}
        for place, (rows, columns) in enumerate(shapes):
            module = nn.Linear(columns, rows, bias=False).requires_grad_(False)
            module.weight.copy_(torch.randn(rows, columns, generator=draw))
            inputs = torch.randn(200, columns, generator=draw) * torch.rand(columns, generator=draw)
            products = inputs.t() @ inputs / len(inputs)
            slope = torch.rand(rows, columns, generator=draw)
            found[f"layer{place}"] = LayerStatistics(
                X=products.diagonal().sqrt(), D=curvature(products), G=slope, H=slope.square(),
                gram=products if gram else None,
            )  # fmt: skip
            self.layers.append(Layer(f"layer{place}", module))
            self.inputs.append(inputs)
        self.statistics = Statistics(found, 8, 25)

    def probe(self, update: str = "none", fit: str = "own") -> ProbeLayers:
        model = Model("room", None, None, (Block(nn.Identity(), tuple(self.layers)),))
        return ProbeLayers(model, self.statistics, TARGETS, update, fit)

    def operands(self, place: int) -> dict[str, Tensor]:
        return {"W": self.layers[place].weight, **self.statistics.layers[f"layer{place}"].operands}

    def masks(self, metric: Metric) -> list[Tensor]:
        """By layer and target, from the metric's score itself."""
        return [
            select_mask(
                metric(**self.operands(place)),
                target.resolved(metric.granularity),
            )
            for place in range(len(self.layers))
            for target in TARGETS
        ]


METRICS = [
    "abs(W)", "W*W", "abs(W)*X", "3*abs(W)*X + 1", "sqr(W)*X*X", "abs(W)*G", "sqrt(H)*abs(W)", "W*W*D", "abs(W)*X*G",
    "abs(W)/rowsum(abs(W))", "layer:abs(W)", "layer:abs(W)*X", "block:abs(W)*X", "exp(abs(W)*X)", "abs(W)*X*X",
]  # fmt: skip


def test_fingerprints_are_equal_where_masks_are_and_nowhere_else() -> None:
    room = Room()
    metrics = [resolve_metric(text) for text in METRICS]
    answers = room.probe().measure(metrics)
    masks = [room.masks(metric) for metric in metrics]
    equal = 0
    for first in range(len(METRICS)):
        for second in range(first):
            same = all(torch.equal(a, b) for a, b in zip(masks[first], masks[second], strict=True))
            told = answers[first].fingerprint == answers[second].fingerprint
            assert told == same, (METRICS[first], METRICS[second])
            equal += same
    assert equal >= 6


def test_an_answer_does_not_depend_on_its_batch() -> None:
    probe = Room().probe()
    metrics = [resolve_metric(text) for text in METRICS]
    assert probe.measure(metrics) == [probe.measure([metric])[0] for metric in metrics]


@pytest.mark.parametrize("text", ["abs(W)*X", "layer:abs(W)*G"])
def test_reconstruction_is_the_change_of_the_outputs(text: str) -> None:
    """|X (W - P)^T|^2 / |X W^T|^2 on the inputs themselves, in double precision, the mean over layers."""
    room = Room()
    (answer,) = room.probe().measure([resolve_metric(text)])
    masks = iter(room.masks(resolve_metric(text)))
    errors = []
    for layer, inputs in zip(room.layers, room.inputs, strict=True):
        weight, inputs = layer.weight.double(), inputs.double()
        whole = (inputs @ weight.t()).square().sum()
        errors.append([(inputs @ (weight * ~next(masks)).t()).square().sum() / whole for _ in TARGETS])
    for place, target in enumerate(TARGETS):
        expected = sum(float(error[place]) for error in errors) / len(errors)
        assert answer.reconstruction[target.text] == pytest.approx(expected, rel=1e-4)


def test_nothing_kept_is_all_lost_and_all_kept_is_nothing() -> None:
    room = Room()
    weight, gram = room.layers[0].weight, room.statistics.layers["layer0"].gram
    assert gram is not None
    assert reconstruction_error(weight, torch.zeros_like(weight), gram) == pytest.approx(1)
    assert reconstruction_error(weight, weight, gram) == 0


def test_a_layer_that_always_gives_zero_has_no_error() -> None:
    """A weight that starts as zeros, or an input that never comes: nothing divided by nothing is no failure."""
    gram = torch.eye(4)
    assert reconstruction_error(torch.zeros(2, 4), torch.zeros(2, 4), gram) == 0
    assert reconstruction_error(torch.ones(2, 4), torch.zeros(2, 4), torch.zeros(4, 4)) == 0


def test_without_gram_matrices_there_are_masks_only() -> None:
    metric = resolve_metric("abs(W)*X")
    (blind,), (seeing,) = (Room(gram=gram).probe().measure([metric]) for gram in (False, True))
    assert blind.reconstruction == {}
    assert blind.fingerprint == seeing.fingerprint


def test_a_sketch_is_the_mask_itself_where_it_is_small() -> None:
    """16 bits of a 2x8 layer, row by row, at each target, as hexadecimal digits."""
    room = Room([(2, 8)])
    (answer,) = room.probe().measure([resolve_metric("abs(W)")])
    bits = "".join(str(int(bit)) for mask in room.masks(resolve_metric("abs(W)")) for bit in mask.flatten())
    assert answer.sketch == f"{int(bits, 2):012x}"


def test_sketches_of_large_masks_have_one_length() -> None:
    answers = Room([(40, 64)] * 3).probe().measure([resolve_metric(text) for text in ("abs(W)", "abs(W)*X")])
    assert [len(one.sketch) for one in answers] == [3 * 512 // 4] * 2
    assert answers[0].sketch != answers[1].sketch


def test_eight_layers_evenly_spread() -> None:
    """Of 15 layers every second one: a change of the others is not seen, a change of these is."""
    room = Room([(4, 8)] * 15)
    metric = resolve_metric("abs(W)")
    (before,) = room.probe().measure([metric])
    for place in range(15):
        layer = room.layers[place].weight
        kept = layer.clone()
        layer.copy_(layer.flip(1))
        assert (room.probe().measure([metric])[0] == before) == (place % 2 == 1)
        layer.copy_(kept)


# What gives no mask


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max(abs(W), 100)", "more than half of the scores of most rows are equal"),
        ("tanh(1000*abs(W))", "more than half"),
        ("exp(14*abs(W))*1e29", "NaN or infinite"),
    ],
)
def test_scores_that_choose_no_mask_are_refused(text: str, message: str) -> None:
    bad, good = Room().probe().measure([resolve_metric(text), resolve_metric("abs(W)")])
    assert isinstance(bad, NoMasks)
    assert message in bad.error
    assert isinstance(good, MaskFingerprint)


@pytest.mark.parametrize(("equal", "tied"), [(5, False), (6, True), (10, True)])
def test_ties_are_counted_by_rows(equal: int, tied: bool) -> None:
    """Of 10 scores more than half must be one value, in more than half of the rows."""
    room = Room([(3, 12)])
    weight = room.layers[0].weight
    weight.copy_(torch.arange(1.0, 37).view(3, 12))
    weight[:2, : equal + 1] = 0.5  # 6 of 12 are half
    (answer,) = room.probe().measure([resolve_metric("abs(W)")])
    assert isinstance(answer, NoMasks) == tied
    weight[1] = torch.arange(1.0, 13)  # one row of three is not most
    assert isinstance(room.probe().measure([resolve_metric("abs(W)")])[0], MaskFingerprint)


@pytest.mark.parametrize("columns", [1, 2, 5, 8, 123])
def test_ties_by_brute_force(columns: int) -> None:
    """Counts of every value in every row, with NaN, which equals nothing, and with zeros of either sign."""
    draw = torch.Generator().manual_seed(columns)
    values = torch.tensor([0.0, -0.0, -1.5, 3.0, torch.inf, torch.nan])
    answers = set()
    for trial in range(200):
        common = torch.rand(5, columns, generator=draw) < trial / 200
        few = values[torch.randint(0, 6, (5, columns), generator=draw)]
        score = few.where(common, torch.randn(5, columns, generator=draw))
        score = few[:, :1].where(torch.rand(5, columns, generator=draw) < 0.4, score)
        tied = sum(max(sum(x == y for y in row) for x in row) * 2 > columns for row in score.tolist())
        assert _is_tied(score) == (tied * 2 > 5)
        answers.add(_is_tied(score))
    assert answers == {False, True} or columns == 1


# With weight updates


def test_obs_has_the_masks_of_no_update() -> None:
    metrics = [resolve_metric(text) for text in METRICS]
    assert Room().probe("obs").measure(metrics) == Room().probe().measure(metrics)


def sparsegpt(weight: Tensor, factor: Tensor, share: Tensor, target: Target) -> Tensor:
    """Algorithm 1 column by column, the score W*W*share; one block holds all columns."""
    weight, group = weight.clone(), target.group or weight.shape[1]
    rule = target if target.group else target.within("layer")
    for column in range(weight.shape[1]):
        if column % group == 0:
            here = slice(column, column + group)
            removed = ~select_mask(weight[:, here].square() * share[here], rule)
        error = weight[:, column] * removed[:, column % group] / factor[column, column]
        weight[:, column:] -= error[:, None] * factor[column, column:]
        weight[removed[:, column % group], column] = 0
    return weight


@pytest.mark.parametrize("text", ["W*W*D", "abs(W)*X"])
def test_obs_blockwise_has_the_masks_and_weights_its_solver_ends_with(text: str) -> None:
    room, other = Room([(6, 16)]), Room([(6, 16)])
    metric = resolve_metric(text)
    (answer,) = room.probe("obs-blockwise").measure([metric])
    found, weight = room.statistics.layers["layer0"], room.layers[0].weight.clone()
    share = 1 / found.factor.diagonal().square() if text == "W*W*D" else found["X"].square()
    solved = [sparsegpt(weight.double(), found.factor.double(), share.double(), target) for target in TARGETS]
    bits = "".join(str(int(bit)) for one in solved for bit in (one != 0).flatten())
    assert answer.sketch == f"{int(bits, 2):0{len(bits) // 4}x}"
    for target, one in zip(TARGETS, solved, strict=True):
        change = (room.inputs[0] @ (weight - one.float()).t()).square().sum() / (
            room.inputs[0] @ weight.t()
        ).square().sum()
        assert answer.reconstruction[target.text] == pytest.approx(float(change), rel=1e-3)
    assert torch.equal(room.layers[0].weight, other.layers[0].weight)  # the dense weight is not written to


@pytest.mark.parametrize("update", ["none", "admm"])
def test_fitted_to_the_dense_model_nothing_is_solved(update: str) -> None:
    """What the layers of a pruned model are fitted to is not known here: masks are those of the dense weights."""
    metrics = [resolve_metric(text) for text in METRICS]
    masks = Room(gram=False).probe().measure(metrics)
    assert Room().probe(update, "dense").measure(metrics) == masks
