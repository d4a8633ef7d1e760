"""Whole experts removed: what is written, against the dense model whose router may not choose them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from gpmetric.errors import GpmetricError
from gpmetric.files import read_object
from gpmetric.loading import load_model
from gpmetric.pruning.verify import verify
from gpmetric.structured.groups import find_groups
from gpmetric.structured.mixtures import ROUTERS
from gpmetric.structured.open_units import open_units
from gpmetric.structured.request import SlimRequest
from gpmetric.structured.scores import UnitSession, unit_scores
from gpmetric.structured.slim import slim
from gpmetric.terminal.tables import print_slim
from tests.mixtures import MIXTURES, save_mixture

SMALL: dict[str, Any] = {
    "granularity": "expert", "sparsity": 0.25, "samples": 4, "search_windows": 8, "windows": 2, "sequence_length": 32,
    "batch": 2, "device": "cpu",
}  # fmt: skip
EIGHT = {"num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8}
GROUPED = {"n_group": 2, "topk_group": 1}
MORE: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_hidden_layers": 3, "mlp_only_layers": [2]},
    "deepseek_v2": GROUPED | {"topk_method": "group_limited_greedy", "first_k_dense_replace": 1},
    "deepseek_v3": GROUPED | {"num_hidden_layers": 3},
    "glm4_moe": GROUPED | {"head_dim": 8},
}


def config_of(kind: str) -> dict[str, Any]:
    """Of a mixture of eight experts."""
    base = MIXTURES.get(kind, MIXTURES["deepseek_v3"])
    return {name: EIGHT.get(name, value) for name, value in base.items()} | MORE.get(kind, {})


@pytest.fixture(scope="module")
def mixture(save_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes a random mixture of an architecture once, corrections of its scores included."""
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            folder = made[kind] = save_mixture(save_model, kind, **config_of(kind))
            path = folder / "model.safetensors"
            state = load_file(path)
            for name, one in state.items():
                if name.endswith("e_score_correction_bias"):
                    state[name] = torch.linspace(-0.3, 0.3, len(one))[torch.randperm(len(one))]
            save_file(state, path, metadata={"format": "pt"})
        return made[kind]

    return make


def run(folder: Path, text: Path, output: Path, **options: Any) -> dict[str, Any]:
    return slim(str(folder), output=output, calibration=str(text), **SMALL | {"steps": 0} | options)


def opened(folder: Path) -> tuple[Any, dict[str, Any]]:
    """As stock transformers opens it, and what it says of the weights."""
    from transformers import AutoModelForCausalLM

    found: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    return found[0].eval(), found[1]


def routers(module: Any) -> list[Any]:
    """Of each block of stock transformers' model that has one."""
    found = [getattr(layer.mlp, "gate", None) or getattr(layer.mlp, "router", None) for layer in module.model.layers
             if hasattr(layer, "mlp")]  # fmt: skip
    found = found or [layer.block_sparse_moe.router for layer in module.model.layers]
    return [one for one in found if getattr(one, "num_experts", None)]


@contextmanager
def forbidden(module: Any, removed: Sequence[Sequence[int]], patch: pytest.MonkeyPatch) -> Iterator[None]:
    """The dense model, logits of removed experts being -inf wherever a router computes them, and corrections, too."""
    own = functional.linear
    gone = {id(router.weight): mine for router, mine in zip(routers(module), removed, strict=True)}
    for router, mine in zip(routers(module), removed, strict=True):
        if hasattr(router, "e_score_correction_bias"):
            router.e_score_correction_bias[mine] = -torch.inf

    def linear(states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        found = own(states, weight, bias)
        if id(weight) in gone:
            found[..., gone[id(weight)]] = -torch.inf
        return found

    with patch.context() as changed:
        changed.setattr(functional, "linear", linear)
        yield


@pytest.mark.every(3)
@pytest.mark.parametrize("kind", ROUTERS)
@pytest.mark.usefixtures("here")
def test_what_is_written_is_the_dense_model_that_may_not_choose_them(
    kind: str, mixture: Any, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, output = mixture(kind), tmp_path / "fewer"
    found = run(folder, tiny_text, output, start="random", seed=3)
    dense, _ = opened(folder)
    module, info = opened(output)
    assert not any(info.values()), info
    mixed = [one for one in found["widths"] if one["experts"]]
    assert len(mixed) == len(routers(dense)) < len(found["widths"]) + (kind not in MORE)
    assert all(one["experts"] == 6 and len(one["removed"]) == 2 for one in mixed)
    assert all(router.weight.shape[0] == router.num_experts == 6 for router in routers(module))
    before, after = (sum(one.numel() for one in each.parameters()) for each in (dense, module))
    assert (before, after) == (found["parameters_before"], found["parameters_after"])
    inside = sum(one.numel() for one in dense.model.layers.parameters())
    assert found["sparsity"] == pytest.approx((before - after) / inside)
    tokens = torch.arange(40).view(2, 20) + 3
    with torch.no_grad():
        logits = module(tokens).logits
        assert not torch.allclose(dense(tokens).logits, logits, atol=1e-3)
        with forbidden(dense, [one["removed"] for one in mixed], monkeypatch):
            expected = dense(tokens).logits
    assert torch.allclose(logits, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))
    checked = verify(output, device="cpu")
    assert checked["ok"], checked["problems"]
    assert checked["perplexity"] == pytest.approx(found["perplexity"], rel=1e-5)
    told = Console(file=StringIO(), width=200)
    print_slim(told, found, SlimRequest(granularity=("expert",)))
    for index, one in enumerate(found["widths"]):
        row = rf"{index} .* {one['experts']} .* {' '.join(map(str, one['removed']))} "
        assert re.search(row, told.file.getvalue())
    assert "removed (0.25 of the experts asked for)" in told.file.getvalue()
    manifest = read_object(output / "gpmetric_manifest.json")
    assert (manifest["widths"], manifest["granularity"], manifest["format"]) == (found["widths"], ["expert"], "uniform")


def session_of(folder: Path, text: Path, **options: Any) -> UnitSession:
    told = {"search_windows": 4, "samples": 4, "sequence_length": 32, "windows": 2, "device": "cpu"} | options
    return open_units(SlimRequest(model=str(folder), calibration=str(text), granularity=("expert",), **told))


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss"])
def test_reap_and_frequency_by_hand(kind: str, mixture: Any, tiny_text: Path) -> None:
    """From what stock transformers' routers choose, and its experts asked for one expert's output at a time."""
    units = session_of(mixture(kind), tiny_text)
    tokens = units.session.tokens
    module, _ = opened(mixture(kind))
    owners = [
        one for one in module.modules() if getattr(one, "down_proj", None) is not None and hasattr(one, "num_experts")
    ]
    seen: list[tuple[Any, Tensor, Tensor, Tensor]] = []
    for owner in owners:
        owner.register_forward_pre_hook(lambda owner, args: seen.append((owner, *args)))
    with torch.no_grad():
        module.model(tokens)
        reap, share = [], []
        for owner, states, chosen, weights in seen[: len(owners)]:
            for expert in range(8):
                token, place = (chosen == expert).nonzero(as_tuple=True)
                alone = torch.full((len(states), 1), expert)
                outputs = type(owner).forward(owner, states, alone, torch.ones(len(states), 1))
                terms = [float(weights[t, p] * outputs[t].norm()) for t, p in zip(token, place, strict=True)]
                reap.append(sum(terms) / max(1, len(terms)))
                share.append(len(terms) / tokens.numel())
    assert unit_scores("reap", units).tolist() == pytest.approx(reap, rel=1e-4)
    assert unit_scores("frequency", units).tolist() == pytest.approx(share)
    per_block = unit_scores("frequency", units).view(-1, 8).sum(dim=1).tolist()
    assert per_block == pytest.approx([2.0] * len(per_block))  # experts of a token


def test_a_formula_scores_the_output_layer_of_an_expert(mixture: Any, tiny_text: Path) -> None:
    units = session_of(mixture("qwen3_moe"), tiny_text)
    down = opened(mixture("qwen3_moe"))[0].model.layers[0].mlp.experts.down_proj  # [experts, out, in]
    for name, expected in (("abs(W)", down.abs()), ("magnitude_sp", down.square())):
        by_hand = expected.double().sum(dim=1).mean(dim=1).tolist()
        assert unit_scores(name, units)[:8].tolist() == pytest.approx(by_hand, rel=1e-5)


def test_noise_is_the_seeds(mixture: Any, tiny_text: Path) -> None:
    for seed in (0, 1):
        drawn = torch.rand(16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        assert torch.equal(unit_scores("random", session_of(mixture("mixtral"), tiny_text, seed=seed)), drawn)


@pytest.mark.usefixtures("here")
def test_the_least_frequent_go(mixture: Any, tiny_text: Path, tmp_path: Path) -> None:
    """By the scores, block by block, and group by group where the router chooses groups first."""
    for kind, groups in (("olmoe", 1), ("deepseek_v3", 2)):
        folder = mixture(kind)
        units = session_of(folder, tiny_text, search_windows=8)
        found = run(folder, tiny_text, tmp_path / kind, start="frequency")
        scores = unit_scores("frequency", units).view(-1, groups, 8 // groups)
        lowest = scores.argsort(dim=-1, stable=True)[..., : 2 // groups]
        lowest = (lowest + torch.arange(groups)[:, None] * (8 // groups)).flatten(1).sort(dim=1).values
        assert [one["removed"] for one in found["widths"] if one["experts"]] == lowest.tolist()


@pytest.mark.usefixtures("here")
def test_a_search_keeps_the_number_of_every_group(mixture: Any, tiny_text: Path, tmp_path: Path) -> None:
    """Also at every report; the ledger says how many stay, and it goes on to the same."""
    options: dict[str, Any] = {"steps": 30, "ledger": tmp_path / "l.jsonl", "start": "random"}
    found = run(mixture("deepseek_v3"), tiny_text, tmp_path / "fewer", **options)
    assert found["steps"] == 30
    told = [found["widths"]] + [line["experts"] for line in found["progress"] if "experts" in line]
    assert len(told) == 3
    for widths in told:
        assert widths[0] == {"experts": 0, "removed": []}
        for one in widths[1:]:
            assert [sum(expert // 4 == group for expert in one["removed"]) for group in (0, 1)] == [1, 1]
    header = json.loads((tmp_path / "l.jsonl").read_text().splitlines()[0])
    assert '"kept": 6' in json.dumps(header)
    again = run(mixture("deepseek_v3"), tiny_text, tmp_path / "again", resume=True, **options)
    assert again["widths"] == found["widths"]


@pytest.mark.usefixtures("here")
def test_the_best_start_is_written(mixture: Any, tiny_text: Path, tmp_path: Path) -> None:
    found = run(mixture("mixtral"), tiny_text, tmp_path / "fewer")
    assert set(found["starts"]) == {"reap", "frequency", "wanda_sp", "magnitude_sp"}
    assert found["begun"] == min(found["starts"], key=found["starts"].__getitem__)
    assert (found["steps"], found["share"], found["repair"], found["initial"]) == (0, 0.0, "none", found["found"])
    assert not any("search" in line for line in found["warnings"])


@pytest.mark.usefixtures("here")
def test_dtypes_and_names_of_the_files_stay(mixture: Any, tiny_text: Path, tmp_path: Path) -> None:
    """Weights in bfloat16, corrections in float32, the number under the config's own name; slimmed once more."""
    source, output = tmp_path / "dense", tmp_path / "fewer"
    kind = mixture("glm4_moe")
    source.mkdir()
    for path in kind.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    state = {
        name: one if name.endswith("correction_bias") else one.bfloat16()
        for name, one in load_file(source / "model.safetensors").items()
    }
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    settings = read_object(source / "config.json")
    settings["num_experts"] = settings.pop("n_routed_experts")
    settings["num_local_experts"] = settings["num_experts"]
    (source / "config.json").write_text(json.dumps(settings | {"dtype": "bfloat16"}))
    found = run(source, tiny_text, output, start="reap")
    written = read_object(output / "config.json")
    assert (written["n_routed_experts"], written["num_experts"], written["num_local_experts"]) == (6, 6, 6)
    stored = load_file(output / "model.safetensors")
    removed = found["widths"][1]["removed"]
    stays = [expert for expert in range(8) if expert not in removed]
    assert {one.dtype for name, one in stored.items() if "correction" not in name} == {torch.bfloat16}
    for name in ("gate.weight", "gate.e_score_correction_bias"):
        name = f"model.layers.1.mlp.{name}"
        assert stored[name].dtype == state[name].dtype
        assert torch.equal(stored[name], state[name][stays])
    for new, old in enumerate(stays):
        for name in ("gate_proj", "up_proj", "down_proj"):
            new_name, old_name = (f"model.layers.1.mlp.experts.{index}.{name}.weight" for index in (new, old))
            assert torch.equal(stored[new_name], state[old_name])
    assert "model.layers.1.mlp.experts.6.up_proj.weight" not in stored
    again = run(output, tiny_text, tmp_path / "still fewer", start="reap", sparsity=1 / 3)
    assert again["widths"][1]["experts"] == 4


@pytest.mark.usefixtures("here")
def test_verify_finds_another_number(mixture: Any, tiny_text: Path, tmp_path: Path) -> None:
    run(mixture("qwen3_moe"), tiny_text, tmp_path / "fewer", start="reap")
    path = tmp_path / "fewer" / "model.safetensors"
    state = load_file(path)
    name = "model.layers.0.mlp.experts.5.up_proj.weight"
    assert name in state
    save_file(state | {name.replace("experts", "unused"): state[name].clone()}, path, metadata={"format": "pt"})
    problems = verify(tmp_path / "fewer", device="cpu")["problems"]
    assert any("unused.5.up_proj.weight is not used by the model" in one for one in problems)
    assert not any(f"{name} is not used" in one for one in problems)


def test_experts_that_no_token_reaches_are_told(mixture: Any, tiny_text: Path, tmp_path: Path) -> None:
    source = tmp_path / "dense"
    source.mkdir()
    for path in mixture("gpt_oss").iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    state = load_file(source / "model.safetensors")
    state["model.layers.0.mlp.router.bias"][3] = -1e4
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    found = run(source, tiny_text, tmp_path / "fewer", start="reap")
    assert 3 in found["widths"][0]["removed"]
    assert any("no calibration token reaches 1 of 16 experts" in one for one in found["warnings"])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"granularity": "expert,head"}, "--granularity expert,head: whole experts go alone"),
        ({"format": "hetero"}, "--format hetero cannot hold fewer; accepted is uniform"),
        ({"format": "padded"}, "--format padded cannot hold fewer; accepted is uniform"),
        ({"estimator": "rloo"}, "--estimator rloo draws models .* unequal numbers of experts; accepted is exchange"),
        ({"budget": "kind"}, "--budget and --cost do not apply"),
        ({"add_bias": True}, "--granularity expert repairs nothing"),
        ({"start": "taylor2"}, "--start taylor2 tells no experts apart.* reap, frequency"),
        ({"start": "reap", "granularity": "channel"}, "--start reap tells experts only apart.* taylor2"),
        (
            {"sparsity": 0.1},
            "--sparsity 0.1 cannot be met .* of 8 experts of a block, the least that goes is 1, a share",
        ),
        ({"sparsity": 0.9}, "--sparsity 0.9 is out of reach: of 8 experts of a block, 2 stay .* at most 0.75 can go"),
        (
            {"granularity": "channel"},
            r"qwen3_moe model, whose channels .*; its experts can go \(--granularity expert\)",
        ),
    ],
)
def test_bad_input(options: dict[str, Any], told: str, mixture: Any, tiny_text: Path, tmp_path: Path) -> None:
    with pytest.raises(GpmetricError, match=told):
        run(mixture("qwen3_moe"), tiny_text, tmp_path / "fewer", **options)
    assert not list(tmp_path.iterdir())


def test_groups_keep_what_their_router_looks_at(mixture: Any, tiny_text: Path, tmp_path: Path) -> None:
    """Two of four in each group: two are looked at to choose the group, and a token takes two of one group."""
    with pytest.raises(GpmetricError, match=r"of 8 experts of a block in 2 groups, 4 stay .* at most 0\.5 can go"):
        run(mixture("deepseek_v3"), tiny_text, tmp_path / "fewer", sparsity=0.75)
    with pytest.raises(GpmetricError, match=r"in 2 groups, the least that goes is 2, a share of 0\.25"):
        run(mixture("deepseek_v3"), tiny_text, tmp_path / "fewer", sparsity=0.2)


@pytest.mark.parametrize("kind", ["jamba", "llama4_text"])
def test_routers_that_are_not_known_are_refused(kind: str, save_model: Callable[..., Path]) -> None:
    folder = save_mixture(save_model, kind)
    with pytest.raises(GpmetricError, match=rf"is a {kind} model, of whose experts and routers nothing is known: acc"):
        find_groups(load_model(str(folder), device="cpu"), ("expert",))


def test_a_model_without_a_mixture_is_refused(save_model: Callable[..., Path]) -> None:
    folder = save_mixture(save_model, "qwen3_moe", mlp_only_layers=[0, 1])
    with pytest.raises(GpmetricError, match=r"\(qwen3_moe\) has no block with a mixture of experts"):
        find_groups(load_model(str(folder), device="cpu"), ("expert",))
