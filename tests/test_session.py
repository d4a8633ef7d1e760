"""Texts and windows of a request, and a session: what it collects, keeps, lets go of, and refuses to begin."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest
import torch

from gpmetric.calibration.cache import cache_key, load_statistics
from gpmetric.calibration.collect import Statistics, collect
from gpmetric.data import Text, Windows, cut_windows, read_text, split_text
from gpmetric.errors import DataError, GpmetricError, InputError, ModelError
from gpmetric.loading import load_model
from gpmetric.metrics import resolve_metric
from gpmetric.models import Model
from gpmetric.options import Option, check_request
from gpmetric.session import session as session_module
from gpmetric.session import splits as splits_module
from gpmetric.session.inputs import Inputs, Texts, parse_size
from gpmetric.session.session import Session, open_session
from gpmetric.session.splits import PARTS, check_length, open_sources, open_text, read_splits, read_windows
from tests.pruning_helpers import session_of, windows_of

ALL = frozenset({"X", "G", "H", "D", "F", "gram"})


@pytest.fixture(scope="module")
def llama(tiny_llama: Path) -> Model:
    return load_model(str(tiny_llama), device="cpu")


@pytest.fixture
def windows(llama: Model, tiny_text: Path) -> Windows:
    return windows_of(llama, tiny_text, count=4)


@pytest.fixture
def session(llama: Model, windows: Windows) -> Session:
    return session_of(llama, windows)


# Which windows


@pytest.mark.parametrize(("length", "used"), [(None, 64), (2, 2), (64, 64)])
def test_sequence_length(llama: Model, length: int | None, used: int) -> None:
    assert check_length(llama, length) == used


@pytest.mark.parametrize("length", [-1, 0, 1, 65])
def test_sequence_lengths_that_are_refused(llama: Model, length: int) -> None:
    message = rf"^--sequence-length must be at least 2 and at most 64, the positions of '.*', but got {length}$"
    with pytest.raises(InputError, match=message):
        check_length(llama, length)


def test_sequence_length_of_a_model_without_positions(save_model: Callable[..., Path]) -> None:
    """Bloom encodes distances: its config names no limit."""
    bloom = load_model(str(save_model("bloom", hidden_size=16, n_layer=1, n_head=2)))
    assert check_length(bloom, None) == 2048
    assert check_length(bloom, 5000) == 5000
    with pytest.raises(InputError, match=r"^--sequence-length must be at least 2, but got 1$"):
        check_length(bloom, 1)


def test_open_text(tiny_text: Path) -> None:
    assert open_text(str(tiny_text)) == read_text(str(tiny_text))
    assert open_text("demo:validation").name == "demo:validation"
    with pytest.raises(DataError, match=r"^unknown demo text 'demo:tset': accepted are demo:train, .*demo:test$"):
        open_text("demo:tset")


def test_a_part_of_a_text(tmp_path: Path) -> None:
    """By the name that results call it by, unless there is a file of that name."""
    lines = [f"line {number}\n" for number in range(10, 40)]
    (whole := tmp_path / "c.txt").write_text("".join(lines))
    found = open_text(f"{whole}#validation")
    assert found == Text(f"{whole}#validation", "".join(lines[21:]))  # behind the line that two thirds end in
    with pytest.raises(DataError, match=r"c\.txt#test' does not exist"):
        open_text(f"{whole}#test")
    (tmp_path / "c.txt#validation").write_text("another")
    assert open_text(f"{whole}#validation").content == "another"


def test_read_windows_draws_with_the_seed(llama: Model, tiny_text: Path) -> None:
    text = read_text(str(tiny_text))
    expected = cut_windows(text, llama.tokenizer, 16, 5, vocabulary=300, shuffle_seed=3)
    assert torch.equal(read_windows(llama, text, 16, 5, 3).tokens, expected.tokens)


def test_tokenizer_and_model_that_do_not_match(llama: Model) -> None:
    """A token added after training: its id has no row in the embedding."""
    llama = load_model(llama.name)
    llama.tokenizer.add_tokens(["zebra"])
    with pytest.raises(ModelError, match=r"^tokenizer and model do not match: text 't' holds token id 300, but "):
        read_windows(llama, Text("t", "The small model reads a zebra."), 4, None)


# The texts of a request


@dataclass(frozen=True, kw_only=True)
class Search(Inputs):
    """A made-up command that reads three splits, or one text cut into them, and texts to evaluate."""

    search: Annotated[str | None, Option("A text.", reads=True)] = None
    validation: Annotated[str | None, Option("A text.", reads=True)] = None
    text: Annotated[tuple[str, ...], Option("Texts.", reads=True)] = ()

    @property
    def texts(self) -> Texts:
        splits = dict(zip(PARTS, (self.calibration, self.search, self.validation), strict=True))
        alone = self.search is self.validation is None
        windows = dict.fromkeys(PARTS, self.windows) | {"calibration": self.samples}
        cut = self.calibration if alone else None
        return Texts(splits, windows, cut=cut, evaluated=self.text or (None,), disjoint=True)


def test_the_demo_model_has_texts_of_its_own() -> None:
    sources = open_sources(Search())
    assert {split: text.name for split, text in sources.splits.items()} == {split: f"demo:{split}" for split in PARTS}
    assert [text.name for text in sources.evaluated] == ["demo:test"]


@pytest.mark.parametrize(
    ("named", "option"),
    [
        ({}, "--calibration"),
        ({"calibration": True, "search": True}, "--validation"),
        ({"calibration": True, "validation": True, "text": True}, "--search"),
        ({"search": True, "validation": True}, "--calibration"),
        ({"calibration": True}, "--text"),
    ],
)
def test_a_model_that_is_named_needs_texts(tiny_text: Path, named: dict[str, bool], option: str) -> None:
    """Told of the first that lacks, before the model, which there is none of, is looked for."""
    given: dict[str, Any] = {name: (str(tiny_text),) if name == "text" else str(tiny_text) for name in named}
    with pytest.raises(InputError) as caught:
        open_sources(Search(model="/no/such/model", **given))
    accepted = "a text file, JSONL, Parquet, CSV, - or hf:dataset[/config]:split"
    assert str(caught.value) == f"{option} is needed with --model: {accepted}"


def test_each_text_is_opened_once(tiny_text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr(splits_module, "open_text", lambda name, column: opened.append(name) or open_text(name, column))
    text = str(tiny_text)
    sources = open_sources(Search(calibration=text, search=text, validation="demo:test", text=(text, text)))
    assert opened == [text, "demo:test"]
    assert sources.splits["calibration"] is sources.splits["search"] is sources.evaluated[0]
    assert len(sources.evaluated) == 1


def test_one_text_is_cut(llama: Model, tiny_text: Path) -> None:
    request = Search(model=llama.name, calibration=str(tiny_text), samples=3, windows=2, sequence_length=8)
    request = Search(**vars(request) | {"text": (str(tiny_text),)})
    sources = open_sources(request)
    assert sources.splits == split_text(read_text(str(tiny_text)), PARTS)
    splits, (evaluated,) = read_splits(llama, request, sources)
    assert {split: tuple(part.tokens.shape) for split, part in splits.items()} == {
        "calibration": (3, 8), "search": (2, 8), "validation": (2, 8)
    }  # fmt: skip
    assert tuple(evaluated.tokens.shape) == (2, 8)
    assert evaluated.text == read_text(str(tiny_text))


def test_splits_share_no_window(llama: Model, tiny_text: Path) -> None:
    text = str(tiny_text)
    request = Search(model=llama.name, calibration=text, search=text, validation=text, text=(text,), sequence_length=8)
    with pytest.raises(DataError, match=r"^--calibration and --search are the same text"):
        read_splits(llama, request, open_sources(request))
    others = {"search": "demo:search", "validation": "demo:test", "samples": 1, "windows": 1, "sequence_length": 32}
    other = Search(**vars(request) | others)
    assert list(read_splits(llama, other, open_sources(other))[0]) == list(PARTS)


def test_windows_are_drawn_with_the_seed_of_the_request(llama: Model, tiny_text: Path) -> None:
    def tokens(**options: Any) -> torch.Tensor:
        request = Search(model=llama.name, calibration=str(tiny_text), text=(str(tiny_text),), samples=3, **options)
        return read_splits(llama, request, open_sources(request))[0]["calibration"].tokens

    first = tokens(sequence_length=24)
    assert torch.equal(tokens(sequence_length=24, seed=1), first)
    drawn = [tokens(sequence_length=24, shuffle=True, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_models_of_a_request() -> None:
    """Each once; none is the demo model."""
    for model, expected in ((None, (None,)), ("a", ("a",)), (("b", "a", "b"), ("b", "a")), ((), (None,))):
        assert Inputs(model=model).models == expected


# A session


def test_open_session(tiny_llama: Path, tiny_text: Path) -> None:
    text = str(tiny_text)
    request = Search(
        model=str(tiny_llama), calibration=text, text=(text,), samples=3, windows=2, sequence_length=8, device="cpu",
        dtype="bfloat16", exclude="mlp", seed=7,
    )  # fmt: skip
    session = open_session(request)
    assert not any("mlp" in layer.name for layer in session.model.layers)
    assert tuple(session.tokens.shape) == (3, 8)
    assert session.metric("gblm_l1") == resolve_metric("gblm_l1", 3, 8)
    described = session.describe()
    assert described.keys() == {
        "model", "dtype", "device", "seed", "shuffle", "statistics_dtype", "versions", "bos", "sampling", "text_column",
        "left_out",
    }  # fmt: skip
    assert (described["bos"], described["sampling"], described["left_out"]) == ("auto", "windows", [])
    assert (described["model"], described["dtype"], described["device"]) == (str(tiny_llama), "bfloat16", "cpu")
    assert (described["seed"], described["shuffle"]) == (7, False)


def test_texts_fail_before_the_model_is_loaded(tiny_text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "open_model", lambda *names, **options: pytest.fail("loaded"))
    with pytest.raises(DataError, match=r"missing\.txt"):
        open_session(Search(model="m", calibration=str(tiny_text), text=("missing.txt",)))


def watched(monkeypatch: pytest.MonkeyPatch) -> list[frozenset[str]]:
    """Which statistics are collected, call by call."""
    asked: list[frozenset[str]] = []
    original = session_module.collect_blocks

    def spy(model: Any, tokens: Any, names: Any, **options: Any) -> Any:
        asked.append(frozenset(names))
        return original(model, tokens, names, **options)

    monkeypatch.setattr(session_module, "collect_blocks", spy)
    return asked


def assert_same(found: Statistics, expected: Statistics, names: frozenset[str]) -> None:
    assert (found.sequences, found.length) == (expected.sequences, expected.length)
    for layer, one in expected.layers.items():
        for name in names:
            torch.testing.assert_close(found.layers[layer][name], one[name], rtol=1e-4, atol=1e-7)


def test_only_what_is_missing_is_collected(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is what one collection of all of them gives, and what was there is the very tensor that it was."""
    asked = watched(monkeypatch)
    expected = collect(session.model, session.tokens, ALL)
    session.statistics(["X"])
    for names in ("X", "", "G", "XG", "GH", ["gram", "G"], "DF", ALL):
        before = session.dense
        found = session.statistics(names)
        assert found is session.dense
        assert found.names >= {"X", *names}
        assert before is not None
        assert (found is before) == (before.names >= set(names))
        for layer, one in before.layers.items():
            assert all(found.layers[layer][name] is value for name, value in one.values.items())
    assert asked == [frozenset(one) for one in ("X", "G", "H", ["gram"], "DF")]
    assert_same(found, expected, ALL)


def test_statistics_at_hand_are_taken(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = watched(monkeypatch)
    session.dense = collect(session.model, session.tokens, "XG")
    assert session.statistics("G") is session.dense
    assert asked == []


def test_blocks_come_one_by_one_and_progress_is_told(session: Session) -> None:
    told: list[tuple[str, int, int]] = []
    found = list(session.blocks("X", lambda *progress: told.append(progress)))
    assert [list(one) for one in found] == [[layer.name for layer in block.layers] for block in session.model.blocks]
    assert told == [("calibration", done, len(found)) for done in range(len(found) + 1)]
    assert session.dense is None


def test_what_is_measured_is_let_go_of(session: Session, windows: Windows) -> None:
    session.statistics("X")
    calls = session.calls
    assert session.calls is calls
    other = session.calibrated_on(Windows(windows.text, windows.tokens[:2]))
    assert (other.model, other.dense) == (session.model, None)
    assert len(other.tokens) == 2
    assert sum(len(hidden) for hidden in other.calls.hidden) == 2
    assert session.calls is calls
    session.forget()
    assert session.dense is None
    assert session.calls is not calls


def test_statistics_are_stored_and_read_again(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = watched(monkeypatch)
    path = session.stored_statistics("XG", tmp_path)
    assert path == tmp_path / f"{cache_key(session.model, session.tokens, 'XG')}.safetensors"
    assert load_statistics(path).names == {"X", "G"}
    session.forget()
    assert session.stored_statistics("GX", tmp_path) == path
    assert asked == [frozenset("XG")]
    assert session.dense is not None
    assert session.statistics("G") is session.dense
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "new"))
    assert session.stored_statistics("X", None).parent == tmp_path / "new" / "gpmetric"


def test_a_disk_without_room_is_told_before_the_work(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = watched(monkeypatch)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Disk(1000))
    with pytest.raises(
        GpmetricError, match=r"^the statistics need 0\.0 GiB, but '.*' has 0\.0 GiB free: choose another"
    ):
        session.stored_statistics("XG", tmp_path / "not" / "there")
    assert asked == []
    assert not (tmp_path / "not").exists()


@dataclass(frozen=True)
class Disk:
    """What `shutil.disk_usage` says."""

    free: int


# Memory


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("12GB", 12 * 10**9), ("12 gb", 12 * 10**9), ("900MiB", 900 * 2**20), ("1.5g", 1_500_000_000), ("64", 64),
        ("64B", 64), (" 1kB ", 1000), ("1KiB", 1024), ("0.5T", 5 * 10**11), ("2tib", 2 * 2**40), ("1M", 10**6),
        ("007", 7),
    ],
)  # fmt: skip
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size
    check_request(Inputs(memory=text))


@pytest.mark.parametrize(
    "text",
    ["", " ", "GB", "12XB", "-1GB", "0", "0GB", "0.1", "1e9", "1,5GB", "12GBB", "12 G B", "١٢GB", "nan", "inf",
     "9" * 5000, "0x1", "1.", ".5GB", "1\0"],
)  # fmt: skip
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(InputError) as caught:
        check_request(Inputs(memory=text))
    assert str(caught.value) == f"--memory must be a size such as 12GB or 900MiB, but got {text!r:.40}"
    assert str(caught.value).isprintable()
