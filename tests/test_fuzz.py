"""Whatever a reader is given, it ends with a value or an error of ours in one line: a bounded run of the benchmark.

`python benchmarks/fuzz.py` is the long one. Inputs that crashed once are here with what is told of them now.
"""

from __future__ import annotations

import importlib
import json
import logging
import random
import re
import sqlite3
import struct
import zipfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pytest
from pyarrow.parquet import write_table

import gpmetric
from gpmetric.data import read_text
from gpmetric.demo.text import demo_text
from gpmetric.errors import DataError, GpmetricError, InputError, LedgerError, ModelError
from gpmetric.evolution.ledger import Ledger, result_of
from gpmetric.journal import Journal
from gpmetric.loading import DEMO_MODEL, check_path, open_model
from gpmetric.options import check_request, make_request
from gpmetric.packing.requests import PackRequest, UnpackRequest
from gpmetric.plain import LONGEST
from gpmetric.pruning.taken_over import lacking_code
from gpmetric.tensor_file import weight_files
from gpmetric.tuning.trial_log import TrialLog

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
INPUTS = 100  # of a reader that takes a millisecond or less; of a slower one its share, at least two


@pytest.fixture(scope="module")
def fuzz() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield importlib.import_module("fuzz")


def names() -> list[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        return list(importlib.import_module("readers").READERS)


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Readers warn of what they repair, change the working directory and put caches in their folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr("gpmetric.digests._SETTLED", 2.0)
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.every(3)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", names())
def test_readers_end_well(name: str, fuzz: ModuleType, tmp_path: Path, quiet: None) -> None:
    fuzzer = fuzz.Fuzzer(name, tmp_path)
    fuzz.fuzz(fuzzer, max(2, min(INPUTS, int(INPUTS / fuzzer.reader.every))), seed=1)
    assert fuzzer.counts["crashes"] == fuzzer.counts["hangs"] == 0, fuzzer.problems


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda: 1 / 0, "ZeroDivisionError"),
        (lambda: eval("1"), "exec|compile"),
        (lambda: __import__("os").system("true"), r"os\.system"),
        (lambda: Path("/tmp/gpmetric-elsewhere").write_text("x"), "open"),
        (lambda: (_ for _ in ()).throw(InputError("")), "Told"),
        (lambda: [None for _ in iter(int, 1)], "Hang"),
    ],
)
def test_what_none_may_do_is_seen(wrong: Any, told: str, fuzz: ModuleType, tmp_path: Path, quiet: None,
                                  monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr(fuzz, "SECONDS", 0.2)
    fuzzer = fuzz.Fuzzer("target", tmp_path)
    object.__setattr__(fuzzer.opened, "read", lambda content: wrong())
    fuzzer.read(b"")
    assert fuzzer.counts["crashes"] + fuzzer.counts["hangs"] == 1
    assert re.search(told, next(iter(fuzzer.problems)))
    assert not Path("/tmp/gpmetric-elsewhere").exists()


def test_changes_repeat_with_a_seed(fuzz: ModuleType) -> None:
    mutations = importlib.import_module("mutations")
    content = b'{"a": [1, {"b": "c"}], "d": null}'
    for shape in mutations.SHAPES:
        made = [mutations.mutated(content, shape, [b"word"], random.Random(7)) for _ in range(2)]
        assert made[0] == made[1]


def test_a_message_is_one_line_of_bounded_length() -> None:
    told = str(InputError(f"no \x1b[31m\n file {'x' * 5000} (--text)"))
    assert told.isprintable()
    assert told.startswith(r"no \x1b[31m file xxx")
    assert told.endswith("x (--text)")
    assert len(told) <= LONGEST
    assert str(GpmetricError("plain")) == "plain"


# What crashed once.


@pytest.mark.parametrize(
    ("name", "columns", "told"),
    [
        ("twice", pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), "has 2 columns 'text'"),
        (
            "bytes",
            pa.table(
                [
                    pa.Array.from_buffers(
                        pa.string(), 1, [None, pa.py_buffer(struct.pack("<2i", 0, 1)), pa.py_buffer(b"\xff")]
                    )
                ],
                names=["text"],
            ),
            "is not Parquet",
        ),
    ],
)
def test_columns_of_parquet(name: str, columns: Any, told: str, tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_table(columns, path)
    with pytest.raises(DataError, match=told):
        read_text(str(path))


def test_a_damaged_foot_of_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_table(pa.table({"text": ["a", "b"]}), path)
    content = path.read_bytes()
    length = int.from_bytes(content[-8:-4], "little")
    path.write_bytes(content[: -8 - length] + b"\xff" * length + content[-8:])
    with pytest.raises(DataError, match=r"a\.parquet' is not Parquet"):
        read_text(str(path))


def test_a_name_of_parquet_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_table(pa.table({"text": ["a"], "more": ["b"]}), path, store_schema=False)
    path.write_bytes(path.read_bytes().replace(b"more", b"m\xe9re"))
    with pytest.raises(DataError, match=r"a\.parquet' is not Parquet"):
        read_text(str(path))


def test_code_of_a_name_longer_than_any_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": {"AutoModel": f"{'m' * 5000}.Class"}}))
    assert lacking_code(tmp_path) == [f"{'m' * 5000}.py"]


def test_a_column_of_csv_twice(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,text\n1,2\n")
    with pytest.raises(DataError, match="has 2 columns 'text': one is wanted"):
        read_text(str(tmp_path / "a.csv"))


def test_an_adapter_nested_beyond_reading(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("[" * 100_000)
    with pytest.raises(ModelError, match="is a LoRA adapter, not a model"):
        check_path(tmp_path)


def model_with(folder: Path, **changes: Any) -> str:
    """The demo model with another config."""
    for path in DEMO_MODEL.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000 in its config; at most 1000 are built"),
        ({"num_hidden_layers": 10**400}, "at most 1000 are built"),
        (
            {"hidden_size": 4096, "intermediate_size": 11008},
            r"parameters in its files, its config is of one with [\d,]{9}",
        ),
    ],
)
def test_a_config_of_a_model_that_its_files_do_not_hold(changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    """transformers would make up weights of any size, and fill them with random numbers, before any is missed."""
    with pytest.raises(ModelError, match=told):
        open_model(model_with(tmp_path, **changes))


@pytest.mark.parametrize("name", ["../a.safetensors", "/a.safetensors", "..", "a\0", "a/b.safetensors", "a\nb"])
def test_shards_stay_in_the_folder(name: str, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    model_with(model)
    (model / "model.safetensors").rename(tmp_path / "a.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"a": name}}))
    with pytest.raises(ModelError, match="which is not in the folder"):
        weight_files(model)
    with pytest.raises(ModelError, match="which is not in the folder"):
        open_model(str(model))


@pytest.mark.parametrize("kind", [PackRequest, UnpackRequest])
def test_a_name_longer_than_any_file(kind: Any) -> None:
    name = "folder" if kind is PackRequest else "archive"
    with pytest.raises(InputError, match="is no f"):
        check_request(make_request(kind, {name: Path("x" * 5000), "output": Path("y")}))


@pytest.mark.parametrize("line", [b"[[1, 2]]\n", b'[["format", 1]]\n', b"7\n", b"null\n"])
def test_a_journal_that_begins_with_no_object(line: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(line)
    with pytest.raises(InputError, match="is no ledger of gpmetric bench"):
        Journal(path, "bench", {"format": 1}, resume=True)
    assert path.read_bytes() == line


@pytest.mark.parametrize("losses", ["", [], {}, None, ["x"]])
def test_a_trial_without_its_loss(losses: Any, tmp_path: Path) -> None:
    unused: Any = None
    path, told = tmp_path / "a.jsonl", {"recipe": "r", "share": 0.25, "seconds": 0.5, "error": None, "document": {}}
    with TrialLog(unused, unused, unused, path, {"seed": 1}) as log:
        log.write(told | {"losses": losses})
    with pytest.raises(InputError, match="is damaged at line 2"):
        TrialLog(unused, unused, unused, path, {"seed": 1}, resume=True)


def test_an_index_of_pack_that_does_not_inflate(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a").write_bytes(b"a" * 100)
    gpmetric.pack(tmp_path / "in", output=tmp_path / "a.pack")
    with zipfile.ZipFile(tmp_path / "a.pack") as archive:
        found = archive.getinfo("index.json")
    content = bytearray((tmp_path / "a.pack").read_bytes())
    begin = found.header_offset + 30 + len("index.json")
    content[begin : begin + 4] = b"\xff\xff\xff\xff"
    (tmp_path / "a.pack").write_bytes(content)
    with pytest.raises(GpmetricError, match=r"a\.pack' is damaged, or no archive of gpmetric pack"):
        gpmetric.unpack(tmp_path / "a.pack", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_schema_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "a.sqlite"
    with Ledger.open(path, {"seed": 1}, resume=False):
        pass
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        connection.execute("PRAGMA journal_mode = DELETE")
    content = path.read_bytes()
    assert b"CREATE TABLE generations" in content
    path.write_bytes(content.replace(b"CREATE TABLE generations", b"CREATE TABL\xa6 generations"))
    with pytest.raises(LedgerError, match=r"cannot be used|is damaged"):
        result_of(path)


@pytest.mark.parametrize("cell", [None, b"\xff", 7])
def test_a_setting_of_any_kind(cell: Any, tmp_path: Path) -> None:
    """SQLite lets a key be NULL, and a value be a number or bytes."""
    from gpmetric.evolution.sqlite_schema import row_checksum

    path = tmp_path / "a.sqlite"
    with Ledger.open(path, {"seed": 1}, resume=False):
        pass
    row = {"key": cell if cell is None else "seed", "value": "2" if cell is None else cell}
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA ignore_check_constraints = ON")
        connection.execute("DELETE FROM meta")
        connection.execute("INSERT INTO meta VALUES (?, ?, ?)", (row_checksum("meta", row), row["key"], row["value"]))
    with pytest.raises(LedgerError, match=r"a\.sqlite (is of another campaign|is damaged|cannot be used)"):
        Ledger.open(path, {"seed": 1}, resume=True)


def test_a_card_shows_hostile_names_as_they_are_spelled(tmp_path: Path) -> None:
    """The model's folder and the text are called so: neither HTML nor Markdown, nor rich's markup, is made of them."""
    name = "<script>x`|[red](u)*\x1b[31m\nb"
    model, text = tmp_path / name, tmp_path / f"{name}.txt"
    model.mkdir()
    model_with(model)
    text.write_text(demo_text("test"))
    options = {"samples": 2, "sequence_length": 16, "windows": 2}
    gpmetric.prune(str(model), calibration=str(text), output=tmp_path / "out", **options)
    card = (tmp_path / "out" / "README.md").read_text()
    assert r"# &lt;script&gt;x|\[red\](u)\*\[31mb, pruned" in card
    assert r"`<script>x\|[red](u)*[31mb.txt`" in card
    assert "<script" not in re.sub("`[^`]*`", "", card)
    assert all(letter.isprintable() or letter == "\n" for letter in card)
