"""The model's own regime: BOS before windows, documents drawn as published, presets; and what results say of it."""

from __future__ import annotations

import gzip
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from gpmetric.cli import app
from gpmetric.data import (
    Text,
    Windows,
    cut_windows,
    draw_windows,
    leading_bos,
    left_out,
    read_text,
    sources,
    split_text,
)
from gpmetric.errors import DataError, InputError
from gpmetric.evolution.request import DiscoverRequest
from gpmetric.options import command_line, make_request
from gpmetric.pruning.prune import prune
from gpmetric.pruning.requests import BenchRequest
from gpmetric.pruning.verify import verify
from gpmetric.session.evaluate import evaluate
from gpmetric.session.requests import EvaluateRequest
from gpmetric.session.session import open_session


@pytest.fixture(scope="module")
def bos_tokenizer(tiny_tokenizer: Any) -> Any:
    """The tiny tokenizer, which begins every text with its token 0, as Gemma's does."""
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    copied = Tokenizer.from_str(tiny_tokenizer._tokenizer.to_str())
    copied.post_processor = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    ends = dict.fromkeys(("bos_token", "eos_token", "pad_token"), "<|endoftext|>")
    return tiny_tokenizer.__class__(tokenizer_object=copied, **ends)


@pytest.fixture(scope="module")
def bos_llama(tiny_llama: Path, bos_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with that tokenizer."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("bos")
    AutoModelForCausalLM.from_pretrained(tiny_llama).save_pretrained(folder)
    bos_tokenizer.save_pretrained(folder)
    return folder


# BOS


def test_bos_is_found_by_what_the_tokenizer_does(tiny_tokenizer: Any, bos_tokenizer: Any) -> None:
    assert [leading_bos(tiny_tokenizer, choice) for choice in ("auto", "always", "never")] == [None, 0, None]
    assert [leading_bos(bos_tokenizer, choice) for choice in ("auto", "always", "never")] == [0, 0, None]
    without = tiny_tokenizer.__class__(tokenizer_object=tiny_tokenizer._tokenizer)
    assert leading_bos(without, "auto") is None
    with pytest.raises(InputError, match="--bos always: the model's tokenizer has no BOS token"):
        leading_bos(without, "always")


def test_windows_with_bos_tile_the_text() -> None:
    """By hand: L - 1 tokens of the text behind each BOS."""

    def tokenizer(text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(character) for character in text]}

    windows = cut_windows(Text("t", "abcdefgh"), tokenizer, 4, None, vocabulary=128, bos=1)
    assert windows.tokens.tolist() == [[1, *map(ord, "abc")], [1, *map(ord, "def")]]
    assert windows.describe()["bos"] is True
    assert windows.tokens.is_contiguous()


def test_perplexity_is_that_of_plain_transformers(bos_llama: Path, tiny_llama: Path, tiny_text: Path) -> None:
    """Of the same tokens, the mean of transformers' own loss over windows; without BOS today's figure."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(bos_llama).eval()
    tokenizer = AutoTokenizer.from_pretrained(bos_llama)
    content, length, losses = tiny_text.read_text(), 32, []
    ids = tokenizer(content, verbose=False)["input_ids"]
    assert ids.pop(0) == tokenizer.bos_token_id
    for start in range(0, 6 * (length - 1), length - 1):
        batch = torch.tensor([[tokenizer.bos_token_id, *ids[start : start + length - 1]]])
        with torch.no_grad():
            losses.append(model(batch, labels=batch).loss.item())
    options: dict[str, Any] = {"text": [str(tiny_text)], "sequence_length": length, "windows": 6, "device": "cpu"}
    found = evaluate(str(bos_llama), **options)
    assert found["ppl"][str(tiny_text)] == pytest.approx(math.exp(sum(losses) / 6), rel=1e-6)
    assert (found["bos"], found["texts"][0]["bos"]) == ("auto", True)
    never, plain = evaluate(str(bos_llama), bos="never", **options), evaluate(str(tiny_llama), **options)
    assert never["ppl"] == plain["ppl"] != found["ppl"]
    assert (plain["texts"][0]["bos"], never["texts"][0]["bos"]) == (False, False)
    assert evaluate(str(tiny_llama), bos="always", **options)["ppl"] == found["ppl"]


def test_what_windows_are_without_is_said(tiny_tokenizer: Any, bos_tokenizer: Any) -> None:
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    assert left_out(tiny_tokenizer, frozenset(), None) == []
    assert left_out(bos_tokenizer, frozenset(), 0) == []
    assert left_out(bos_tokenizer, frozenset(), None) == ["special tokens <|endoftext|>"]
    copied = Tokenizer.from_str(tiny_tokenizer._tokenizer.to_str())
    copied.post_processor = TemplateProcessing(single="$A <|endoftext|>:1", special_tokens=[("<|endoftext|>", 0)])
    other = tiny_tokenizer.__class__(tokenizer_object=copied, model_input_names=["input_ids", "token_type_ids"])
    other.chat_template = "{{ messages }}"
    assert left_out(other, frozenset({"token_type_ids"}), None) == [
        "special tokens <|endoftext|>", "token types", "chat template"
    ]  # fmt: skip


def test_a_checkpoint_is_verified_with_the_windows_it_was_written_with(
    bos_llama: Path, tmp_path: Path, tiny_text: Path
) -> None:
    """Of a column of a table, with BOS, calibrated on documents; a recipe that says so writes the same files."""
    table = tmp_path / "t.jsonl"
    lines = tiny_text.read_text().splitlines()
    documents = ["\n".join(lines[start : start + 10]) for start in range(0, 200, 10)]
    table.write_text("".join(json.dumps({"body": one}) + "\n" for one in documents))
    options = {"samples": 4, "sequence_length": 32, "sampling": "documents", "text_column": "body", "seed": 3}
    others: dict[str, Any] = {"calibration": str(table), "windows": 4, "device": "cpu"}
    done = prune(str(bos_llama), output=tmp_path / "a", **options, **others)
    assert done["calibration"]["documents"]["of"] == 20
    found = verify(str(tmp_path / "a"), device="cpu")
    assert found["ok"]
    assert found["perplexity"] == pytest.approx(done["perplexity"])
    recipe = tmp_path / "recipe.toml"
    told = "".join(f"{key} = {json.dumps(value)}\n" for key, value in {**options, "bos": "auto"}.items())
    recipe.write_text(f'version = 1\nmetric = "wanda"\ntarget = "0.5"\n{told}')
    prune(str(bos_llama), output=tmp_path / "b", recipe=recipe, **others)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b")]
    assert weights[0] == weights[1]


# Documents


def published(documents: list[str], tokenizer: Any, count: int, length: int, seed: int) -> list[list[int]]:
    """The C4 loader of Wanda, with its global generator."""
    random.seed(seed)
    found = []
    for _ in range(count):
        while True:
            i = random.randint(0, len(documents) - 1)
            ids = tokenizer(documents[i], return_tensors="pt").input_ids
            if ids.shape[1] > length:
                break
        i = random.randint(0, ids.shape[1] - length - 1)
        found.append(ids[0, i : i + length].tolist())
    return found


def make_documents() -> list[str]:
    draw = random.Random(1)
    words = ["the", "a", "model", "weight", "layer", "token", "prunes", "keeps", "scores"]
    return [" ".join(draw.choices(words, k=draw.randint(1, 60))) for _ in range(50)]


@pytest.mark.parametrize("held", [2**25, 100])
@pytest.mark.parametrize("adds_bos", [False, True])
def test_documents_are_drawn_as_published(
    tmp_path: Path, tiny_tokenizer: Any, bos_tokenizer: Any, adds_bos: bool, held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a packed table in the format of C4's, in memory or not; with BOS, before one token less."""
    monkeypatch.setattr(sources, "_HELD", held)
    path, documents = tmp_path / "c4-train.00000-of-01024.json.gz", make_documents()
    rows = [{"text": one, "timestamp": "2019-04-25T12:57:54Z", "url": "https://a.b"} for one in documents]
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    tokenizer = bos_tokenizer if adds_bos else tiny_tokenizer
    text = read_text(str(path))
    assert (text.source is None) == (held > 100)
    windows = draw_windows(text, tokenizer, 48, 20, vocabulary=300, seed=7)
    expected = published(documents, tokenizer, 20, 48, 7)
    assert windows.tokens.tolist() == expected
    assert windows.describe()["documents"]["of"] == 50
    assert windows.describe().get("complete", True) == (held > 100)
    begun = draw_windows(text, tokenizer, 48, 20, vocabulary=300, seed=7, bos=0)
    assert begun.tokens.tolist() == [one if one[0] == 0 else [0, *one[:-1]] for one in expected]


def test_of_one_document_only_places_are_drawn(tiny_tokenizer: Any, tiny_text: Path) -> None:
    """As the WikiText-2 loader draws them."""
    text = read_text(str(tiny_text))
    ids = tiny_tokenizer(text.content, verbose=False)["input_ids"]
    random.seed(5)
    places = [random.randint(0, len(ids) - 16 - 1) for _ in range(6)]
    windows = draw_windows(text, tiny_tokenizer, 16, 6, vocabulary=300, seed=5)
    assert windows.tokens.tolist() == [ids[place : place + 16] for place in places]


def test_documents_that_are_all_too_short(tiny_tokenizer: Any) -> None:
    text = split_text(Text("t", "one two\n\nthree", ((0, 7), (9, 14))), ("a",))["a"]
    with pytest.raises(DataError, match="none of 2 documents is longer than 64 tokens"):
        draw_windows(text, tiny_tokenizer, 64, 1, vocabulary=300, seed=0)


def test_only_calibration_windows_are_drawn_of_documents(tiny_llama: Path, tiny_text: Path) -> None:
    request = BenchRequest(
        model=str(tiny_llama), calibration=str(tiny_text), text=(str(tiny_text),), samples=3, windows=2,
        sequence_length=16, sampling="documents", seed=4, device="cpu",
    )  # fmt: skip
    session = open_session(request)
    text, tokenizer = read_text(str(tiny_text)), session.model.tokenizer
    drawn: Windows = draw_windows(text, tokenizer, 16, 3, vocabulary=300, seed=4)
    assert torch.equal(session.tokens, drawn.tokens)
    assert torch.equal(session.evaluated[0].tokens, cut_windows(text, tokenizer, 16, 2, vocabulary=300).tokens)
    assert session.describe()["sampling"] == "documents"


# Presets


def test_a_preset_sets_a_regime_and_options_given_win() -> None:
    made = make_request(BenchRequest, {"preset": "published"})
    assert (made.samples, made.sequence_length, made.sampling, made.bos, made.windows) == (
        128, 2048, "documents", "never", None
    )  # fmt: skip
    made = make_request(BenchRequest, {"preset": "quick", "samples": 128, "bos": "never"})
    assert (made.samples, made.sequence_length, made.bos, made.windows) == (128, 256, "never", 32)
    assert make_request(BenchRequest, {"preset": "standard"}) == BenchRequest()
    assert make_request(EvaluateRequest, {"preset": "quick"}).windows == 32
    published = make_request(DiscoverRequest, {"preset": "published"})
    assert (published.sampling, published.windows) == ("documents", DiscoverRequest().windows)
    assert command_line("bench", made) == "gpmetric bench --sequence-length 256 --windows 32 --bos never"
    with pytest.raises(InputError, match="--preset must be one of quick, standard, published, but got 'fast'"):
        make_request(BenchRequest, {"preset": "fast"})


@pytest.mark.parametrize("place", ["command line", "config"])
def test_on_the_command_line_a_default_that_is_given_wins(
    place: str, tmp_path: Path, tiny_llama: Path, tiny_text: Path
) -> None:
    """`--windows 1` and `--bos auto` beside a preset that says otherwise."""
    (tmp_path / "c.toml").write_text("bos = 'auto'\nwindows = 1\nsequence-length = 32\n")
    given = ["--bos", "auto", "--windows", "1", "--sequence-length", "32"]
    given = given if place == "command line" else ["--config", str(tmp_path / "c.toml")]
    out = tmp_path / "out.json"
    line = ["evaluate", str(tiny_llama), "--text", str(tiny_text), "--preset", "published", "--json", str(out), *given]
    done = CliRunner().invoke(app, line)
    assert done.exit_code == 0, done.output
    found = json.loads(out.read_text())
    assert (found["bos"], found["windows"], found["sequence_length"]) == ("auto", 1, 32)
