"""Allocation files: exact targets, budgets, what is refused, and models pruned layer by layer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from gpmetric.cli import app
from gpmetric.errors import InputError
from gpmetric.loading import load_model
from gpmetric.metrics import resolve_metric
from gpmetric.models import Model
from gpmetric.outputs import MANIFEST
from gpmetric.pruning.allocation import (
    Allocation,
    check_allocation,
    group_count,
    layer_target,
    mean_sparsity,
    read_allocation,
)
from gpmetric.pruning.mask import select_mask
from gpmetric.pruning.protocol import Protocol, Rule
from gpmetric.pruning.prune import prune
from gpmetric.pruning.verify import verify
from gpmetric.targets import Target, parse_target, plain_granularities
from tests.pruning_helpers import session_of, windows_of

QUICK = {"samples": 4, "windows": 4, "sequence_length": 32, "device": "cpu"}
SHAPES = [(3, 7), (5, 49), (4, 128), (6, 300)]


def write(path: Path, allocation: Allocation) -> Path:
    path.write_text(json.dumps(allocation.document()))
    return path


def uniform(names: Sequence[str], text: str) -> Allocation:
    target = parse_target(text).resolved("row")
    assert target.granularity is not None
    return Allocation(target.granularity, dict.fromkeys(names, target))


def layers_of(shapes: Mapping[str, tuple[int, int]]) -> list[Any]:
    return [SimpleNamespace(name=name, weight=torch.empty(shape)) for name, shape in shapes.items()]


@pytest.mark.parametrize("size", [*range(1, 60), 98, 123, 128, 147, 300, 1000, 4096])
def test_a_layer_target_removes_exactly_what_it_is_asked_to(size: int) -> None:
    for removed in range(size):
        for granularity, shape in (("row", (3, size)), ("layer", (size, 1)), ("block", (size, 1))):
            target = layer_target(granularity, shape, removed)
            assert target.removed(size) == removed
            assert parse_target(target.text).resolved("row") == target
            assert target.granularity == granularity


def test_some_plain_quotients_would_remove_one_less() -> None:
    """Why targets are nudged: k / n * n may be below k."""
    assert any(int(49 * (removed / 49)) != removed for removed in range(49))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("text", ["0", "0.5", "row:0.37", "layer:0.41", "block:0.41", "block:0.003", "2:4", "1:7"])
def test_what_a_target_removes_is_what_its_mask_does(text: str, shape: tuple[int, int]) -> None:
    target = parse_target(text)
    if not target.fits(shape[1]):
        return
    score = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    assert target.removes(shape) == int((~select_mask(score, target)).sum())


def test_groups_are_counted_by_hand() -> None:
    counted = {"0.5": 6, "row:0.5": 6, "layer:0.5": 1, "block:0.5": 3, "2:4": 6 * 75, "1:3": 600}
    assert {text: group_count((6, 300), parse_target(text)) for text in counted} == counted


@pytest.mark.parametrize("granularity", plain_granularities())
@pytest.mark.parametrize("shape", SHAPES)
def test_a_layer_targets_mask(granularity: str, shape: tuple[int, int]) -> None:
    rows, columns = shape
    size = {"row": columns, "layer": rows * columns, "block": rows * min(columns, 128)}[granularity]
    score = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    for removed in range(0, size, 5):
        gone = ~select_mask(score, layer_target(granularity, shape, removed))
        first = {"row": gone[0], "layer": gone, "block": gone[:, :128]}[granularity]
        assert int(first.sum()) == removed


@pytest.mark.parametrize(
    "allocation",
    [
        Allocation("row", {"a": Target("0.71", "row", 0.71), "b": Target("0.0", "row", 0.0)}),
        Allocation("row", {"a": layer_target("row", (2, 49), 11), "b": layer_target("row", (2, 49), 0)}),
        Allocation("layer", {"a": parse_target("layer:0.3"), "b": layer_target("layer", (7, 9), 62)}),
        Allocation("block", {"a": parse_target("block:1e-05")}),
        Allocation("n:m", {"a": parse_target("2:4"), "b": parse_target("7:11"), "c": Target("0.0", "row", 0.0)}),
    ],
)
def test_round_trip(allocation: Allocation, tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", allocation)
    found = read_allocation(path)
    assert found == allocation
    assert (found.file, found.digest) == (str(path), hashlib.sha256(path.read_bytes()).hexdigest())


def test_what_a_file_may_have_beside(tmp_path: Path) -> None:
    """Other keys, and under N:M sparsities or not; a layer with sparsity 0 needs no pattern."""
    path = tmp_path / "a.json"
    path.write_text('{"version": 1, "granularity": "row", "sparsity": {"a": 0}, "pattern": 7, "front": [1]}')
    assert read_allocation(path).targets == {"a": Target("0.0", "row", 0.0)}
    path.write_text('{"version": 1, "granularity": "n:m", "sparsity": {"b": 0}, "pattern": {"a": "4:8", "c": "dense"}}')
    assert {name: target.group for name, target in read_allocation(path).targets.items()} == {"a": 8, "b": 0, "c": 0}
    path.write_text('{"version": 1, "granularity": "n:m", "sparsity": {"a": 0.3636364}, "pattern": {"a": "7:11"}}')
    assert read_allocation(path).targets["a"] == parse_target("7:11")


ROW = '{"version": 1, "granularity": "row", "sparsity": %s}'
PATTERN = '{"version": 1, "granularity": "n:m", "sparsity": %s, "pattern": %s}'


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "is no allocation: Expecting value"),
        (b"\xff{}", "is no allocation: 'utf-8' codec"),
        (b"[" * 200_000, "is no allocation: maximum recursion"),
        (b"[]", r"the file is \[\]"),
        (b"{}", "version is missing"),
        (b'{"version": 1, "granularity": "row"}', "sparsity is missing"),
        (
            b'{"version": 2, "granularity": "row", "sparsity": {"a": 0.5}}',
            "version is 2: Input should be less than or equal to 1",
        ),
        (
            b'{"version": true, "granularity": "row", "sparsity": {"a": 0.5}}',
            "version is True: Input should be a valid integer",
        ),
        (
            b'{"version": 1, "granularity": "column", "sparsity": {"a": 0.5}}',
            "granularity is 'column': Value error, accepted are row, layer, block, n:m",
        ),
        (ROW % '{"m.a": 1.0}', "sparsity.'m.a' is 1.0: Input should be less than 1"),
        (ROW % '{"m.a": -0.1}', "sparsity.'m.a' is -0.1: Input should be greater than or equal to 0"),
        (ROW % '{"m.a": "0.5"}', "sparsity.'m.a' is '0.5': Input should be a valid number"),
        (ROW % '{"m.a": true}', "sparsity.'m.a' is True: Input should be a valid number"),
        (ROW % '{"m.a": null}', "sparsity.'m.a' is None: Input should be a valid number"),
        (ROW % '{"m.a": 1e999}', "sparsity.'m.a' is inf: Input should be"),
        (ROW % ('{"m.a": 1%s}' % ("0" * 400)), "sparsity.'m.a' is 1000.*: Input should be"),
        (ROW % '{"m.a": NaN}', "NaN is not a number that JSON has"),
        (ROW % '{"m.a": 0.5, "m.a": 0.6}', "the key 'm.a' stands there twice"),
        (ROW % '{"\\u001b\\n": 2}', r"sparsity.'\\x1b\\n' is 2"),
        (ROW % "{}", "sparsity is {}: Dictionary should have at least 1 item"),
        (ROW % "[0.5]", r"sparsity is \[0.5\]: Input should be a valid dictionary"),
        (PATTERN % ("{}", '{"m.a": "4:2"}'), "pattern.'m.a' is '4:2'; accepted: dense, or N:M"),
        (PATTERN % ("{}", '{"m.a": "0.5"}'), "pattern.'m.a' is '0.5'; accepted: dense, or N:M"),
        (PATTERN % ("{}", '{"m.a": 2}'), "pattern.'m.a' is 2: Input should be a valid string"),
        (PATTERN % ('{"m.a": 0.6}', '{"m.a": "2:4"}'), "sparsity.'m.a' is 0.6, but its pattern '2:4' removes 0.5"),
        (PATTERN % ('{"m.b": 0.5}', '{"m.a": "2:4"}'), "sparsity.'m.b' is 0.5, but no pattern says"),
        (ROW.replace("row", "n:m") % '{"m.a": 0.5}', "pattern is missing"),
    ],
)
def test_wrong_files(content: bytes | str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.json"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(InputError, match=told) as caught:
        read_allocation(path)
    assert str(caught.value).startswith(f"--allocation {str(path)!r}")
    assert str(caught.value).isprintable()


def test_what_is_no_file(tmp_path: Path) -> None:
    for path, why in ((tmp_path / "gone", "No such file"), (tmp_path, "Is a directory"), ("a\0b", "null byte")):
        with pytest.raises(InputError, match=why):
            read_allocation(path)


FOUR = layers_of({"a": (10, 40), "b": (20, 40), "c": (40, 20), "d": (10, 20)})


def test_a_budget_is_met_to_within_one_weight_per_group_of_one_matrix() -> None:
    """By hand: half of 400 + 800 + 800 + 200 weights is 1,100, and c has the most rows, 40."""
    half = parse_target("row:0.5")
    exact = dict.fromkeys("abcd", half)
    more = exact | {"c": layer_target("row", (40, 20), 11)}  # 40 weights more
    for targets in (exact, more):
        check_allocation(FOUR, Allocation("row", targets), half)
    assert mean_sparsity(FOUR, more) == 1140 / 2200
    beyond = Allocation("row", more | {"a": layer_target("row", (10, 40), 21)}, file="f.json")
    with pytest.raises(InputError) as caught:
        check_allocation(FOUR, beyond, half)
    assert str(caught.value) == (
        "--allocation 'f.json' removes 1,150 weights, a mean sparsity of 0.5227, but --target 'row:0.5' removes 1,100; "
        "accepted: that, to within 40"
    )
    check_allocation(FOUR, beyond, None)


@pytest.mark.parametrize(
    ("text", "slack"), [("layer:0.5", 1), ("block:0.5", 1), ("2:4", 200)], ids=["layer", "block", "n:m"]
)
def test_budgets_of_other_groups(text: str, slack: int) -> None:
    allocation = uniform("abcd", text)
    check_allocation(FOUR, allocation, parse_target(text))
    other = {"layer": "layer:0.51", "block": "block:0.51", "n:m": "3:4"}[allocation.granularity]
    with pytest.raises(InputError, match=f"accepted: that, to within {slack}$"):
        check_allocation(FOUR, allocation, parse_target(other))


@pytest.mark.parametrize(
    ("allocation", "target", "told"),
    [
        (uniform("abc", "0.5"), "0.5", "this model's 4 layers: it lacks layer 'd'; --include and --exclude must"),
        (uniform("abcde", "0.5"), None, "it names layer 'e', which is not pruned here; --include and --exclude must"),
        (uniform("abce", "0.5"), None, "it lacks layer 'd' and it names layer 'e'"),
        (uniform("abcd", "layer:0.5"), "0.5", "has granularity 'layer', but --target '0.5' with this metric has 'row'"),
        (uniform("abcd", "0.5"), "2:4", "has granularity 'row', but --target '2:4' with this metric has 'n:m'"),
        (uniform("abcd", "4:8"), None, r"in = 20 of layer c is not divisible by 8 \(target 4:8\)"),
        (uniform("abcd", "2:4"), "4:8", r"--target '4:8': in = 20 of layer c is not divisible by 8"),
    ],
)
def test_allocations_that_do_not_fit(allocation: Allocation, target: str | None, told: str) -> None:
    with pytest.raises(InputError, match=told):
        check_allocation(FOUR, allocation, None if target is None else parse_target(target).resolved("row"))


def mixed(model: Model, kind: str) -> Allocation:
    """Another target for every layer, the third dense."""
    targets: dict[str, Target] = {}
    for index, layer in enumerate(model.layers):
        shape = tuple(layer.weight.shape)
        if kind == "n:m":
            chosen = ("2:4", "1:4", "0.0", "3:4", "1:2")[index % 5]
            targets[layer.name] = parse_target(chosen).resolved("row")
        else:
            size = {"row": shape[1], "layer": shape[0] * shape[1], "block": shape[0] * min(shape[1], 128)}[kind]
            targets[layer.name] = layer_target(kind, shape, 0 if index == 2 else size * (index % 7 + 2) // 11)
    return Allocation(kind, targets)


OWN = [  # (comparison group, metric, update)
    ("row", "wanda", "none"),
    ("row", "magnitude", "none"),
    ("row", "abs(W)*X", "obs"),
    ("layer", "wanda", "none"),
    ("block", "wanda", "obs"),
    ("n:m", "wanda", "none"),
    ("n:m", "wanda", "obs"),
    ("n:m", "sparsegpt", "none"),
    ("row", "sparsegpt", "none"),
    ("row", "alps", "none"),
    ("n:m", "wanda", "admm"),
]


@pytest.mark.every(3)
@pytest.mark.slow
@pytest.mark.parametrize("family", ["tiny_llama", "tiny_gpt2"])
@pytest.mark.parametrize("place", range(len(OWN)), ids=["-".join(row) for row in OWN])
def test_every_layer_gets_its_own(
    place: int, family: str, tiny_text: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Each row on both families; Llama takes the two protocols in turn."""
    kind, metric, update = OWN[place]
    one_shot = family == "tiny_llama" and place % 2 == 0
    source = request.getfixturevalue(family)
    allocation = mixed(load_model(str(source), device="cpu"), kind)
    path = write(tmp_path / "a.json", allocation)
    options = {"metric": metric, "update": update, "one_shot": one_shot, "allocation": path} | QUICK
    result = prune(str(source), output=tmp_path / "out", calibration=str(tiny_text), **options)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    blockwise = metric == "sparsegpt"
    removed = 0
    for layer in result["layers"]:
        target = allocation.targets[layer["name"]]
        if blockwise and not target.group:
            target = target.within("block")
        assert (layer["target"], layer["granularity"]) == (target.text, target.granularity)
        assert int((stored[layer["tensor"]] == 0).sum()) == target.removes(layer["shape"])
        removed += target.removes(layer["shape"])
        if kind == "row" and not blockwise:
            weight = stored[layer["tensor"]].t() if layer["transposed"] else stored[layer["tensor"]]
            assert len((weight == 0).sum(dim=1).unique()) == 1, "a metric's own group does not matter"
    mean = removed / sum(layer["entries"] for layer in result["layers"])
    assert result["sparsity"] == mean
    assert result["target"] == f"{mean:.4g}"
    assert result["allocation"] == {"file": "a.json", "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    assert "allocated layer by layer by `a.json`" in (tmp_path / "out" / "README.md").read_text()
    assert verify(tmp_path / "out", against=str(source), device="cpu")["problems"] == []


@pytest.mark.every(3)
@pytest.mark.parametrize("update", ["none", "obs", "obs-blockwise", "admm"])
@pytest.mark.parametrize("target", ["0.5", "layer:0.37", "block:0.6", "2:4"])
def test_a_uniform_allocation_is_no_allocation(
    target: str, update: str, tiny_llama: Path, tiny_text: Path, tmp_path: Path
) -> None:
    names = [layer.name for layer in load_model(str(tiny_llama), device="cpu").layers]
    path = write(tmp_path / "a.json", uniform(names, target))
    options = {"calibration": str(tiny_text), "target": target, "update": update} | QUICK
    plain = prune(str(tiny_llama), output=tmp_path / "plain", **options)
    result = prune(str(tiny_llama), output=tmp_path / "allocated", allocation=path, **options)
    assert plain["allocation"] is None
    assert result["target"] == target
    assert [layer["zeros"] for layer in plain["layers"]] == [layer["zeros"] for layer in result["layers"]]
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("plain", "allocated")]
    assert all(torch.equal(one, weights[1][name]) for name, one in weights[0].items())


def test_a_plain_target_has_the_metrics_group(tiny_llama: Path, tiny_text: Path, tmp_path: Path) -> None:
    """`magnitude` at 0.5 competes within layers: a row allocation is not its own, unless no target is given."""
    names = [layer.name for layer in load_model(str(tiny_llama), device="cpu").layers]
    options = {"calibration": str(tiny_text), "metric": "magnitude", "target": "0.5"} | QUICK
    row, layer = (write(tmp_path / f"{kind[:1]}.json", uniform(names, kind)) for kind in ("0.5", "layer:0.5"))
    with pytest.raises(InputError, match=r"granularity 'row', but --target '0\.5' with this metric has 'layer'"):
        prune(str(tiny_llama), output=tmp_path / "out", allocation=row, **options)
    prune(str(tiny_llama), output=tmp_path / "out", allocation=layer, **options)
    prune(str(tiny_llama), output=tmp_path / "of rows", allocation=row, **options | {"target": "row:0.5"})


def test_a_layer_of_sparsity_0_stays_as_it_is(tiny_llama: Path, tiny_text: Path, tmp_path: Path) -> None:
    """Whatever the update, and in the stored numbers where the model was loaded in coarser ones."""
    model = load_model(str(tiny_llama), device="cpu")
    path = write(tmp_path / "a.json", mixed(model, "row"))
    options = {"calibration": str(tiny_text), "metric": "sparsegpt", "dtype": "bfloat16", "allocation": path} | QUICK
    prune(str(tiny_llama), output=tmp_path / "out", **options)
    name = f"{model.layers[2].name}.weight"
    stored = [load_file(folder / "model.safetensors")[name] for folder in (tiny_llama, tmp_path / "out")]
    assert torch.equal(*stored)


def test_bench_measures_an_allocation(tiny_llama: Path, tiny_text: Path) -> None:
    model = load_model(str(tiny_llama), device="cpu")
    windows = windows_of(model, tiny_text, count=4)
    protocol, metric = Protocol(session_of(model, windows), one_shot=False), resolve_metric("wanda")
    protocol.prepare([metric], "none")
    names = [layer.name for layer in model.layers]
    plans = (parse_target("0.5"), uniform(names, "0.5"), mixed(model, "row"))
    plain, same, other = protocol.measure([Rule(metric, plan) for plan in plans], [windows.tokens])
    assert (plain.losses, plain.sparsity) == (same.losses, same.sparsity)
    assert plain.sparsity == 0.5
    assert other.losses != plain.losses
    assert other.sparsity == mean_sparsity(model.layers, mixed(model, "row").targets)
    assert not any((layer.weight == 0).any() for layer in model.layers)


def test_the_command(tiny_llama: Path, tiny_text: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", mixed(load_model(str(tiny_llama), device="cpu"), "row"))
    (tmp_path / "c.toml").write_text(
        f'allocation = "{path}"\ncalibration = "{tiny_text}"\ndevice = "cpu"\nsamples = 4\n'
    )
    command = ["prune", str(tiny_llama), "--config", str(tmp_path / "c.toml"), "-o", str(tmp_path / "out")]
    done = CliRunner().invoke(app, [*command, "--windows", "4", "--sequence-length", "32"])
    assert done.exit_code == 0, done.output
    assert "of 21 layers zero, allocated by a.json; perplexity" in done.output
    assert json.loads((tmp_path / "out" / MANIFEST).read_text())["allocation"]["file"] == "a.json"
