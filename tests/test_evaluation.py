"""Perplexity against transformers' own loss and against figures made elsewhere, and what a result says of itself."""

from __future__ import annotations

import json
import math
import platform
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gpmetric.errors import DataError, InputError
from gpmetric.evaluation.objectives import OBJECTIVES
from gpmetric.evaluation.perplexity import DenseLoss, Teacher, batches, mean_loss, perplexity, predictions
from gpmetric.files import write_json
from gpmetric.loading import load_model
from gpmetric.models import Model
from gpmetric.session.evaluate import evaluate
from gpmetric.session.listeners import EvaluateListener
from tests.pruning_helpers import restored, windows_of


@pytest.fixture(scope="module", params=["tiny_llama", "tiny_gpt2"])
def model(request: pytest.FixtureRequest) -> Model:
    return load_model(str(request.getfixturevalue(request.param)))


@pytest.fixture(scope="module")
def llama(tiny_llama: Path) -> Model:
    return load_model(str(tiny_llama))


@pytest.mark.parametrize(("length", "count"), [(2, 5), (32, 7), (41, 70), (64, 64)])
def test_mean_loss_is_transformers_own(model: Model, tiny_text: Path, length: int, count: int) -> None:
    """Window by window; 70 windows of 41 tokens are two batches of our own, of which the second is smaller."""
    windows = windows_of(model, tiny_text, length, count)
    with torch.no_grad():
        losses = [model.module(input_ids=row[None], labels=row[None]).loss.item() for row in windows.tokens]
    assert mean_loss(model, windows.tokens) == pytest.approx(sum(losses) / count, rel=1e-5)


def test_mean_loss_by_hand(llama: Model) -> None:
    """-log softmax of the next token at each position but the last, in double precision."""
    row = torch.tensor([[5, 9, 200, 7]])
    with torch.no_grad():
        probabilities = llama.module(input_ids=row).logits.double().softmax(dim=-1)[0]
    expected = -sum(probabilities[place, row[0, place + 1]].log().item() for place in range(3)) / 3
    assert mean_loss(llama, row) == pytest.approx(expected, rel=1e-6)
    assert mean_loss(llama, row.repeat(5, 1)) == pytest.approx(expected, rel=1e-6)


def test_a_model_without_preference_has_the_vocabulary_for_perplexity(llama: Model) -> None:
    with restored(llama), torch.no_grad():
        norm = llama.module.model.norm.weight
        kept = norm.clone()
        norm.zero_()
        assert perplexity(mean_loss(llama, torch.arange(40).view(2, 20))) == pytest.approx(300)
        norm.copy_(kept)


def test_a_model_pruned_to_death_is_infinite(llama: Model) -> None:
    for value in (torch.nan, torch.inf):
        with restored(llama):
            llama.layers[0].weight.fill_(value)
            assert mean_loss(llama, torch.arange(40).view(2, 20)) == math.inf


def test_perplexity_of_a_loss() -> None:
    assert perplexity(0.0) == 1.0
    assert perplexity(math.log(42)) == pytest.approx(42)
    assert perplexity(699.0) == math.exp(699)
    assert perplexity(701.0) == perplexity(math.inf) == perplexity(math.nan) == math.inf


@pytest.mark.slow
@pytest.mark.parametrize(("name", "text"), [("llama-05m", "wikitext2-test.txt"), ("gpt2-05m", "ptb-test.txt")])
def test_dense_perplexity_of_the_reference(name: str, text: str, shared: Path) -> None:
    """Made by the original authors' own code, to the digits it prints (seven)."""
    reference = json.loads((shared / "reference" / f"{name}.json").read_text())
    model = load_model(str(shared / "models" / name))
    count = reference["texts"][text]["windows"]
    windows = windows_of(model, shared / "text" / text, reference["sequence_length"], count)
    assert perplexity(mean_loss(model, windows.tokens)) == pytest.approx(reference["dense"][text], rel=2e-6)


# A pruned model beside the dense one


def test_a_teacher_by_hand(model: Model) -> None:
    """Excess and sum of p (ln p - ln q) over 6 predictions, in double precision; predictions are kept in fp16."""
    rows = torch.tensor([[5, 9, 200, 7], [1, 2, 3, 4]])
    with torch.no_grad(), restored(model):
        p = model.module(input_ids=rows).logits[:, :-1].double().log_softmax(dim=-1)
        ((logits, labels),) = predictions(model, rows)
        teacher = Teacher(logits, labels)
        assert teacher.predictions == 6
        assert teacher.bytes == 6 * 300 * 2
        same = teacher.compare(logits)
        for layer in model.layers:
            layer.weight.mul_(0.8)
        q = model.module(input_ids=rows).logits[:, :-1].double().log_softmax(dim=-1)
        ((logits, _),) = predictions(model, rows)
        excess, divergence = teacher.compare(logits).tolist()
    taken = rows[:, 1:, None]
    assert excess == pytest.approx(float((p - q).gather(2, taken).sum()), rel=1e-4)
    assert divergence == pytest.approx(float((p.exp() * (p - q)).sum()), rel=2e-3)
    assert same[0] == 0
    assert abs(same[1]) < 1e-3


def test_a_pupil_pruned_to_death_is_not_finite(llama: Model) -> None:
    with torch.no_grad(), restored(llama):
        rows = torch.arange(40).view(2, 20)
        (dense,) = predictions(llama, rows)
        teacher = Teacher(*dense)
        llama.layers[0].weight.fill_(torch.nan)
        ((logits, _),) = predictions(llama, rows)
        assert not teacher.compare(logits).isfinite().any()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_is_zero_for_the_dense_model_and_has_gradients(model: Model, name: str) -> None:
    """What its row says of it: nats over so many predictions, memory where predictions are kept and nowhere else."""
    rows = torch.tensor([[5, 9, 200, 7], [1, 2, 3, 4]])

    def logits() -> Tensor:
        ((found, _),) = predictions(model, rows)
        return found

    with torch.no_grad(), restored(model):
        reference = OBJECTIVES[name].reference(logits(), rows[:, 1:].flatten())
        assert reference.predictions == 6
        assert reference.bytes == (6 * 300 * 2 if OBJECTIVES[name].keeps_predictions else 0)
        assert abs(float(reference.excess(logits()))) < 1e-3
        for layer in model.layers:
            layer.weight.mul_(0.5)
        excess = reference.excess(logits())
        assert excess.isfinite()
        assert abs(float(excess)) > 1e-2
        expected = Teacher if name == "kl" else DenseLoss
        assert isinstance(reference, expected)
        weight = model.layers[-1].parameter
        with torch.enable_grad():
            weight.requires_grad_(True)
            traced = reference.excess(logits())
            traced.backward()
            weight.requires_grad_(False)
        assert float(traced.detach()) == pytest.approx(float(excess), rel=1e-4)
        assert weight.grad is not None
        assert weight.grad.abs().sum() > 0
        weight.grad = None


@pytest.mark.parametrize(("length", "count", "sizes"), [(32, 70, [64, 6]), (64, 33, [32, 1]), (2048, 2, [1, 1])])
def test_batches_hold_two_thousand_tokens(llama: Model, length: int, count: int, sizes: list[int]) -> None:
    tokens = torch.arange(length * count).view(count, length)
    parts = list(batches(llama, tokens))
    assert [len(part) for part in parts] == sizes
    assert torch.equal(torch.cat(parts), tokens)


# evaluate


def test_evaluate(tiny_llama: Path, tiny_text: Path, tmp_path: Path, llama: Model) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"text": tiny_text.read_text()[2000:4000]}))
    told: list[tuple[str, int, int]] = []

    class Listener(EvaluateListener):
        def progress(self, what: str, done: int, total: int) -> None:
            told.append((what, done, total))

    sources = [str(tiny_text), str(other), str(tiny_text)]  # a text named twice is read once
    result = evaluate(str(tiny_llama), text=sources, sequence_length=32, windows=8, listener=Listener())
    ppl = {source: perplexity(mean_loss(llama, windows_of(llama, Path(source), 32, 8).tokens)) for source in sources}
    assert result["ppl"] == ppl
    assert told[0] == ("opening the model", 0, 1)
    measured = [one for one in told if one[0] == "perplexity"]
    assert [one for one in measured if one[1] == 0] == [("perplexity", 0, 24)] * 2  # windows times blocks
    assert measured[-1] == ("perplexity", 24, 24)
    assert (result["windows"], result["tokens"]) == (16, 512)
    assert (result["model"], result["dtype"], result["device"]) == (str(tiny_llama), "float32", "cpu")
    assert (result["sequence_length"], result["seed"], result["shuffle"]) == (32, 0, False)
    assert [part["text"] for part in result["texts"]] == [str(tiny_text), str(other)]
    assert result["texts"][0] == windows_of(llama, tiny_text, 32, 8).describe()
    assert result["versions"]["torch"] == torch.__version__
    assert result["versions"]["python"] == platform.python_version()
    write_json(tmp_path / "result.json", result)
    assert json.loads((tmp_path / "result.json").read_text()) == result


def test_evaluate_options(tiny_llama: Path, tiny_text: Path) -> None:
    def ppl(**options: Any) -> float:
        result = evaluate(str(tiny_llama), text=str(tiny_text), sequence_length=16, windows=9, **options)
        assert list(result["ppl"]) == [str(tiny_text)]  # one text needs no list
        assert result["dtype"] == options.get("dtype", "float32")
        return float(result["ppl"][str(tiny_text)])

    dense = ppl()
    assert ppl(dtype="bfloat16") == pytest.approx(dense, rel=0.05)
    assert ppl(dtype="bfloat16") != dense
    assert ppl(seed=1) == dense
    assert ppl(seed=1, shuffle=True) != dense
    assert ppl(seed=1, shuffle=True) == ppl(seed=1, shuffle=True) != ppl(seed=2, shuffle=True)


def test_everything_is_checked_before_the_model_runs(
    tiny_llama: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpmetric.session.evaluate.mean_loss", lambda *_: pytest.fail("the model ran"))
    (tmp_path / "short.txt").write_text("Too short.")
    text = str(tiny_text)
    bad: list[tuple[dict[str, Any], type[InputError], str]] = [
        ({"text": []}, InputError, "--text is needed with --model"),
        ({"text": [text, str(tmp_path / "missing.txt")]}, DataError, "does not exist"),
        ({"text": [text, str(tmp_path / "short.txt")]}, DataError, "fewer than one window of 64"),
        ({"text": text, "sequence_length": 65}, InputError, "--sequence-length must be at least 2 and at most 64"),
        ({"text": text, "windows": 0}, InputError, "--windows must be at least 1, but got 0"),
        (
            {"text": text, "dtype": "int8"},
            InputError,
            "--dtype must be one of float32, bfloat16, float16, but got 'int8'",
        ),
    ]
    for options, error, message in bad:
        with pytest.raises(error, match=message):
            evaluate(str(tiny_llama), **options)


def test_the_demo_needs_no_model_and_no_text() -> None:
    result = evaluate(windows=2, sequence_length=64)
    assert result["model"] == "demo"
    assert list(result["ppl"]) == ["demo:test"]
    assert result["ppl"]["demo:test"] < 60  # trained; a uniform guess is its vocabulary, 1,024
