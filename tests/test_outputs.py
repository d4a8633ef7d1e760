"""Every option that writes: over nothing that the command reads, and over nothing that gpmetric did not write."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from safetensors.torch import save_file

from gpmetric.allocation.request import AllocateRequest
from gpmetric.analysis.request import AnalyseRequest
from gpmetric.commands import COMMANDS
from gpmetric.errors import InputError
from gpmetric.expression.parse import parse
from gpmetric.files import write_picture
from gpmetric.formats import FORMATS, export_expression
from gpmetric.formats.request import ExportRequest
from gpmetric.options import Request, check_request, described
from gpmetric.outputs import OURS
from gpmetric.packing.pack import run_pack
from gpmetric.packing.requests import PackRequest
from gpmetric.pruning.requests import BenchRequest, PruneRequest, VerifyRequest
from gpmetric.tuning.request import TuneRequest

GOLDEN = Path(__file__).parent / "golden" / "ledger-v4-finished.sqlite"
PAIRS = [
    (command, writing.name, reading.name)
    for command, row in COMMANDS.items()
    for writing in described(row.request)
    for reading in described(row.request)
    if writing.option.writes and reading.option.reads
]


def given(kind: type[Request], **values: Any) -> Request:
    """A request with these values, those that are asked for made up, and one of several as one."""
    made_up = {field.name: "x" for field in fields(kind) if field.default is MISSING}
    several = {field.name for field in described(kind) if field.several}
    return kind(**made_up | {name: (value,) if name in several else value for name, value in values.items()})


@pytest.mark.parametrize(("command", "writing", "reading"), PAIRS)
def test_no_option_writes_what_another_reads(
    command: str, writing: str, reading: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its own name, through a link, as another name of the same file, and with --force."""
    kind = COMMANDS[command].request
    monkeypatch.setattr(kind, "check", lambda self: None)
    read = tmp_path / "read.png"
    read.write_text("read")
    os.symlink(read, tmp_path / "link.png")
    os.link(read, tmp_path / "other.png")
    forced = {"force": True} if "force" in {field.name for field in fields(kind)} else {}
    for name in ("read.png", "link.png", "other.png"):
        request = given(kind, **{writing: tmp_path / name, reading: str(read)}, **forced)
        with pytest.raises(InputError, match="is also read"):
            check_request(request, force=True)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_json_is_not_written_over_what_is_read(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = COMMANDS[command].request
    monkeypatch.setattr(kind, "check", lambda self: None)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"gpmetric": "an older one"}')
    for field in described(kind):
        if field.option.reads:
            request = given(kind, **{field.name: str(folder)})
            with pytest.raises(InputError, match="is also read"):
                check_request(request, folder / "config.json", force=True)
            with pytest.raises(InputError, match=r"lies in '.*model', which is read"):
                check_request(request, folder / "new.json", force=True)
            check_request(request, tmp_path / "new.json")


def test_weights_behind_a_link_are_read_too(tmp_path: Path) -> None:
    """As in the Hub's cache: the model's file is a link to a blob elsewhere."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "blobs" / "abc").write_text("weights")
    os.symlink(tmp_path / "blobs" / "abc", tmp_path / "model" / "model.safetensors")
    with pytest.raises(InputError, match=r"--save-masks '.*abc' is also read"):
        check_request(
            PruneRequest(model=str(tmp_path / "model"), output=tmp_path / "out", save_masks=tmp_path / "blobs" / "abc")
        )


def test_a_checkpoint_is_not_written_into_the_model(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(InputError, match=r"--output '.*pruned' lies in '.*model', which is read"):
        check_request(PruneRequest(model=str(tmp_path / "model"), output=tmp_path / "model" / "pruned"))
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match=r"--json '.*' lies in --output '.*out'"):
        check_request(PruneRequest(output=tmp_path / "out", force=True), tmp_path / "out" / "x.json")
    with pytest.raises(InputError, match=r"--json '.*' lies in '.*out', which is read"):
        check_request(VerifyRequest(folder=str(tmp_path / "out")), tmp_path / "out" / "x.json")


@pytest.fixture
def downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model and a text of the Hub as huggingface_hub keeps them: files are links to blobs."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    for kind in ("models", "datasets"):
        folder = tmp_path / "hub" / f"{kind}--someone--tiny"
        (folder / "snapshots" / "c0ffee").mkdir(parents=True)
        (folder / "blobs").mkdir()
        (folder / "blobs" / "b10b").write_text("weights")
        (folder / "snapshots" / "c0ffee" / "model.safetensors").symlink_to("../../blobs/b10b")
    return tmp_path / "hub"


@pytest.mark.parametrize(
    "place", ["", "blobs/b10b", "blobs/new", "snapshots/c0ffee", "snapshots/c0ffee/model.safetensors", "new"]
)
@pytest.mark.parametrize("kind", ["models", "datasets"])
def test_what_the_hub_has_given_is_read_too(kind: str, place: str, downloaded: Path, tmp_path: Path) -> None:
    """A model by its name, and a text; also what is behind links, and where the file has another name."""
    text = "hf:someone/tiny/part:train"
    options = {"model": "someone/tiny"} if kind == "models" else {"calibration": text}
    name = next(iter(options.values()))
    folder = downloaded / f"{kind}--someone--tiny"
    output = folder / place
    with pytest.raises(InputError, match=f"is also read|lies in '{name}', which is read"):
        check_request(PruneRequest(**options, output=output, force=True))
    (link := tmp_path / "link").symlink_to(output)
    with pytest.raises(InputError, match=f"is also read|lies in '{name}', which is read"):
        check_request(PruneRequest(**options, output=link, force=True))
    os.link(folder / "blobs" / "b10b", tmp_path / "same")
    with pytest.raises(InputError, match="same' is also read"):
        check_request(PruneRequest(**options, output=tmp_path / "a", save_masks=tmp_path / "same", force=True))
    other = PruneRequest(model="someone/else", output=tmp_path / "a", save_masks=folder / "masks")
    check_request(other)


def test_what_the_hub_will_give_is_read_too(downloaded: Path, tmp_path: Path) -> None:
    folder = downloaded / "models--gpt2"
    folder.mkdir()
    with pytest.raises(InputError, match="lies in 'gpt2', which is read"):
        check_request(PruneRequest(model="gpt2", output=folder / "snapshots"))
    check_request(PruneRequest(model="gpt2", output=tmp_path / "gpt2"))


def test_parts_of_a_text_the_config_and_files_of_a_database_are_read(tmp_path: Path) -> None:
    for name in ("c.txt", "led.sqlite", "led.sqlite-wal"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(InputError, match="is also read"):
        check_request(PruneRequest(text=f"{tmp_path / 'c.txt'}#search", output=tmp_path / "o"), tmp_path / "c.txt")
    with pytest.raises(InputError, match="is also read"):
        check_request(PruneRequest(output=tmp_path / "o"), tmp_path / "c.txt", config=tmp_path / "c.txt")
    with pytest.raises(InputError, match="is also read"):
        check_request(ExportRequest(formula=str(tmp_path / "led.sqlite"), output=tmp_path / "led.sqlite-wal"))


def test_what_tune_keeps_beside_its_output_is_guarded(tmp_path: Path) -> None:
    (tmp_path / "out.recipe.toml").write_text("mine")
    with pytest.raises(InputError, match=r"--output's recipe '.*' exists, and gpmetric did not write it"):
        check_request(TuneRequest(output=tmp_path / "out"))


def test_a_ledger_is_not_exported_over_itself(tmp_path: Path) -> None:
    path = tmp_path / "led.sqlite"
    shutil.copyfile(GOLDEN, path)
    before = path.read_bytes()
    words = ["export", str(path), "-o", str(path), "--force"]
    done = subprocess.run([sys.executable, "-m", "gpmetric", *words], capture_output=True, text=True, check=False)
    assert (done.returncode, path.read_bytes()) == (2, before), done.stderr
    assert f"--output {str(path)!r} is also read" in done.stderr


def test_a_home_that_no_shell_expanded_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of whatever is read or written; a name that only begins with the sign is a name."""
    monkeypatch.setenv("HOME", "/home/me")
    told = "stands for the home folder only where a shell expands it; write '/home/me/x'$"
    for request, spelled in (
        (PruneRequest(output=Path("~/x")), "--output"),
        (PruneRequest(model="~/x", output=Path("y")), "--model"),
        (AllocateRequest(calibration="~/x"), "--calibration"),
        (BenchRequest(text=("t.txt", "~/x")), "--text"),
    ):
        with pytest.raises(InputError, match=rf"^{spelled} '~/x': ~ {told}"):
            check_request(request)
    with pytest.raises(InputError, match=rf"^--json '~/x': ~ {told}"):
        check_request(BenchRequest(), Path("~/x"))
    check_request(BenchRequest(model="~x"))


def written(kind: str, path: Path) -> None:
    """A file as gpmetric writes it."""
    if kind == "picture":
        write_picture(path, Figure())
    elif kind == "masks":
        save_file({"a": torch.ones(2, 3, dtype=torch.bool)}, path)
    elif kind == "statistics":
        told = {"gpmetric": json.dumps({"operands": ["X"], "versions": {"gpmetric": "0.1"}}), "format": "pt"}
        save_file({"a.X": torch.ones(3)}, path, told)
    elif kind == "archive":
        (path.parent / "packed").mkdir()
        (path.parent / "packed" / "config.json").write_text("{}")
        run_pack(PackRequest(folder=path.parent / "packed", output=path))
    else:
        texts = {
            "json": '{"model": "m", "versions": {"gpmetric": "0.1"}}',
            "allocation": '{"version": 1, "granularity": "row", "sparsity": {"a": 0.5}}',
            "table": "method,sparsity,loss\n",
            "page": '<!doctype html>\n<meta name="generator" content="gpmetric report 0.1">\n',
            "recipe": "# How a model is pruned: `gpmetric prune MODEL --recipe FILE -o DIR`\n",
            "formula": "% gpmetric 0.1: abs(W)\n",
            "candidates": "generation,position,formula,status,reason\n",
        }
        path.write_text(texts[kind])


FOREIGN: dict[str, Callable[[Path], object]] = {
    "json": lambda path: path.write_text('{"name": "a package"}'),
    "allocation": lambda path: path.write_text('{"version": 1}'),
    "archive": lambda path: zipfile.ZipFile(path, "w").close(),
    "table": lambda path: path.write_text("date,price\n"),
    "page": lambda path: path.write_text("<!doctype html>\n<title>mine</title>\n"),
    "recipe": lambda path: path.write_text("x = 1\n"),
    "candidates": lambda path: path.write_text("generation,position\n"),
    "formula": lambda path: path.write_text("import torch\n\nW = torch.ones(2)\n"),
    "picture": lambda path: Figure().savefig(path),
    "masks": lambda path: save_file({"a": torch.ones(2, 3)}, path),
    "statistics": lambda path: save_file({"a.X": torch.ones(3)}, path, {"gpmetric": "{}", "format": "pt"}),
}


@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize("suffix", [".png", ".pdf"])
def test_what_is_ours_is_known(kind: str, suffix: str, tmp_path: Path) -> None:
    """A file of its own kind, whole; none of another kind, none cut short, none of somebody else."""
    path = tmp_path / f"x{suffix}"
    written(kind, path)
    assert OURS[kind](path)
    for other in OURS:
        if other != kind:
            with suppress(ValueError, TypeError, KeyError):  # what `check_outputs` takes for no
                assert not OURS[other](path), other
    FOREIGN[kind](path)
    assert not OURS[kind](path)


@pytest.mark.parametrize("format", [name for name in FORMATS if name != "triton"])
def test_every_export_may_be_written_again(format: str, tmp_path: Path) -> None:
    path = tmp_path / "x"
    export_expression(parse("abs(W)*X**0.5"), format, path, "0.1", "layer")
    check_request(ExportRequest(formula="W", format=format, output=path))


def test_only_force_replaces_what_is_not_ours(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.write_text("my notes\n")
    for request, spelled in (
        (ExportRequest(formula="W", output=mine), "--output"),
        (AllocateRequest(output=mine), "--output"),
        (AllocateRequest(csv=mine), "--csv"),
        (PruneRequest(output=tmp_path / "o", save_masks=mine), "--save-masks"),
    ):
        with pytest.raises(InputError, match=rf"{spelled} '.*mine' exists, and gpmetric did not write it: name"):
            check_request(request)
        check_request(
            type(request)(**{one.name: getattr(request, one.name) for one in fields(request)} | {"force": True})
        )
    with pytest.raises(InputError, match=r"--json '.*mine' exists, and gpmetric did not write it"):
        check_request(VerifyRequest(folder="x"), mine)
    check_request(VerifyRequest(folder="x"), mine, force=True)
    mine.write_text("")
    check_request(AnalyseRequest(ledger=Path("x")), mine)  # an empty one holds nothing


def test_every_json_is_known_again(tmp_path: Path) -> None:
    """Of a command whose document says no versions, written twice to one place; a package's file is spared."""
    path, words = tmp_path / "x.json", ["export", "wanda", "-o", str(tmp_path / "w.py"), "--json"]
    for _ in range(2):
        subprocess.run([sys.executable, "-m", "gpmetric", *words, str(path)], check=True, capture_output=True)
        assert "gpmetric" in json.loads(path.read_text())
    path.write_text('{"name": "mine"}')
    done = subprocess.run([sys.executable, "-m", "gpmetric", *words, str(path)], check=False, capture_output=True)
    assert (done.returncode, path.read_text()) == (2, '{"name": "mine"}')
