"""Recipes: written and read again, what is refused, and a model pruned by one as by its options."""

from __future__ import annotations

import json
import tomllib
from dataclasses import fields, replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gpmetric.cli import app
from gpmetric.errors import InputError
from gpmetric.loading import load_model
from gpmetric.options import make_request
from gpmetric.pruning.allocation import Allocation, layer_target
from gpmetric.pruning.output_folder import files_of
from gpmetric.pruning.prune import prune
from gpmetric.pruning.recipe import Recipe, read_recipe, write_recipe
from gpmetric.pruning.requests import PruneRequest
from gpmetric.pruning.verify import verify
from gpmetric.session.splits import open_text, read_windows
from gpmetric.targets import Target

QUICK = {"samples": 4, "sequence_length": 32}
WHOLE = 'version = 1\nmetric = "wanda"\ntarget = "0.5"\n'


def test_written_and_read_again(tmp_path: Path) -> None:
    odd = 'model."layers".0 = \\ ä\u2028'
    targets = {odd: layer_target("layer", (8, 16), 50), "plain": layer_target("layer", (8, 16), 0)}
    recipe = Recipe(
        "layer:W*W*F", "0.6", "admm", "dense", 64, 256, True, 7, r"^model\.", None, Allocation("layer", targets),
        False, "bfloat16", "bfloat16", True, "0123", "documents", "never", "body",
    )  # fmt: skip
    write_recipe(recipe, tmp_path / "recipe.toml")
    again = read_recipe(tmp_path / "recipe.toml")
    assert again == recipe
    assert again.allocation is not None
    assert again.allocation.digest == again.digest
    assert tomllib.loads(again.text or "")["allocation"]["sparsity"][odd] == targets[odd].sparsity


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (WHOLE.replace("version", "versions"), "version"),
        (WHOLE + 'upd = "admm"\n', "upd"),
        (WHOLE + 'update = "adm"\n', "accepted: none, obs"),
        (WHOLE + 'fit = "some"\n', "accepted: own, dense"),
        (WHOLE.replace('"wanda"', '"wandaa"'), "unknown metric 'wandaa'"),
        (WHOLE.replace('"0.5"', '"1.5"'), "1.5"),
        (WHOLE.replace('"0.5"', "0.5"), "target is 0.5"),
        (WHOLE + "samples = 0\n", "samples is 0"),
        (WHOLE + 'dtype = "float64"\n', "accepted: float32, bfloat16, float16"),
        (WHOLE + 'statistics_dtype = "float16"\n', "accepted: float32, bfloat16"),
        (WHOLE + 'bos = "no"\n', "bos is 'no'; accepted: auto, always, never"),
        (WHOLE + 'sampling = "rows"\n', "accepted: windows, documents"),
        (WHOLE + "seed = true\n", "seed is True"),
        (WHOLE + '[allocation]\nversion = 1\ngranularity = "rows"\n', "allocation: granularity is 'rows'"),
        ("version = ", "is no recipe"),
        ("\udcff", "is no recipe"),
    ],
)
def test_refused(tmp_path: Path, text: str, told: str) -> None:
    file = tmp_path / "recipe.toml"
    file.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InputError) as refused:
        read_recipe(file)
    assert told in str(refused.value)
    assert str(file) in str(refused.value)


OTHERS = {
    "metric": "ria", "target": "2:4", "update": "obs", "fit": "dense", "permute": True, "samples": 3,
    "sequence_length": 24, "sampling": "documents", "bos": "never", "text_column": "body", "shuffle": True, "seed": 5,
    "include": "mlp", "exclude": "attn", "dtype": "bfloat16", "statistics_dtype": "bfloat16", "one_shot": True,
}  # fmt: skip


def test_options_given_win(tmp_path: Path) -> None:
    """Each alone, also where what is given is what it would be by default."""
    write_recipe(Recipe(**OTHERS), file := tmp_path / "recipe.toml")
    assert set(OTHERS) == set(read_recipe(file).options)
    defaults = {one.name: one.default for one in fields(PruneRequest)} | {"target": "0.5", "sequence_length": 32}
    whole = make_request(PruneRequest, {"recipe": file})
    assert {name: getattr(whole, name) for name in OTHERS} == OTHERS
    for name in OTHERS:
        if defaults[name] is None:
            continue
        found = make_request(PruneRequest, {"recipe": file, name: defaults[name]})
        assert getattr(found, name) == defaults[name] != OTHERS[name]
        assert {other: getattr(found, other) for other in OTHERS if other != name} == {
            other: value for other, value in OTHERS.items() if other != name
        }
    with pytest.raises(InputError, match="--allocation cannot stand beside --recipe"):
        make_request(PruneRequest, {"recipe": file, "allocation": file})
    with pytest.raises(InputError, match=r"other\.toml"):
        make_request(PruneRequest, {"recipe": tmp_path / "other.toml"})


@pytest.mark.parametrize("way", ["line", "config"])
def test_options_given_at_their_defaults_win_on_the_command_line(way: str, tmp_path: Path) -> None:
    """And what the checkpoint holds is the recipe that it was made by; other windows are not those of the digest."""
    recipe = Recipe("wanda", "0.5", shuffle=True, seed=3, sampling="documents", bos="never", **QUICK)
    write_recipe(replace(recipe, calibration_digest="0" * 64), file := tmp_path / "recipe.toml")
    (config := tmp_path / "config.toml").write_text('bos = "auto"\nsampling = "windows"\nshuffle = false\n')
    given = ["--bos", "auto", "--sampling", "windows", "--config", str(config)]
    words = [*given[:4], "--seed", "0"] if way == "line" else given[4:]
    words += ["--recipe", str(file), "--windows", "2", "--device", "cpu", "-o", str(tmp_path / "out")]
    done = CliRunner().invoke(app, ["prune", *words, "--json", str(tmp_path / "told.json")])
    assert done.exit_code == 0, done.output
    told = json.loads((tmp_path / "told.json").read_text())
    said = {"bos": "auto", "sampling": "windows", "shuffle": way == "line", "seed": 0 if way == "line" else 3}
    assert {name: told[name] for name in said} == said
    again = read_recipe(tmp_path / "out" / "recipe.toml")
    assert again == replace(recipe, **said, calibration_digest=None)
    assert told["recipe"]["sha256"] == again.digest != read_recipe(file).digest
    prune(recipe=tmp_path / "out" / "recipe.toml", output=tmp_path / "b", windows=2, device="cpu")
    written = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "b")]
    assert written[0] == written[1]


def test_prunes_as_its_options_do(tmp_path: Path) -> None:
    model = load_model(None)
    halves = [layer.weight.numel() // 2 for layer in model.layers]
    removed = {layer.name: half for layer, half in zip(model.layers, halves, strict=True)}
    removed |= {model.layers[0].name: halves[0] - 100, model.layers[-1].name: halves[-1] + 100}
    targets = {layer.name: layer_target("layer", layer.weight.shape, removed[layer.name]) for layer in model.layers}
    write_recipe(
        Recipe("layer:abs(W)*X", "0.5", "obs", "dense", 4, 32, allocation=Allocation("layer", targets)),
        file := tmp_path / "mine.toml",
    )
    made = prune(recipe=file, output=tmp_path / "a", windows=4, device="cpu")
    assert made["recipe"]["sha256"] == made["allocation"]["sha256"] == read_recipe(file).digest
    assert (tmp_path / "a" / "recipe.toml").read_text() == file.read_text()
    assert {layer["name"]: layer["zeros"] for layer in made["layers"]} == removed
    again = prune(recipe=tmp_path / "a" / "recipe.toml", output=tmp_path / "b", windows=4, device="cpu")
    assert again["perplexity"] == made["perplexity"]
    assert verify(str(tmp_path / "b"), device="cpu")["ok"]
    plain = Recipe("wanda", "0.5", **QUICK)
    write_recipe(plain, file)
    by_recipe = prune(recipe=file, output=tmp_path / "c", windows=4, device="cpu")
    by_options = prune(metric="wanda", target="0.5", **QUICK, output=tmp_path / "d", windows=4, device="cpu")
    assert by_recipe["perplexity"] == by_options["perplexity"]
    assert "recipe" not in by_options
    written = [(tmp_path / name / "model.safetensors").read_bytes() for name in "cd"]
    assert written[0] == written[1]
    assert "recipe.toml" not in files_of(tmp_path / "d")


def test_what_determines_the_weights_is_in_it(tiny_llama: Path, tiny_text: Path, tmp_path: Path) -> None:
    """Dtypes and protocol as the options have them; and no other calibration windows than those that it names."""
    windows = read_windows(load_model(str(tiny_llama)), open_text(str(tiny_text)), 32, 4)
    recipe = Recipe(
        "layer:W*W*F", "0.5", dtype="bfloat16", statistics_dtype="bfloat16", one_shot=True,
        calibration_digest=windows.tokens_digest, **QUICK,
    )  # fmt: skip
    write_recipe(recipe, file := tmp_path / "mine.toml")
    options = {"calibration": str(tiny_text), "windows": 4, "device": "cpu"}
    made = prune(str(tiny_llama), recipe=file, output=tmp_path / "a", **options)
    assert (made["dtype"], made["statistics_dtype"], made["protocol"]) == ("bfloat16", "bfloat16", "one-shot")
    said = {"metric": "layer:W*W*F", "dtype": "bfloat16", "statistics_dtype": "bfloat16", "one_shot": True, **QUICK}
    prune(str(tiny_llama), output=tmp_path / "b", **options, **said)
    written = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert written[0] == written[1]
    (other := tmp_path / "other.txt").write_text(tiny_text.read_text()[1:])
    with pytest.raises(InputError, match=f"{windows.tokens_digest[:12]}: take the text"):
        prune(str(tiny_llama), recipe=file, output=tmp_path / "c", **options | {"calibration": str(other)})
    assert not (tmp_path / "c").exists()


def test_a_perplexity_on_the_text_of_the_calibration_is_said_to_be_that(tmp_path: Path) -> None:
    words = ["prune", "--samples", "2", "--windows", "2", "--sequence-length", "32", "--device", "cpu", "-o"]
    same = CliRunner().invoke(app, [*words, str(tmp_path / "a")])
    other = CliRunner().invoke(app, [*words, str(tmp_path / "b"), "--text", "demo:test"])
    assert "on demo:calibration, the text of the calibration (--text); verified" in same.output
    assert "on demo:test; verified" in other.output


@pytest.mark.parametrize(("metric", "update", "target", "group"), [
    ("sparsegpt", "obs-blockwise", "0.5", "block"),
    ("layer:abs(W)*X", "none", "row:0.5", "row"),
    ("W*W*X", "admm", "layer:0.5", "layer"),
])  # fmt: skip
def test_an_allocation_in_the_group_that_is_used(
    tiny_llama: Path, tiny_text: Path, tmp_path: Path, metric: str, update: str, target: str, group: str
) -> None:
    """The updater's own group, or the target's, whatever that of the metric."""
    layers = load_model(str(tiny_llama)).layers
    targets = {layer.name: Target("", group, 0.5) for layer in layers}
    allocation = Allocation(group, {
        name: layer_target(group, layer.weight.shape, one.removed(one.groups(layer.weight.shape)[0][1]))
        for layer, (name, one) in zip(layers, targets.items(), strict=True)
    })  # fmt: skip
    write_recipe(Recipe(metric, target, update, allocation=allocation, **QUICK), file := tmp_path / "recipe.toml")
    made = prune(str(tiny_llama), calibration=str(tiny_text), recipe=file, output=tmp_path / "out", windows=4)
    assert made["sparsity"] == pytest.approx(0.5, abs=0.02)
