"""`gpmetric allocate` from end to end, on tiny random models."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from gpmetric.allocation.allocate import allocate
from gpmetric.allocation.levels import level_table
from gpmetric.allocation.profile_transfer import transferred
from gpmetric.allocation.time_plan import TimePlan
from gpmetric.errors import GpmetricError, InputError
from gpmetric.loading import load_model
from gpmetric.pruning.allocation import Allocation
from gpmetric.pruning.prune import prune
from gpmetric.targets import parse_target

SMALL: dict[str, Any] = {"samples": 4, "search_windows": 8, "windows": 4, "sequence_length": 32, "evaluations": 40}


def run(model: Path, text: Path, **options: Any) -> dict[str, Any]:
    return allocate(str(model), calibration=str(text), device="cpu", **SMALL | options)


def budget(model: Path, target: str) -> int:
    layers = load_model(str(model), device="cpu").layers
    return sum(parse_target(target).removes(layer.weight.shape) for layer in layers)


@pytest.mark.parametrize("granularity", ["row", "layer", "block"])
def test_the_pick_has_the_budget_of_the_uniform_mask(granularity: str, tiny_gpt2: Path, tiny_text: Path) -> None:
    found = run(tiny_gpt2, tiny_text, sparsity=0.57, granularity=granularity)
    prefix = "" if granularity == "row" else f"{granularity}:"
    slack = {"row": 128, "layer": 1, "block": 1}[granularity]  # comparison groups of the largest matrix
    assert abs(found["picked"]["removed"] - budget(tiny_gpt2, f"{prefix}0.57")) <= slack
    assert found["allocation"]["granularity"] == granularity


def test_the_document_holds_the_contract(tiny_llama: Path, tiny_text: Path) -> None:
    found = run(tiny_llama, tiny_text, sparsity=0.6)
    assert found["evaluations"] <= SMALL["evaluations"]
    assert all({"sparsity", "loss", "genes"} <= point.keys() for point in found["front"])
    losses = [(point["sparsity"], point["loss"]) for point in found["front"]]
    assert losses == sorted(losses)
    assert all(first[1] < second[1] for first, second in pairwise(losses))
    assert all(0.38 <= point["sparsity"] <= 0.82 for point in found["front"])
    assert all(area > 0 for area in found["hypervolume"])
    assert found["picked"]["kept_total"] - found["picked"]["kept_prunable"] == found["total"] - found["prunable"]
    assert json.loads(json.dumps(found["allocation"]))["version"] == 1


def test_prune_gives_the_loss_that_allocate_told(tiny_llama: Path, tiny_text: Path, tmp_path: Path) -> None:
    """One-shot pruning by the file is what a search measures."""
    parts = [tmp_path / f"{name}.txt" for name in ("c", "s", "v")]
    lines = tiny_text.read_text().splitlines(keepends=True)
    for index, part in enumerate(parts):
        part.write_text("".join(lines[index::3]))
    calibration, search, validation = map(str, parts)
    found = allocate(
        str(tiny_llama), calibration=calibration, search=search, validation=validation, sparsity=0.6, **SMALL
    )
    file = tmp_path / "allocation.json"
    file.write_text(json.dumps(found["allocation"]))
    pruned = prune(
        str(tiny_llama), output=tmp_path / "pruned", calibration=calibration, text=validation, target="0.6",
        allocation=file, one_shot=True, samples=4, windows=4, sequence_length=32,
    )  # fmt: skip
    assert pruned["perplexity"] == pytest.approx(found["picked"]["perplexity"], rel=1e-3)


def test_a_rule_delivers_its_own_allocation(tiny_llama: Path, tiny_text: Path) -> None:
    found = run(tiny_llama, tiny_text, sparsity=0.61, allocator="uniform")
    sparsities = list(found["allocation"]["sparsity"].values())
    assert np.ptp(sparsities) < 0.1
    assert found["allocator"] == "uniform"


def test_a_block_model_part_has_rules_of_its_own(tiny_llama: Path, tiny_text: Path) -> None:
    """Blocks without a layer count for nothing: one block left has no progression."""
    found = run(tiny_llama, tiny_text, sparsity=0.6, include=r"layers\.1\.", allocator="arithmetic")
    assert np.ptp(list(found["allocation"]["sparsity"].values())) < 0.1


def test_a_loss_ratio_of_a_mix_of_patterns(save_model: Any, tiny_text: Path) -> None:
    model = save_model(
        "llama", hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    found = run(model, tiny_text, max_loss_ratio=50.0, granularity="n:m")
    assert found["error"] is None
    assert set(found["allocation"]["pattern"].values()) <= {"dense", "4:8", "2:4", "1:4"}
    with pytest.raises(InputError, match="--patterns are the levels of --granularity n:m"):
        run(model, tiny_text, patterns=("dense", "2:4"))
    with pytest.raises(InputError, match="out of reach"):
        run(model, tiny_text, sparsity=0.9, granularity="n:m")
    lost = run(model, tiny_text, sparsity=0.62, granularity="n:m", genes="block")  # three blocks have no such sum
    assert lost["picked"] is None
    assert "no allocation has sparsity 0.62" in lost["error"]
    assert lost["front"]


@pytest.mark.slow
def test_the_same_front_after_a_kill(tiny_llama: Path, tiny_text: Path, tmp_path: Path) -> None:
    ledger = tmp_path / "a.jsonl"
    whole = run(tiny_llama, tiny_text, sparsity=0.6, ledger=str(ledger))
    with pytest.raises(InputError, match="exists"):
        run(tiny_llama, tiny_text, sparsity=0.6, ledger=ledger)
    content = ledger.read_bytes()
    ledger.write_bytes(content[: len(content) // 2])
    again = run(tiny_llama, tiny_text, sparsity=0.6, ledger=ledger, resume=True)
    other = run(tiny_llama, tiny_text, sparsity=0.7, ledger=ledger, resume=True)
    volatile = {"seconds", "seconds_by_step", "after_search"}
    assert {key: whole[key] for key in whole.keys() - volatile} == {key: again[key] for key in again.keys() - volatile}
    assert other["front"] == whole["front"]
    assert other["picked"]["sparsity"] > 0.68


def test_a_model_without_a_loss_is_refused(tiny_llama: Path, tiny_text: Path, tmp_path: Path) -> None:
    for file in tiny_llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.norm.weight"] *= 60000
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(GpmetricError, match="not finite"):
        run(tmp_path, tiny_text, sparsity=0.6, dtype="float16")


def test_profiles_move_by_relative_depth(tiny_llama: Path) -> None:
    """A profile of the same model is what it says, layers left out or not; a deeper one is read between its blocks."""
    names = [f"model.layers.{block}.{kind}" for block in range(5) for kind in ("self_attn.q_proj", "mlp.up_proj")]
    values = [0.1 * (1 + index // 2) + 0.05 * (index % 2) for index in range(10)]
    targets = {name: parse_target(str(value)) for name, value in zip(names, values, strict=True)}
    deeper = Allocation("row", targets)
    model = load_model(str(tiny_llama), device="cpu", include="q_proj|up_proj")
    table = level_table(model, "row")
    assert transferred(deeper, table, 3) == pytest.approx([0.1, 0.15, 0.3, 0.35, 0.5, 0.55])
    part = load_model(str(tiny_llama), device="cpu", include=r"layers\.[01]\..*(q_proj|up_proj)")
    same = Allocation("row", {name: target for name, target in targets.items() if int(name.split(".")[2]) < 3})
    assert transferred(same, level_table(part, "row"), 3) == pytest.approx([0.1, 0.15, 0.2, 0.25])


@pytest.mark.slow
def test_a_search_begins_with_profiles(tiny_llama: Path, tiny_text: Path, tmp_path: Path) -> None:
    first = run(tiny_llama, tiny_text, sparsity=0.6, seed=1)
    file = tmp_path / "first.json"
    file.write_text(json.dumps(first["allocation"]))
    again = run(tiny_llama, tiny_text, sparsity=0.6, init=str(file))
    assert again["picked"]["removed"] == pytest.approx(first["picked"]["removed"], abs=64)
    with pytest.raises(InputError, match="--init needs --allocator nsga2"):
        run(tiny_llama, tiny_text, sparsity=0.6, init=str(file), allocator="owl")


def test_a_search_of_one_sparsity_is_not_gone_on_with_at_another(
    tiny_llama: Path, tiny_text: Path, tmp_path: Path
) -> None:
    options = {"allocator": "evopress", "ledger": tmp_path / "a.jsonl", "resume": True}
    first = run(tiny_llama, tiny_text, sparsity=0.6, **options)
    assert run(tiny_llama, tiny_text, sparsity=0.6, **options)["picked"] == first["picked"]
    with pytest.raises(InputError, match=r"another search's: searched is 0.6 there, 0.7 here"):
        run(tiny_llama, tiny_text, sparsity=0.7, **options)


@pytest.mark.slow
def test_probes_have_half_of_the_minutes_at_most(
    tiny_llama: Path, tiny_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """4 probes for each of 21 matrices, which the baseline has all the same."""
    assert run(tiny_llama, tiny_text, evaluations=200, minutes=60)["evaluations"] >= 4 * 21
    monkeypatch.setattr(TimePlan, "search_minutes", lambda _: 1e-6)
    short = run(tiny_llama, tiny_text, evaluations=None, minutes=60)
    assert short["evaluations"] < 4 * 21
    assert short["after_search"]["evaluations"] >= 4 * 21


@pytest.mark.slow
def test_a_loss_ratio_picks_no_less_than_the_front_has() -> None:
    """Whatever the ratio, here just above each member's; the demo model, since random ones gain from pruning."""
    options = {**SMALL, "genes": "block", "device": "cpu"}
    whole = allocate(sparsity=0.6, **options)
    asked = [ratio for one in whole["front"] if (ratio := one["loss"] / whole["dense"]["loss"] + 1e-6) > 1]
    assert asked
    for ratio in asked[:: -(-len(asked) // 2)]:
        found = allocate(max_loss_ratio=ratio, **options)
        within = [one for one in found["front"] if one["loss"] <= ratio * found["dense"]["loss"]]
        assert found["picked"]["sparsity"] >= max((one["sparsity"] for one in within), default=0)
        assert found["picked"]["loss"] <= ratio * found["dense"]["loss"]


def test_a_rule_picks_its_own_knee(tiny_llama: Path, tiny_text: Path) -> None:
    found = run(tiny_llama, tiny_text, allocator="owl")
    assert found["picked"] == found["front"][found["knee"] or len(found["front"]) // 2]


def test_memory_is_asked_for_before_the_calibration(tiny_llama: Path, tiny_text: Path) -> None:
    with pytest.raises(InputError, match=r"needs at least .* of 8\.28e-05 GB allowed by --memory"):
        run(tiny_llama, tiny_text, sparsity=0.6, memory="90KB")


def test_a_ledger_is_no_directory(tiny_llama: Path, tiny_text: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a directory"):
        run(tiny_llama, tiny_text, sparsity=0.6, ledger=tmp_path)


def test_nothing_measured_in_the_range(tiny_llama: Path, tiny_text: Path) -> None:
    """One matrix with the levels 0, 1/2 and 3/4."""
    with pytest.raises(GpmetricError, match=r"a sparsity between --lowest 0.6 and --highest 0.7"):
        run(tiny_llama, tiny_text, include=r"layers\.0\.mlp\.up_proj", granularity="n:m", lowest=0.6, highest=0.7)
