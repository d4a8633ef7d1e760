"""Text from files never reaches the terminal raw, and parsers of foreign files fail with errors of ours."""

from __future__ import annotations

import io
import logging
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
from rich.console import Console

from gpmetric import cli
from gpmetric.allocation.request import AllocateRequest
from gpmetric.errors import GpmetricError, InputError
from gpmetric.executors import LocalProcesses
from gpmetric.files import read_object
from gpmetric.options import make_request
from gpmetric.plain import plain
from gpmetric.pruning.checkpoint import tensors
from gpmetric.pruning.recipe import read_recipe
from gpmetric.pruning.requests import BenchRequest
from gpmetric.tensor_file import TensorFile
from gpmetric.terminal.bench import print_bench
from gpmetric.terminal.reports import EvaluateReport
from tests.executor_helpers import make_teller

EVIL = "a\x1b]0;owned\x07\x1b[31m\nb\r\u202e\x9b2J[bold]"
SHOWN = r"a\x1b]0;owned\x07\x1b[31m\nb\r\u202e\x9b2J[bold]"


def test_what_would_do_more_than_be_seen_is_escaped() -> None:
    assert plain(EVIL) == SHOWN
    assert plain("Modèle 日本 | 0.5") == "Modèle 日本 | 0.5"
    assert plain("\udcff") == r"\udcff"


def printed(show: Callable[[Console], object]) -> str:
    console = Console(file=io.StringIO(), width=200, force_terminal=True, color_system=None)
    show(console)
    return cast(io.StringIO, console.file).getvalue()


def test_tables_and_lines_show_names_as_they_are_spelled() -> None:
    row = {"target": "0.5", "metric": EVIL, "update": "none", "ppl": {EVIL: 2.0}, "sparsity": 0.5, "seconds": 1.0}
    result = {
        "model": EVIL, "protocol": "sequential", "dense": {EVIL: 1.0}, "results": [row | {"error": None}],
        "warnings": [EVIL], "error": EVIL,
    }  # fmt: skip
    text = printed(lambda console: print_bench(console, result, BenchRequest()))
    text += printed(lambda console: EvaluateReport(console).text(EVIL, 2.0))
    assert text.count(SHOWN) >= 5
    assert all(one.isprintable() or one == "\n" for one in text)


def test_bars_show_names_as_they_are_spelled() -> None:
    def show(console: Console) -> None:
        with EvaluateReport(console) as report:
            report.progress(EVIL, 1, 2)

    text = printed(show)
    assert SHOWN in text
    assert "\x1b]0" not in text
    assert "\x9b" not in text


def test_a_bar_that_is_done_vanishes_and_begins_again_at_no_time() -> None:
    def show(console: Console) -> None:
        with EvaluateReport(console) as report:
            seen = []
            for what, done in (("calibration", 1), ("calibration", 2), ("windows", 1), ("calibration", 1)):
                report.progress(what, done, 2)
                seen.append({task.description for task in report._bar.tasks if task.visible})
            assert seen == [{"calibration"}, set(), {"windows"}, {"calibration", "windows"}]
            assert report._bar.tasks[0].start_time is not None
            assert report._bar.tasks[1].start_time is not None
            assert report._bar.tasks[0].start_time >= report._bar.tasks[1].start_time

    printed(show)


def test_errors_and_warnings_show_names_as_they_are_spelled(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def app(*_: Any, **__: Any) -> int:
        logging.getLogger("gpmetric.test").warning("read %s", EVIL)
        raise GpmetricError(f"cannot read {EVIL}")

    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])  # basicConfig does nothing where there are some
    monkeypatch.setattr(cli, "app", app)
    monkeypatch.setattr(sys, "argv", ["gpmetric", "x"])
    monkeypatch.setattr(cli, "watch_signals", lambda: None)
    with pytest.raises(SystemExit):
        cli.main()
    told = capsys.readouterr().err
    assert told.startswith(f"gpmetric: read {SHOWN}\ngpmetric: error: cannot read a\\x1b]0;owned")
    assert all(one.isprintable() or one == "\n" for one in told)


def test_what_workers_tell_is_escaped(capfd: pytest.CaptureFixture[str]) -> None:
    """Their log lines and warnings with tracebacks, which go to the terminal beside ours, and a report of a bug."""
    with LocalProcesses(make_teller) as executor, pytest.raises(RuntimeError, match="a worker raised") as caught:
        next(executor.map_ordered([EVIL]))
    told = capfd.readouterr().err
    assert f"gpmetric: read {SHOWN}\n" in told
    assert f"UserWarning: met {SHOWN}" in told
    assert f"gpmetric: saw {SHOWN}\nTraceback" in told
    shown = [told, str(caught.value), *caught.value.__notes__]
    assert all(one.isprintable() or one == "\n" for text in shown for one in text)
    assert "in tell" in shown[-1]


def test_names_and_targets_are_normalised_at_the_border() -> None:
    assert make_request(BenchRequest, {"target": [" 0.5", "0.5\n", "2:4"]}).target == ("0.5", "2:4")
    for options in ({"model": "a\0b"}, {"metric": ["W\0"]}, {"calibration": "a\0"}, {"include": "\0"}):
        with pytest.raises(InputError, match="holds a null byte"):
            make_request(BenchRequest, options)
    with pytest.raises(InputError, match="holds a null byte"):
        make_request(AllocateRequest, {"output": Path("a\0")})


DEEP = "[" * 100_000


@pytest.mark.parametrize("content", ["", "[]", "7", "{", "\xff", DEEP, '{"a": ' + "9" * 5000 + "}", '"x"'])
def test_json_of_others(content: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(GpmetricError, match=r"a\.json' (is not JSON|holds no JSON object)"):
        read_object(path)


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": 7}', '{"weight_map": ["a"]}', "{", DEEP])
def test_an_index_that_is_none(content: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(GpmetricError, match=r"model\.safetensors\.index\.json"):
        tensors(tmp_path)


@pytest.mark.parametrize("content", ["a = " + DEEP, "a = " + "9" * 5000, "\x00", "a = 1\na = 2"])
def test_toml_of_others(content: str, tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text(content)
    with pytest.raises(InputError, match="is no recipe"):
        read_recipe(path)
    with pytest.raises(InputError, match="is not TOML"):
        cli.load_config(cast(Any, None), path)


@pytest.mark.parametrize(
    "header",
    [
        "7", "[]", DEEP, '{"__metadata__": 7}', '{"a": 7}',
        '{"a": {"dtype": "F32", "shape": 7, "data_offsets": [0, 0]}}',
        '{"a": {"dtype": ["F32"], "shape": [], "data_offsets": [0, 4]}}',
        '{"a": {"dtype": "F32", "shape": [null], "data_offsets": [0, 4]}}', '{"a": {"dtype": "F32", "shape": [1]}}',
        '{"a": {"dtype": "F32", "shape": [1], "data_offsets": "ab"}}',
    ],
)  # fmt: skip
def test_safetensors_of_others(header: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + b"\0" * 4)
    with pytest.raises(GpmetricError, match="is no whole safetensors file"):
        TensorFile(path)
