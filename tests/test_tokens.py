"""Tokens of a text in pieces are those of the whole, for tokenizers of every kind; and how much is tokenised."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gpmetric.data import Text, cut_windows, read_text, tokens
from gpmetric.data.tokens import tokens_of


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that short texts have many cuts."""
    monkeypatch.setattr(tokens, "_PIECE", 3000)


def sample() -> str:
    draw = random.Random(3)
    words = "The model, which reads it's weight: 3.14159 of 12345678 layers\tünder café don't 東京 e\u0301 (see) a"
    ends = [" ", " ", " ", "  ", "\n", "\n\n", ". "]
    return "".join(draw.choice(words.split(" ")) + draw.choice(ends) for _ in range(9000))


def of_letters(letters: str, count: int) -> str:
    draw = random.Random(5)
    return "".join(draw.choice(letters) for _ in range(count))


TEXTS: dict[str, Callable[[], str]] = {
    "sentences": sample,
    "one line": lambda: sample().replace("\n", " "),
    "no spaces": lambda: sample().replace(" ", ""),
    "neither": lambda: sample().replace(" ", "").replace("\n", ""),
    "one letter": lambda: "a" * 20_001,
    "digits": lambda: of_letters("0123456789", 20_001),
    "spaces": lambda: " " * 20_001,
    "line ends": lambda: "\n" * 20_001,
    "indented": lambda: "word    \n\n\t\tof  " * 2001,
    "marks": lambda: of_letters("e\u0301\u0300 a\n東ﬁ", 20_001),
}


def built(kind: str) -> Any:
    """A tokenizer of some kind, fitted to the sample."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bytes_of = [f"<0x{byte:02X}>" for byte in range(256)]
    words = pre_tokenizers.Metaspace()
    if kind == "WordPiece":
        made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        made.train_from_iterator([sample()], trainers.WordPieceTrainer(vocab_size=500, special_tokens=["[UNK]"]))
    elif kind == "Unigram":
        made = Tokenizer(models.Unigram())
        made.normalizer, made.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace(prepend_scheme="first")
        trainer = trainers.UnigramTrainer(vocab_size=400, special_tokens=["<unk>"], unk_token="<unk>")
        made.train_from_iterator([sample()], trainer)
    elif kind == "byte level":
        made = Tokenizer(models.BPE())
        split = pre_tokenizers.Split(
            Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"), "isolated"
        )
        plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        made.pre_tokenizer = pre_tokenizers.Sequence([split, plain])
        trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
        made.train_from_iterator([sample()], trainer)
    else:  # SentencePiece as it was converted: no words, a space before the text or not
        made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        made.pre_tokenizer = words
        trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=["<unk>", *bytes_of])
        made.train_from_iterator([sample()], trainer)
        made.pre_tokenizer = None
        spaces = normalizers.Replace(" ", "\u2581")
        before = [normalizers.Prepend("\u2581")] if kind == "Llama" else []
        made.normalizer = normalizers.Sequence([*before, spaces])
    return PreTrainedTokenizerFast(tokenizer_object=made)


@pytest.mark.parametrize("kind", ["Llama", "Gemma", "Unigram", "byte level", "WordPiece"])
def test_pieces_have_the_tokens_of_the_whole(kind: str) -> None:
    tokenizer = built(kind)
    for name, make in TEXTS.items():
        text = make()
        whole = tokenizer(text, add_special_tokens=False)["input_ids"]
        runs = list(tokens_of(tokenizer, [text[:777], text[777:]]))
        assert [one for run in runs for one in run] == whole, name
        assert name not in ("sentences", "one line") or len(runs) > 10


@pytest.mark.parametrize("model", ["llama-05m", "gpt2-05m"])
def test_pieces_of_shared_texts(shared: Path, model: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / model)
    for name in ("wikitext2-valid.txt", "ptb-valid.txt"):
        text = (shared / "text" / name).read_text(encoding="utf-8")[:150_000]
        whole = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        assert [one for run in tokens_of(tokenizer, [text]) for one in run] == whole


class Counting:
    """A tokenizer by character that counts what it is given."""

    def __init__(self) -> None:
        self.characters = 0

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        self.characters += len(text)
        return {"input_ids": [ord(character) for character in text]}


def test_no_more_is_tokenised_than_is_needed() -> None:
    tokenizer = Counting()
    windows = cut_windows(Text("t", "word " * 1_000_000), tokenizer, 128, 8, vocabulary=128)
    assert windows.tokens.shape == (8, 128)
    assert tokenizer.characters < 8000


class Whole:
    """A tokenizer whose every token depends on the length of all of the text: no cut is safe."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [len(text) % 97] * (len(text) // 3)}


def test_where_no_cut_is_safe_the_text_is_tokenised_whole() -> None:
    text = "".join(chr(97 + number % 26) for number in range(50_000))
    (run,) = tokens_of(Whole(), [text])
    assert run == Whole()(text)["input_ids"]


def test_windows_of_pieces_are_those_of_the_whole(tiny_tokenizer: Any, tiny_text: Path) -> None:
    text = read_text(str(tiny_text))
    ids = tiny_tokenizer(text.content, add_special_tokens=False, verbose=False)["input_ids"]
    windows = cut_windows(text, tiny_tokenizer, 7, None, vocabulary=300)
    assert windows.tokens.flatten().tolist() == ids[: len(ids) // 7 * 7]
