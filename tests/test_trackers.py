"""Trackers: one contract for every row of the table, with the real libraries that are installed; what goes wrong."""

from __future__ import annotations

import json
import signal
import sqlite3
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from gpmetric.allocation.allocate import allocate, run_allocation
from gpmetric.allocation.request import AllocateRequest
from gpmetric.errors import InputError
from gpmetric.evolution.discover import run_campaign
from gpmetric.evolution.request import DiscoverRequest
from gpmetric.options import check_request
from gpmetric.structured.request import SlimRequest
from gpmetric.structured.slim import run_slim, slim
from gpmetric.tracking import recorder
from gpmetric.tracking.recorder import Trackers
from gpmetric.tracking.table import TRACKERS, check_trackers, folders_of
from tests.watch_helpers import tiny_request

Figures = list[tuple[int, float]]


def read_tensorboard(folder: Path) -> tuple[Figures, str]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder / "place" / "run"), size_guidance={"tensors": 0})
    found.Reload()
    rows = [(row.step, row.value) for row in found.Scalars("mean_excess")]
    texts = [found.Tensors(f"{name}/text_summary")[0].tensor_proto.string_val[0] for name in ("settings", "result")]
    return rows, b"".join(texts).decode()


def read_mlflow(folder: Path) -> tuple[Figures, str]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/place")
    experiment = client.get_experiment_by_name("gpmetric")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("run", "FINISHED")
    rows = [(row.step, row.value) for row in client.get_metric_history(run.info.run_id, "mean_excess")]
    return rows, json.dumps([run.data.params, run.data.tags])


def read_trackio(folder: Path) -> tuple[Figures, str]:
    (file,) = (folder / "trackio").glob("place*.db")
    with closing(sqlite3.connect(file)) as book:
        metrics = book.execute("SELECT step, metrics FROM metrics ORDER BY step").fetchall()
        rest = book.execute("SELECT * FROM configs").fetchall()
    told = [(step, json.loads(text)) for step, text in metrics]
    return [(step, row["mean_excess"]) for step, row in told if "mean_excess" in row], repr((told, rest))


def leveldb_records(content: bytes) -> Iterator[bytes]:
    """Records of a log of LevelDB's format, blocks of 32 KiB, in which a record is one piece or several."""
    place, record = 7, b""  # behind the file's own header
    while place + 7 <= len(content):
        if 2**15 - place % 2**15 < 7:
            place += 2**15 - place % 2**15
        length, kind = struct.unpack("<HB", content[place + 4 : place + 7])
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield record
            record = b""


def read_wandb(folder: Path) -> tuple[Figures, str]:
    from wandb.proto import wandb_internal_pb2

    (file,) = (folder / "wandb").glob("offline-run-*/run-*.wandb")
    rows, texts = [], []
    for data in leveldb_records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        texts.append(str(record))
        found = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
        rows += [(int(found["_step"]), json.loads(found["mean_excess"]))] if "mean_excess" in found else []
    return rows, "".join(texts)


READERS: dict[str, Callable[[Path], tuple[Figures, str]]] = {
    "tensorboard": read_tensorboard, "mlflow": read_mlflow, "trackio": read_trackio, "wandb": read_wandb,
}  # fmt: skip


@pytest.mark.parametrize("name", TRACKERS)
@pytest.mark.filterwarnings("ignore")  # of the libraries
def test_every_tracker_keeps_settings_figures_and_result(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if find_spec(TRACKERS[name].library) is None:
        pytest.skip(f"{TRACKERS[name].library} is not installed: pip install 'gpmetric[{name}]'")
    monkeypatch.setattr(recorder, "_PARTING", 90.0)
    places = {"tensorboard": f"{tmp_path}/place", "mlflow": f"sqlite:///{tmp_path}/place"}
    for variable, value in (("WANDB_MODE", "offline"), ("WANDB_DIR", str(tmp_path)), ("GIT_PYTHON_REFRESH", "quiet")):
        monkeypatch.setenv(variable, value)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    with Trackers([f"{name}:{places.get(name, 'place')}"], "run") as trackers:
        trackers.start({"target": ("0.5", "2:4"), "seed": 3, "minutes": None, "ledger": Path("a|b.sqlite")})
        for step, value in enumerate((0.5, 0.25, 0.125)):
            trackers.log(step, {"mean_excess": value, "excess/2:4": value, "bad": float("nan")})
        trackers.finish({"winner": "layer:abs(W)*X", "better": True, "mean_excess": 0.1})
    assert not caplog.messages
    rows, told = READERS[name](tmp_path)
    assert rows == [(0, 0.5), (1, 0.25), (2, 0.125)]
    assert "layer:abs(W)*X" in told
    assert "0.5,2:4" in told


FAKE = """
import json, os, sys, time

def note(*what):
    with open(os.environ["NOTES"], "a") as file:
        print(json.dumps(what), file=file)

def init(**options):
    print("chatter")
    print("chatter", file=sys.stderr)
    note("init", options)

def log(figures, step=None):
    note("log", step, figures)

def finish():
    note("finish")
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Callable[[], list[Any]]]:
    """A library of trackio's name that notes its calls, with what is put behind it; gives what was noted."""

    def make(code: str = "") -> Callable[[], list[Any]]:
        folder, notes = tmp_path / "library", tmp_path / "notes"
        folder.mkdir()
        (folder / "trackio.py").write_text(FAKE + code)
        monkeypatch.syspath_prepend(folder)
        monkeypatch.setenv("NOTES", str(notes))

        def noted() -> list[Any]:
            return [json.loads(line) for line in notes.read_text().splitlines()] if notes.exists() else []

        return noted

    return make


def wait_for(condition: Callable[[], Any], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_campaign_is_tracked(
    fake: Any, tiny_llama: Path, tiny_text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    noted = fake()
    result = run_campaign(tiny_request(tiny_llama, tiny_text, tmp_path, track=("trackio:here",)))
    wait_for(lambda: ["finish"] in noted())
    begun, *logs, last, _ = noted()
    assert (begun[1]["project"], begun[1]["name"]) == ("here", "a")
    assert begun[1]["config"]["target"] == "0.5"
    assert begun[1]["config"]["evaluations"] == 24
    assert [row[1] for row in logs] == list(range(len(logs)))
    assert logs[-1][2]["mean_excess"] == result["front"][0]["mean_excess"]
    assert logs[-1][2]["evaluations"] == result["evaluations"]
    assert set(logs[-1][2]) == {
        "evaluations", "drawn", "front", "unique_masks", "mean_excess", "nodes", "excess/0.5", "best_baseline/0.5"
    }  # fmt: skip
    assert last[2]["result/winner"] == result["winner"]["formula"]
    told = capfd.readouterr()
    assert "chatter" not in told.out + told.err


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def init(**options): raise RuntimeError('no key\\nand more')", "failed: RuntimeError: no key;"),
        ("def log(figures, step=None): raise ValueError('full')", "failed: ValueError: full;"),
        ("def finish(): raise OSError(28, 'No space left on device')", "No space left on device"),
        ("os._exit(9)", "its process ended with status 9"),
        ("import no_such_module", "No module named 'no_such_module'"),
    ],
)
def test_a_failure_is_told_once_and_costs_nothing(
    fake: Any, code: str, message: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "_PARTING", 60.0)
    fake(code)
    with Trackers(["trackio"], "run") as trackers:
        trackers.start({})
        for step in range(5):
            trackers.log(step, {"a": 1.0})
            time.sleep(0.1)
        trackers.finish({})
    (line,) = caplog.messages
    assert message in line
    assert line.endswith("the command goes on without it")


def test_a_tracker_that_hangs_holds_nothing_up(
    fake: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither while it takes no records, nor at the end; another one beside it is not disturbed."""
    fake(
        "import signal\ndef init(**options):\n"
        "    os.kill(os.getpid(), signal.SIGSTOP if options['project'] == 'full' else 0)\n    time.sleep(9)"
    )
    monkeypatch.setattr(recorder, "_PARTING", 0.5)
    monkeypatch.setattr(recorder, "_ROOM", 2**16)
    with Trackers(["trackio:full", "trackio:slow"], "run") as trackers:
        trackers.start({})
        full, _ = trackers._all
        wait_for(lambda: Path(f"/proc/{full._process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")
        begun = time.monotonic()
        for _ in range(4000):
            full.send(b"x" * 99 + b"\n")
        trackers.log(0, {"a": 1.0})
    assert time.monotonic() - begun < 5
    assert [line.partition(" ")[2] for line in caplog.messages] == [
        "trackio:full takes no figures any more; the command goes on without it",
        "trackio:slow is not done yet; it goes on by itself",
    ]


@pytest.mark.parametrize("death", [signal.SIGKILL, signal.SIGINT])
def test_a_run_ends_with_its_command(fake: Any, death: signal.Signals) -> None:
    """Also where that is killed: the run has no result then. Ctrl-C does not reach the tracker."""
    noted = fake()
    code = (
        "import sys, time\nfrom gpmetric.tracking.recorder import Trackers\n"
        "with Trackers(['trackio'], 'run') as trackers:\n"
        "    trackers.start({}), trackers.log(0, {'a': 1.0}), print('ready', flush=True), time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=_environment()
    )
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(death)
        process.wait()
    wait_for(lambda: ["finish"] in noted())
    assert [row[0] for row in noted()] == ["init", "log", "finish"]


def _environment() -> dict[str, str]:
    import os

    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("comet", "--track must be one of tensorboard, mlflow, trackio, wandb, but got 'comet'"),
        ("tensorboard", "DIR is missing"),
        ("trackio:", "PROJECT is missing"),
        ("wandb", r"needs wandb: pip install 'gpmetric\[wandb\]'"),
    ],
)
def test_what_cannot_track_is_refused_before_any_work(
    text: str, message: str, fake: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake()
    monkeypatch.setattr(
        "gpmetric.tracking.table.find_spec", lambda name: find_spec(name) if name == "trackio" else None
    )
    with pytest.raises(InputError, match=message):
        DiscoverRequest(track=(text,)).check()


def test_a_folder_of_runs_is_no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if find_spec("wandb") is not None:
        pytest.skip("wandb is installed, and found wherever the folder is")
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match="needs wandb"):
        check_trackers(["wandb"])


def test_a_folder_of_events_is_an_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpmetric.evolution.request.check_trackers", lambda texts: None)
    assert folders_of(["tensorboard:a/b", "mlflow:c"]) == {"--track tensorboard:a/b": (Path("a/b"), "folder")}
    request = DiscoverRequest(ledger=tmp_path / "runs" / "a.sqlite", track=(f"tensorboard:{tmp_path / 'runs'}",))
    (tmp_path / "runs").mkdir()
    with pytest.raises(InputError, match="lies in --track tensorboard"):
        check_request(request)


def test_allocate_and_slim_are_tracked(fake: Any, tiny_llama: Path, tiny_text: Path, tmp_path: Path) -> None:
    noted = fake()
    texts = {"calibration": str(tiny_text), "samples": 4, "windows": 2, "search_windows": 2, "sequence_length": 32}
    options: dict[str, Any] = {**texts, "track": "trackio"}
    front = allocate(str(tiny_llama), sparsity=0.5, evaluations=60, output=tmp_path / "found.json", **options)
    wait_for(lambda: ["finish"] in noted())
    begun, *logs, last, _ = noted()
    assert begun[1]["name"] == "found"
    assert [row[1] for row in logs] == list(range(len(front["hypervolume"])))
    assert {"share_of_budget", "loss/middle_sparse", "sparsity/most_sparse"} <= logs[0][2].keys()
    assert last[2]["result/loss"] == front["picked"]["loss"]

    before = len(noted())
    smaller = slim(str(tiny_llama), sparsity=0.3, steps=4, output=tmp_path / "smaller", **options)
    wait_for(lambda: noted()[-1] == ["finish"] and len(noted()) > before)
    begun, *logs, last, _ = noted()[before:]
    assert begun[1]["name"] == "smaller"
    assert logs[-1][2]["loss"] == pytest.approx(smaller["progress"][-1]["loss"])
    assert logs[-1][2]["share_of_search"] == 1
    assert last[2]["result/perplexity"] == smaller["perplexity"]


def test_no_tracker_begins_before_the_inputs_are_accepted(
    tiny_llama: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that is not there, and an output that is not ours: neither leaves a run behind."""
    begun: list[Any] = []
    monkeypatch.setattr(recorder, "_Recorder", lambda *named: begun.append(named))
    texts: dict[str, Any] = {"calibration": str(tiny_text), "track": ("trackio",)}
    with pytest.raises(InputError, match="does not exist"):
        run_allocation(AllocateRequest(model=str(tmp_path / "none"), **texts))
    (folder := tmp_path / "there").mkdir()
    (folder / "a file").touch()
    with pytest.raises(InputError, match="there"):
        run_slim(SlimRequest(model=str(tiny_llama), sparsity=0.3, output=folder, **texts))
    assert begun == []
