"""The bench: its document, its protocols, and the perplexities that the original authors' own code gives."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from gpmetric.calibration import collect
from gpmetric.errors import DataError, ExpressionError, InputError, ModelError
from gpmetric.loading import load_model
from gpmetric.metrics import BASELINES, resolve_metric
from gpmetric.pruning.bench import (
    BenchListener,
    BenchRow,
    bench,
    bench_failures,
    bench_rows,
    first_failure,
)
from gpmetric.pruning.protocol import Measured, Protocol, Rule, check_targets
from gpmetric.pruning.win_loss import win_loss
from gpmetric.session import session as session_module
from gpmetric.session.evaluate import evaluate
from gpmetric.targets import parse_target
from tests.pruning_helpers import session_of, windows_of


def run(model: Path | Sequence[Path], sample: Path, **options: Any) -> dict[str, Any]:
    defaults: dict[str, Any] = {
        "calibration": str(sample),
        "text": [str(sample)],
        "sequence_length": 32,
        "device": "cpu",
    }
    models = str(model) if isinstance(model, Path) else [str(one) for one in model]
    return bench(models, **(defaults | {"samples": 8, "windows": 6} | options))


def test_the_document(tiny_llama: Path, tiny_text: Path) -> None:
    """Every key of the contract; asked for twice is measured once; names are the strings that were given."""
    texts = [str(tiny_text), f"{tiny_text.parent}/./{tiny_text.name}"]
    metrics = ["wanda", "abs(W) * X**0.5", "wanda", "abs(W)*X**0.5"]
    targets = ["0.50", "2:4", "0.5", "2:4", "layer:0.5"]
    result = run(tiny_llama, tiny_text, text=[*texts, texts[0]], metric=metrics, target=targets)
    assert list(result["dense"]) == texts
    assert result["dense"][texts[0]] == pytest.approx(result["dense"][texts[1]])
    pairs = [(row["metric"], row["target"]) for row in result["results"]]
    names = list(dict.fromkeys(metrics))
    assert pairs == [(metric, target) for target in dict.fromkeys(targets) for metric in names]
    for row in result["results"]:
        told = {"metric", "target", "update", "formula", "ppl", "seconds", "sparsity", "error", "fit", "permuted"}
        assert row.keys() == told
        assert list(row["ppl"]) == texts
        assert (row["update"], row["fit"]) == ("none", "own")
        assert row["sparsity"] == pytest.approx(parse_target(row["target"]).sparsity, abs=1e-9)
        assert row["seconds"] > 0
        assert all(ppl > 1 for ppl in row["ppl"].values())
    assert result["model"] == str(tiny_llama)
    assert (result["dtype"], result["device"], result["seed"]) == ("float32", "cpu", 0)
    assert (result["protocol"], result["sequence_length"], result["shuffle"]) == ("sequential", 32, False)
    assert result["calibration"]["windows"] == 8
    assert result["calibration"]["tokens"] == 8 * 32
    assert result["warnings"] == []
    assert [part["windows"] for part in result["texts"]] == [6, 6]
    assert result.keys() == {
        "model", "dtype", "device", "protocol", "sequence_length", "seed", "shuffle", "calibration", "texts", "layers",
        "statistics_dtype", "dense", "warnings", "results", "versions", "bos", "sampling", "text_column", "left_out",
    }  # fmt: skip
    assert {"gpmetric", "torch", "transformers", "python"} <= result["versions"].keys()
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_dense_is_what_evaluate_says_and_nothing_pruned_is_dense(tiny_llama: Path, tiny_text: Path) -> None:
    result = run(tiny_llama, tiny_text, metric=["wanda"], target=["0"])
    alone = evaluate(str(tiny_llama), text=[str(tiny_text)], sequence_length=32, windows=6, device="cpu")
    assert result["dense"] == alone["ppl"]
    assert result["results"][0]["ppl"] == alone["ppl"]
    assert result["results"][0]["sparsity"] == 0


@pytest.mark.parametrize("one_shot", [False, True])
def test_every_baseline_with_every_kind_of_target(tiny_gpt2: Path, tiny_text: Path, one_shot: bool) -> None:
    """All baselines when none is named; the sparsity reached is the target's, exactly, group by group."""
    targets = ["0.5", "0.3", "row:0.3", "layer:0.6", "2:4", "3:4"]
    result = run(tiny_gpt2, tiny_text, target=targets, one_shot=one_shot, samples=4, windows=2)
    assert result["protocol"] == ("one-shot" if one_shot else "sequential")
    assert len(result["results"]) == len(BASELINES) * len(targets)
    shapes = [layer.weight.shape for layer in load_model(str(tiny_gpt2), device="cpu").layers]
    total = sum(shape.numel() for shape in shapes)
    for row in result["results"]:
        target = parse_target(row["target"])
        by_row = row["metric"] != "sparsegpt" and target.granularity in (
            ("row",) if row["metric"] in ("magnitude", "alps") else ("row", None)
        )
        removed = sum(
            rows * int(columns * target.sparsity) if by_row else int(rows * columns * target.sparsity)
            for rows, columns in shapes
        )
        assert row["sparsity"] == removed / total, row
        assert row["update"] == {"sparsegpt": "obs-blockwise", "alps": "admm"}.get(row["metric"], "none")
        assert math.isfinite(row["ppl"][str(tiny_text)])


def test_a_name_is_its_formula(tiny_llama: Path, tiny_text: Path) -> None:
    result = run(tiny_llama, tiny_text, metric=["wanda", "abs(W)*X", "magnitude_row", "abs(W)"], target=["0.5"])
    ppl = {row["metric"]: row["ppl"] for row in result["results"]}
    assert ppl["wanda"] == ppl["abs(W)*X"]
    assert ppl["magnitude_row"] == ppl["abs(W)"]
    assert ppl["wanda"] != ppl["magnitude_row"]


def test_updates_and_protocols_differ(tiny_llama: Path, tiny_text: Path) -> None:
    """Eight ways to prune by one metric; the update is written in the row."""
    found = {}
    for one_shot in (False, True):
        for update in ("none", "obs", "obs-blockwise", "admm"):
            result = run(tiny_llama, tiny_text, metric=["wanda"], target=["0.5"], update=update, one_shot=one_shot)
            [row] = result["results"]
            assert row["update"] == update
            found[one_shot, update] = row["ppl"][str(tiny_text)]
    assert len(set(found.values())) == 8
    again = run(tiny_llama, tiny_text, metric=["W*W*D"], target=["0.5"], update="obs-blockwise")
    named = run(tiny_llama, tiny_text, metric=["sparsegpt"], target=["0.5"])
    assert again["results"][0]["ppl"] == named["results"][0]["ppl"]


def test_a_row_does_not_depend_on_its_neighbours(tiny_llama: Path, tiny_text: Path) -> None:
    """The model is dense again before each row, and what rows share is not changed by any."""
    together = run(tiny_llama, tiny_text, metric=["wanda", "sparsegpt", "gblm_l1"], target=["0.5", "2:4"])
    for row in together["results"]:
        [alone] = run(tiny_llama, tiny_text, metric=[row["metric"]], target=[row["target"]])["results"]
        assert alone["ppl"] == row["ppl"]


def test_shuffle_draws_with_the_seed(tiny_llama: Path, tiny_text: Path) -> None:
    plain = [run(tiny_llama, tiny_text, metric=["wanda"], seed=seed)["dense"] for seed in (0, 1)]
    assert plain[0] == plain[1]
    drawn = [run(tiny_llama, tiny_text, metric=["wanda"], seed=seed, shuffle=True)["dense"] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_the_listener_hears_the_dense_model_first(tiny_llama: Path, tiny_text: Path) -> None:
    heard: list[str] = []

    class Listener(BenchListener):
        def dense(self, ppl: Mapping[str, float]) -> None:
            heard.append("dense")

        def progress(self, what: str, done: int, total: int) -> None:
            if what == "calibration":
                assert 0 <= done <= total == 8
                heard.append(what)

        def row(self, row: BenchRow) -> None:
            heard.append(f"{row.metric} {row.target}")

    run(tiny_llama, tiny_text, metric=["gblm_l1", "wanda"], target=["0.5", "2:4"], listener=Listener())
    gradients = [*["calibration"] * 9, "gblm_l1 0.5", "gblm_l1 2:4"]
    assert heard == ["dense", "wanda 0.5", "wanda 2:4", *gradients]  # what needs less comes first


@pytest.mark.parametrize("one_shot", [False, True])
def test_what_a_later_metric_needs_is_collected_then(tiny_llama: Path, tiny_text: Path, one_shot: bool) -> None:
    """One session, asked for W and X, then for gradients, then for an update: each as if asked for alone."""
    model = load_model(str(tiny_llama), device="cpu")
    windows = windows_of(model, tiny_text, count=4)
    used = Protocol(session_of(model, windows), one_shot=one_shot)
    for name in ("wanda", "gblm_l1", "sparsegpt", "W*W*D*G", "wanda"):
        metric = resolve_metric(name, 4, 32)
        rows = [
            next(bench_rows(one, [metric], [parse_target("0.5")], "none"))
            for one in (used, Protocol(session_of(model, windows), one_shot=one_shot))
        ]
        # with gradients, X is summed window by window
        assert rows[0].ppl[str(tiny_text)] == pytest.approx(rows[1].ppl[str(tiny_text)], rel=0.02), name


def test_no_gradients_are_collected_for_who_needs_none(
    tiny_llama: Path, tiny_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("a pass over the calibration text that nobody needs")

    monkeypatch.setattr(session_module, "collect_blocks", refuse)
    run(tiny_llama, tiny_text, metric=["magnitude", "wanda", "ria", "sparsegpt"], target=["0.5"])
    monkeypatch.undo()
    monkeypatch.setattr(collect, "run_backward", refuse)
    run(tiny_llama, tiny_text, metric=["wanda", "sparsegpt"], target=["0.5"], one_shot=True)


def test_a_model_pruned_to_death_has_infinite_perplexity(tiny_llama: Path, tiny_text: Path) -> None:
    """Not an error: the row stands, and JSON holds null."""
    model = load_model(str(tiny_llama), device="cpu")
    model.module.model.norm.weight.data.fill_(3e38)
    protocol = Protocol(session_of(model, windows_of(model, tiny_text, count=2)), one_shot=False)
    (row,) = bench_rows(protocol, [resolve_metric("wanda")], [parse_target("0.5")], "none")
    assert (row.ppl[str(tiny_text)], row.error) == (math.inf, None)


def test_a_measurement_leaves_the_model_dense(tiny_llama: Path, tiny_text: Path) -> None:
    """Loss and sparsity are of the pruned model; several texts are measured of one pruning."""
    model = load_model(str(tiny_llama), device="cpu")
    windows = windows_of(model, tiny_text, count=4)
    protocol, rule = (
        Protocol(session_of(model, windows), one_shot=True),
        Rule(resolve_metric("wanda"), parse_target("2:4")),
    )
    protocol.prepare([rule.metric], "none")
    digest = [layer.weight.clone() for layer in model.layers]
    (found,) = protocol.measure([rule], [windows.tokens, windows.tokens[:2]])
    assert (len(found.losses), found.sparsity) == (2, 0.5)
    assert found.seconds > 0
    (again,) = protocol.measure([rule], [windows.tokens[:2]])
    assert again.losses == found.losses[1:]
    assert all(torch.equal(layer.weight, before) for layer, before in zip(model.layers, digest, strict=True))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"target": ["1.5"]}, InputError, "1.5"),
        ({"metric": ["wandaa"]}, ExpressionError, "did you mean 'wanda'"),
        ({"metric": ["X"]}, ExpressionError, "must use the weight"),
        ({"update": "all"}, InputError, "none, obs, obs-blockwise, admm"),
        ({"calibration": "missing.txt"}, DataError, "missing.txt"),
        ({"text": ["missing.txt"]}, DataError, "missing.txt"),
        ({"text": []}, InputError, "--text is needed"),
        ({"calibration": None}, InputError, "--calibration is needed"),
    ],
)
def test_what_needs_no_model_is_refused_before_it_is_loaded(
    tiny_text: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    """There is no such model; the message is about the other thing."""
    with pytest.raises(error) as caught:
        run(Path("/no/such/model"), tiny_text, **options)
    assert message in str(caught.value)


def untimed(document: dict[str, Any]) -> dict[str, Any]:
    return document | {"results": [row | {"seconds": 0} for row in document["results"]]}


def test_several_models_are_benched_as_each_alone(tiny_llama: Path, tiny_gpt2: Path, tiny_text: Path) -> None:
    """Each document is the single model's, but for seconds; a model asked for twice is measured once."""
    options: dict[str, Any] = {"metric": ["gblm_l1", "wanda", "abs(W)*X**0.5"], "target": ["0.5", "2:4"]}
    heard = []

    class Listener(BenchListener):
        def model(self, name: str) -> None:
            heard.append(name)

    result = run([tiny_llama, tiny_gpt2, tiny_llama], tiny_text, **options, listener=Listener())
    alone = [run(model, tiny_text, **options) for model in (tiny_llama, tiny_gpt2)]
    assert list(result) == ["models", "transfer"]
    assert [untimed(document) for document in result["models"]] == [untimed(document) for document in alone]
    assert result["transfer"] == win_loss(alone)
    assert bench_failures(result) == []
    assert heard == [str(tiny_llama), str(tiny_gpt2)]


def test_a_sequence_of_one_model_is_that_model(tiny_llama: Path, tiny_text: Path) -> None:
    class Listener(BenchListener):
        def model(self, name: str) -> None:
            raise AssertionError("one model alone needs no name")

    results = [run(model, tiny_text, metric=["wanda"], listener=Listener()) for model in (tiny_llama, [tiny_llama] * 2)]
    assert untimed(results[0]) == untimed(results[1])


@pytest.mark.parametrize("broken_first", [True, False])
def test_a_model_that_fails_costs_the_others_nothing(
    tiny_llama: Path, tiny_text: Path, tmp_path: Path, broken_first: bool
) -> None:
    (tmp_path / "config.json").write_text("{}")
    models = [tmp_path, tiny_llama] if broken_first else [tiny_llama, tmp_path]
    result = run(models, tiny_text, metric=["wanda"])
    good, broken = sorted(result["models"], key=lambda document: "error" in document)
    assert untimed(good) == untimed(run(tiny_llama, tiny_text, metric=["wanda"]))
    assert broken.keys() == {"model", "error"}
    assert [document["model"] for document in result["models"]] == [str(model) for model in models]
    assert result["transfer"] == win_loss([good])
    assert bench_failures(result) == [f"{tmp_path}: {broken['error']}"]


def test_rows_measured_before_a_model_fails_are_kept(
    tiny_llama: Path, tiny_gpt2: Path, tiny_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device is lost at the second row of the second model; that model is in no comparison."""
    calls: list[str] = []

    measure = Protocol.measure

    def lost(protocol: Protocol, *arguments: Any) -> list[Measured]:
        calls.append(protocol.session.model.name)
        if len(calls) == 4:
            raise RuntimeError("the device is lost")
        return measure(protocol, *arguments)

    monkeypatch.setattr(Protocol, "measure", lost)
    first, second = (result := run([tiny_llama, tiny_gpt2], tiny_text, metric=["wanda", "ria"]))["models"]
    assert "error" not in first
    assert second["error"] == "the device is lost"
    assert [row["metric"] for row in second["results"]] == ["wanda"]
    assert result["transfer"] == win_loss([first])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"include": "("}, "not a regular expression"),
        ({"sequence_length": 65}, "at most 64"),
        ({"target": ["7:11"]}, "q_proj"),
    ],
)
def test_what_every_model_refuses_is_refused(
    tiny_llama: Path, save_model: Callable[..., Path], tiny_text: Path, options: dict[str, Any], message: str
) -> None:
    """With nothing measured there is nothing to keep; the first model's error is raised."""
    other = save_model("gpt2", n_embd=32, n_layer=1, n_head=4, n_positions=64)
    with pytest.raises(InputError, match=message):
        run([tiny_llama, other], tiny_text, **options)


def test_a_missing_model_is_refused_before_any_is_loaded(
    tiny_llama: Path, tiny_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "open_model", lambda *names, **options: pytest.fail("loaded"))
    with pytest.raises(ModelError, match="'/no/such/model' does not exist"):
        run([tiny_llama, Path("/no/such/model")], tiny_text)
    with pytest.raises(InputError, match="--text is needed"):
        run([tiny_llama, Path("/no/such/model")], tiny_text, text=[])


def test_a_pattern_that_leaves_a_remainder_names_the_layer(tiny_llama: Path, tiny_text: Path) -> None:
    with pytest.raises(InputError) as caught:
        run(tiny_llama, tiny_text, target=["2:4", "7:11"])
    assert str(caught.value) == (
        "--target 7:11: in = 32 of layer model.layers.0.self_attn.q_proj is not divisible by 11"
    )
    model = load_model(str(tiny_llama), device="cpu", include="down_proj")  # 44 wide
    check_targets(model, [parse_target("7:11")])


def test_pairs_are_measured_once_in_their_order(tiny_llama: Path, tiny_text: Path) -> None:
    model = load_model(str(tiny_llama), device="cpu", include=r"layers\.0\.mlp")
    protocol = Protocol(session_of(model, windows_of(model, tiny_text, count=1)), one_shot=True)
    targets = [parse_target(text) for text in ("2:4", "0.5", "2:4", "row:0.5")]
    metrics = [resolve_metric(name) for name in ("wanda", "ria", "wanda")]
    pairs = [(row.target, row.metric) for row in bench_rows(protocol, metrics, targets, "none")]
    assert pairs == [(text, name) for text in ("2:4", "0.5", "row:0.5") for name in ("wanda", "ria")]


def test_failures_are_told_with_their_model() -> None:
    good, bad = {"results": [{"error": None}]}, {"results": [{"error": "no"}, {"error": None}, {"error": "nor"}]}
    assert (bench_failures(good), first_failure(good)) == ([], None)
    assert (bench_failures(bad), first_failure(bad)) == (["no", "nor"], "no")
    several = {"models": [good | {"model": "a"}, bad | {"model": "b"}, {"model": "c", "error": "gone"}]}
    assert bench_failures(several) == ["b: no", "b: nor", "c: gone"]
    assert first_failure(several) == "b: no"


def test_a_stopped_bench_goes_on_and_measures_nothing_twice(
    tiny_llama: Path, tiny_gpt2: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C behind each of the rows but the last, of two models; resumed, it ends as one that was not stopped."""

    class Stopping(BenchListener):
        def __init__(self, after: int) -> None:
            self.after = after

        def row(self, row: BenchRow) -> None:
            self.after -= 1
            if not self.after:
                raise KeyboardInterrupt

    names, ledger = [tiny_llama, tiny_gpt2], tmp_path / "rows.jsonl"
    options: dict[str, Any] = {"metric": ["magnitude_row", "wanda"], "target": ["0.5", "2:4"]}
    whole = figures(run(names, tiny_text, **options))
    for _ in range(7):
        resume = {"ledger": ledger, "resume": ledger.exists()}
        done = len(ledger.read_text().splitlines()) - 1 if ledger.exists() else 0
        with pytest.raises(KeyboardInterrupt):
            run(names, tiny_text, **options, **resume, listener=Stopping(done + 1))
    assert len(ledger.read_text().splitlines()) == 1 + 7
    measured: list[int] = []
    plain = Protocol.measure

    def counted(self: Protocol, rules: Sequence[Rule], *arguments: Any) -> list[Measured]:
        measured.append(len(rules))
        return plain(self, rules, *arguments)

    monkeypatch.setattr(Protocol, "measure", counted)
    found = run(names, tiny_text, **options, ledger=ledger, resume=True)
    assert (figures(found), measured) == (whole, [1])
    again = run(names, tiny_text, **options, ledger=ledger, resume=True)
    assert (again["models"][0]["results"], measured) == (found["models"][0]["results"], [1])  # the same seconds, too
    with pytest.raises(InputError, match=r"^--ledger '.*' exists: go on with --resume, or name another$"):
        run(names, tiny_text, **options, ledger=ledger)


@pytest.mark.parametrize(
    "change",
    [{"samples": 7}, {"windows": 5}, {"update": "obs"}, {"one_shot": True}, {"exclude": "mlp"}, {"dtype": "bfloat16"}],
)
def test_rows_of_other_settings_are_measured(
    change: dict[str, Any], tiny_llama: Path, tiny_text: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"metric": ["wanda"], "ledger": tmp_path / "rows.jsonl", "resume": True}
    run(tiny_llama, tiny_text, **options)
    assert figures(run(tiny_llama, tiny_text, **options | change)) == figures(
        run(tiny_llama, tiny_text, metric=["wanda"], **change)
    )
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 3


def figures(result: dict[str, Any]) -> list[Any]:
    """A document without what is measured in seconds."""
    documents = result.get("models", [result])
    return [
        [one["model"], one["dense"], *({**row, "seconds": 0} for row in one["results"])] for one in documents
    ]  # fmt: skip


def test_row_beats_a_metrics_own_group(tiny_llama: Path, tiny_text: Path) -> None:
    """`magnitude` compares within the matrix unless the target says otherwise."""
    result = run(tiny_llama, tiny_text, metric=["magnitude", "magnitude_row"], target=["0.5", "row:0.5", "layer:0.5"])
    ppl = {(row["metric"], row["target"]): row["ppl"] for row in result["results"]}
    assert ppl["magnitude", "row:0.5"] == ppl["magnitude_row", "row:0.5"] == ppl["magnitude_row", "0.5"]
    assert ppl["magnitude", "0.5"] == ppl["magnitude", "layer:0.5"] == ppl["magnitude_row", "layer:0.5"]
    assert ppl["magnitude", "0.5"] != ppl["magnitude_row", "0.5"]


TOLERANCE = {"sparsegpt": 0.04}  # the published code removes one weight more per block


@pytest.mark.slow
def test_reference_figures(shared: Path) -> None:
    """Perplexities made with the original authors' own code on llama-05m, 200 windows of another text than calibrates.

    What the dense model has on the other is in `test_evaluation.py`.
    """
    reference = json.loads((shared / "reference" / "llama-05m.json").read_text(encoding="utf-8"))
    texts = {name: str(shared / "text" / name) for name in reference["texts"] if name.startswith("ptb")}
    assert len(texts) == 1
    metrics, targets = ["wanda", "gblm_l2", "sparsegpt"], ["0.5", "2:4"]
    result = bench(
        str(shared / "models" / "llama-05m"),
        calibration=str(shared / "text" / reference["calibration"]["text"]),
        text=list(texts.values()),
        metric=metrics,
        target=targets,
        samples=reference["calibration"]["windows"],
        sequence_length=reference["sequence_length"],
        windows=200,
        device="cpu",
    )
    for name, text in texts.items():
        assert result["dense"][text] == pytest.approx(reference["dense"][name], rel=1e-3)
    ours = {(row["metric"], row["target"]): row["ppl"] for row in result["results"]}
    theirs = [row for row in reference["results"] if row["metric"] in metrics and row["target"] in targets]
    assert len(theirs) == 6
    for row in theirs:
        for name, text in texts.items():
            measured = ours[row["metric"], row["target"]][text]
            assert measured == pytest.approx(row["ppl"][name], rel=TOLERANCE.get(row["metric"], 0.01)), row


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_is_the_cpu(tiny_llama: Path, tiny_text: Path) -> None:
    """float32 on both; the last bits of the statistics differ, hence a few weights."""
    results = [run(tiny_llama, tiny_text, target=["0.5"], dtype="float32", device=name) for name in ("cpu", "cuda")]
    for cpu, cuda in zip(results[0]["results"], results[1]["results"], strict=True):
        assert cuda["ppl"][str(tiny_text)] == pytest.approx(cpu["ppl"][str(tiny_text)], rel=0.02)
