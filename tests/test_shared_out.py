"""Campaigns by one worker, several, and a cluster that loses a node: the same ledgers, for one model and several."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import gpmetric
from gpmetric.errors import InputError
from gpmetric.evolution.discover import run_campaign
from gpmetric.evolution.ledger import Ledger
from gpmetric.evolution.listener import DiscoverListener
from gpmetric.evolution.request import DiscoverRequest
from gpmetric.evolution.workplace import Evaluators
from gpmetric.pruning.requests import BenchRequest
from gpmetric.session import session as sessions
from gpmetric.session.plan import Plan
from gpmetric.session.reopening import Reopening
from gpmetric.session.session import open_session
from tests.ray_cluster import ray_cluster

Tables = dict[str, list[dict[str, Any]]]


@pytest.fixture
def tables(tiny_llama: Path, tiny_text: Path, tmp_path: Path) -> Callable[..., Tables]:
    def run(name: str, listener: DiscoverListener | None = None, **options: Any) -> Tables:
        values: dict[str, Any] = {
            "model": str(tiny_llama), "text": str(tiny_text), "target": ("0.5", "2:4"), "population": 6,
            "evaluations": 8, "samples": 4, "search_windows": 4, "windows": 4, "calibration_seeds": 1,
            "sequence_length": 32, "operands": ("W", "X"), "include": r"\.0\.", "cache": tmp_path / "cache",
            "ledger": tmp_path / name,
        }  # fmt: skip
        run_campaign(DiscoverRequest(**(values | options)), listener)
        with Ledger.read(tmp_path / name) as ledger:
            return ledger.comparable_tables()

    return run


class Losing(DiscoverListener):
    """Takes a node from the cluster when the baselines are there, and gives it another one."""

    def __init__(self) -> None:
        self.lost = ray_cluster().add_node(num_cpus=1)

    def baselines(self, excess: Mapping[str, Mapping[str, float]]) -> None:
        ray_cluster().remove_node(self.lost, allow_graceful=False)
        ray_cluster().add_node(num_cpus=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("several", "on_ray"),
    [(False, True), (True, False), pytest.param(True, True, marks=pytest.mark.nightly)],
    ids=["one model on Ray", "two models", "two models on Ray"],
)
def test_whoever_works_the_ledger_is_the_same(
    tables: Callable[..., Tables], tiny_llama: Path, tiny_gpt2: Path, several: bool, on_ray: bool
) -> None:
    run = partial(tables, model=(str(tiny_llama), str(tiny_gpt2))) if several else tables
    expected = run("one.sqlite", workers=1)
    assert len(expected["evaluations"]) == 8
    if on_ray:
        assert run("ray.sqlite", Losing(), ray=ray_cluster().address, workers=3) == expected
    else:
        assert run("two.sqlite", workers=2) == expected  # each more takes seconds to import torch


def test_one_worker_that_may_hold_one_model_changes_them(
    tables: Callable[..., Tables], tiny_llama: Path, tiny_gpt2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = (str(tiny_llama), str(tiny_gpt2))
    expected = tables("both.sqlite", model=both, workers=1)
    monkeypatch.setattr(sessions, "make_plan", lambda *_: Plan(held_models=1))
    assert tables("either.sqlite", model=both, workers=1) == expected


def test_real_campaigns_are_merged(tables: Callable[..., Tables], tmp_path: Path) -> None:
    """Text among their settings, and a last generation that the budget ended."""
    paid = [len(tables(name, workers=1, seed=seed)["evaluations"]) for seed, name in enumerate(("a", "b"))]
    gpmetric.merge_ledgers([tmp_path / "a", tmp_path / "b"], output=tmp_path / "merged.sqlite")
    checked = gpmetric.check_ledger(tmp_path / "merged.sqlite")
    assert checked["ok"], checked["problems"]
    with Ledger.read(tmp_path / "merged.sqlite") as ledger:
        assert max(paid) <= len(ledger.evaluations()) <= sum(paid)
        assert ledger.settings["objective"] == "kl"


def test_a_session_is_opened_again_without_its_texts(
    tiny_llama: Path, tmp_path: Path, tiny_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As another process does, wherever it runs: `-` and relative names are of the first one alone."""
    shutil.copytree(tiny_llama, tmp_path / "model")
    shutil.copy(tiny_text, tmp_path / "t.txt")
    monkeypatch.chdir(tmp_path)
    request = BenchRequest(model="model", calibration="t.txt", text=("t.txt",), samples=4, sequence_length=32)
    first = open_session(request)
    place = Reopening.of(first, request.models[0])
    (tmp_path / "t.txt").unlink()
    monkeypatch.chdir("/")
    again = place.open()
    assert again.model.name == first.model.name
    assert [one.text.name for one in again.evaluated] == ["t.txt"]
    assert again.evaluated[0].tokens_digest == first.evaluated[0].tokens_digest
    assert again.windows["calibration"].tokens_digest == first.windows["calibration"].tokens_digest


def told(document: Any) -> Any:
    """What a document tells but times and folders."""
    if isinstance(document, dict):
        times = ("output", "after_search", "files")
        return {key: told(one) for key, one in document.items() if "seconds" not in key and key not in times}
    return [told(one) for one in document] if isinstance(document, list) else document


FEW = {"samples": 4, "windows": 4, "sequence_length": 32, "seed": 1}
COMMANDS: dict[str, Callable[..., dict[str, Any]]] = {
    "bench": lambda folder, model, text, **who: gpmetric.bench(
        model, calibration=text, text=text, metric=("wanda", "sparsegpt", "W/0"), target=("0.5", "2:4"), **FEW, **who
    ),
    "allocate": lambda folder, model, text, **who: gpmetric.allocate(
        model, calibration=text, sparsity=0.6, evaluations=40, search_windows=8, output=folder / "a.json", **FEW, **who
    ),
    "exchange": lambda folder, model, text, **who: gpmetric.slim(
        model, calibration=text, steps=6, search_windows=24, output=folder / "a", **FEW, **who
    ),
    "policy": lambda folder, model, text, **who: gpmetric.slim(
        model,
        calibration=text,
        steps=4,
        estimator="rloo",
        draws=4,
        search_windows=24,
        output=folder / "a",
        **FEW,
        **who,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "on_ray"),
    [pytest.param(name, on_ray, marks=pytest.mark.nightly if on_ray and name != "allocate" else ())
     for name in COMMANDS for on_ray in (False, True)],
)  # fmt: skip
def test_whoever_works_the_result_is_the_same(
    name: str, on_ray: bool, tiny_llama: Path, tiny_text: Path, tmp_path: Path
) -> None:
    def run(place: str, **who: Any) -> Any:
        (tmp_path / place).mkdir()
        return told(COMMANDS[name](tmp_path / place, str(tiny_llama), str(tiny_text), **who))

    assert run("two", workers=2, **({"ray": ray_cluster().address} if on_ray else {})) == run("one", workers=1)


def test_a_process_holds_as_many_models_as_it_may() -> None:
    opened: list[str] = []

    class Place:
        def __init__(self, name: str) -> None:
            self.name = name

        def open(self, model: None) -> Callable[[str], str]:
            opened.append(self.name)
            return lambda task: f"{task} by {self.name}"

    from gpmetric.evolution.multi_model import OneModel

    evaluators = Evaluators({name: Place(name) for name in "abc"}, held=2)  # type: ignore[arg-type, misc]
    asked = [evaluators(OneModel(name, "task")) for name in "abacab"]  # type: ignore[arg-type]
    assert asked == [f"task by {name}" for name in "abacab"]
    assert opened == ["a", "b", "c", "b"]


def test_a_cluster_that_is_not_there_is_said(tiny_llama: Path, tiny_text: Path) -> None:
    pytest.importorskip("ray").shutdown()  # a process is in one cluster
    with pytest.raises(InputError, match=r"--ray 127\.0\.0\.1:1: nobody answers there"):
        gpmetric.discover(str(tiny_llama), text=str(tiny_text), ray="127.0.0.1:1")


def test_an_empty_address_is_refused() -> None:
    with pytest.raises(InputError, match="--ray must be auto or the address of a cluster"):
        DiscoverRequest(ray=" ").check()
