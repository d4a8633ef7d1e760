"""The search for allocations: variation, fronts and hypervolume by definition, and an log that any kill may cut."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gpmetric.allocation import candidate_objective as objective_module
from gpmetric.allocation import search_budget as budget_module
from gpmetric.allocation.candidate_objective import Asked, CandidateObjective
from gpmetric.allocation.evaluation_log import RADIUS, EvaluationLog, Measured
from gpmetric.allocation.level_masks import PrunedModel
from gpmetric.allocation.levels import Levels, LevelTable, level_table
from gpmetric.allocation.nsga2 import REFERENCE, FrontSettings, evolve, front, hypervolume
from gpmetric.allocation.search_budget import Budget
from gpmetric.allocation.variation import crossover, guided_switches, repair, switch
from gpmetric.data import cut_windows, read_text
from gpmetric.errors import InputError
from gpmetric.loading import load_model
from gpmetric.models import Model
from tests.allocation_helpers import drawn, pruned_model


@pytest.fixture(scope="module")
def model(tiny_gpt2: Path) -> Model:
    return load_model(str(tiny_gpt2), device="cpu")


@pytest.fixture(scope="module", params=["row", "layer", "n:m", "blocks"])
def table(model: Model, request: pytest.FixtureRequest) -> LevelTable:
    """Rows have many equal levels here, whole matrices few, blocks are three genes."""
    if request.param == "n:m":
        return level_table(model, "n:m")
    if request.param == "blocks":
        return level_table(model, "layer", "block")
    return level_table(model, request.param, "module" if request.param == "row" else "matrix")


@pytest.fixture(scope="module")
def tokens(model: Model, tiny_text: Path) -> Tensor:
    return cut_windows(read_text(str(tiny_text)), model.tokenizer, 24, 8, vocabulary=model.vocabulary).tokens


@pytest.fixture(autouse=True)
def _two_windows_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Model, "batch_tokens", 48)
    monkeypatch.setattr(objective_module, "_STAGES", 1)


# Variation


def in_range(table: LevelTable, levels: Levels) -> bool:
    return all(0 <= level < len(counts) for level, counts in zip(levels, table.removed, strict=True))


def test_switches_and_crossover_stay_in_range(table: LevelTable) -> None:
    rng = random.Random(0)
    candidates = [tuple(0 for _ in table.genes), tuple(len(counts) - 1 for counts in table.removed)]
    candidates += [drawn(table, rng) for _ in range(8)]
    moved = 0
    for seed in range(300):
        first, second = rng.choices(candidates, k=2)
        switched = switch(table, first, random.Random(seed))
        assert in_range(table, switched)
        assert sum(switched) == sum(first)  # as many levels up as down
        moved += switched != first
        crossed = crossover(first, second, random.Random(seed))
        assert all(level in pair for level, *pair in zip(crossed, first, second, strict=True))
        again = switch(table, first, random.Random(seed)), crossover(first, second, random.Random(seed))
        assert again == (switched, crossed)
    assert moved > 100


def test_a_repaired_candidate_is_as_near_as_single_steps_lead(table: LevelTable) -> None:
    """By brute force: no gene has another level next to its own, equal ones left out, that is nearer to the budget."""
    rng = random.Random(0)
    for seed in range(60):
        levels, removed = drawn(table, rng), int(rng.random() * table.entries)
        found = repair(table, levels, removed, random.Random(seed))
        assert found == repair(table, levels, removed, random.Random(seed))
        assert in_range(table, found)
        gap = abs(table.removes(found) - removed)
        assert gap <= abs(table.removes(levels) - removed)
        for gene, (counts, level) in enumerate(zip(table.removed, found, strict=True)):
            for beyond in (counts[counts > counts[level]][:1], counts[counts < counts[level]][-1:]):
                for count in beyond:
                    other = table.removes(found) - int(table.removed[gene][level]) + int(count)
                    assert abs(other - removed) >= gap


def test_a_budget_is_met_to_half_a_step(model: Model) -> None:
    """Steps of whole matrices: a 250th of the largest, to one weight."""
    table = level_table(model, "layer")
    step = max(int(np.diff(counts).max()) for counts in table.removed)
    rng = random.Random(0)
    for _ in range(30):
        removed = int(rng.uniform(0.1, 0.9) * table.entries)
        assert abs(table.removes(repair(table, drawn(table, rng), removed, rng)) - removed) <= (step + 1) / 2


@pytest.mark.parametrize("radius", [4, 8, RADIUS])
def test_guided_switches_pay_by_the_slopes(table: LevelTable, radius: int) -> None:
    rng = random.Random(0)
    moved = 0
    for seed in range(20):
        levels = drawn(table, rng)
        draw = np.random.default_rng(seed)
        slopes = []
        for counts, level in zip(table.removed, levels, strict=True):
            slope = draw.normal(size=len(counts)).cumsum()
            slope -= slope[level]
            unknown = draw.random(len(counts)) < 0.1
            unknown |= np.abs(np.arange(len(counts)) - level) > RADIUS
            unknown[level] = False
            slope[unknown] = np.nan
            slopes.append(slope)
        child = guided_switches(levels, slopes, radius, random.Random(seed))
        assert child == guided_switches(levels, slopes, radius, random.Random(seed))
        assert in_range(table, child)
        assert sum(child) == sum(levels)
        assert max(abs(new - old) for new, old in zip(child, levels, strict=True)) <= radius
        change = sum(float(slope[level]) for slope, level in zip(slopes, child, strict=True))
        assert change < 0 or child == levels  # and no NaN
        moved += child != levels
    assert moved > 10
    silent = [np.full(len(counts), np.nan) for counts in table.removed]
    assert guided_switches(levels, silent, radius, rng) == levels


# Fronts


def candidates(*points: tuple[float, float]) -> list[Measured]:
    """From (sparsity, objective)."""
    return [Measured((index,), sparsity, [value]) for index, (sparsity, value) in enumerate(points)]


def test_hypervolume_by_hand() -> None:
    """Steps 0.4 * 1.5 + 0.2 * 1 + 0.2 * 0.2; a dominated point and one beyond the reference add nothing."""
    three = [(0.6, 1.0), (0.4, 0.5), (0.8, 1.8)]
    assert hypervolume(candidates(*three), 1) == pytest.approx(0.84)
    assert hypervolume(candidates(*three, (0.5, 1.5), (0.9, 3.0), (0.95, math.inf)), 1) == pytest.approx(0.84)
    assert hypervolume([], 1) == 0


def test_hypervolume_against_moocore() -> None:
    moocore = pytest.importorskip("moocore")
    draw = np.random.default_rng(0)
    for _ in range(20):
        points = draw.random((30, 2)) * (1, 2.5)
        counts = np.column_stack([points[:, 1], -points[:, 0]])
        expected = moocore.hypervolume(counts[counts[:, 0] < REFERENCE], ref=[REFERENCE, 0.0])
        assert hypervolume(candidates(*points.tolist()), 1) == pytest.approx(float(expected))


def test_a_front_by_brute_force() -> None:
    rng = random.Random(0)
    for _ in range(30):
        values = [0.1, 0.2, 0.5, 1.0, math.inf, math.nan]
        known = candidates(*[(rng.randint(1, 9) / 10, rng.choice(values)) for _ in range(20)])
        found = front(known, 1)
        for before, after in pairwise(found):
            assert before.sparsity < after.sparsity
            assert before.value(1) < after.value(1)
        points = {(one.value(1), one.sparsity) for one in known}
        best = {
            (value, sparsity)
            for value, sparsity in points
            if not any(v <= value and s >= sparsity for v, s in points - {(value, sparsity)})
        }
        assert {(one.value(1), one.sparsity) for one in found} == best
        assert all(math.isfinite(one.values[0]) for one in found[:-1])  # what is dead is at most the sparsest


def test_values_stay_where_logarithms_are_finite() -> None:
    for dead in (math.inf, math.nan, 1e9):
        assert Measured((0,), 0.5, [dead, 0.1]).value(2) == 50
    assert Measured((0,), 0.5, [-0.1]).value(1) == 1e-6
    assert Measured((0,), 0.5, [0.1, 0.3, 9.0]).value(2) == pytest.approx(0.2)


# The search and its log


class NotingObjective(CandidateObjective):
    """Notes what it is asked."""

    def __init__(self, pruned: PrunedModel, tokens: Tensor) -> None:
        super().__init__(pruned, tokens)
        self.asked: list[tuple[Any, ...]] = []

    def measure_all(self, asked: Sequence[Asked]) -> Iterator[list[float]]:
        for one, found in zip(asked, super().measure_all(asked), strict=True):
            self.asked.append(("values", *one))
            yield found

    def slopes(self, levels: Levels, last: int) -> list[np.ndarray]:
        self.asked.append(("slopes", levels, last))
        return super().slopes(levels, last)


@pytest.fixture(params=["row", "n:m"])
def pruned(model: Model, request: pytest.FixtureRequest) -> Iterator[PrunedModel]:
    mixed = request.param == "n:m"
    found = pruned_model(model, level_table(model, "n:m") if mixed else level_table(model, "row", "module"))
    yield found
    found.dense()


SMALL = Budget(evaluations=50)
MINE = {"seed": 1, "genes": "module"}


def uniform(table: LevelTable) -> list[Levels]:
    return [table.nearest([share] * len(table.genes)) for share in (0.4, 0.5, 0.6, 0.7, 0.8)]


def search(
    pruned: PrunedModel, tokens: Tensor, path: Path | None, budget: Budget = SMALL, *, resume: bool = False
) -> tuple[Any, list[tuple[Any, ...]]]:
    """The population, evaluations and tokens; what was measured for them."""
    meter, table = NotingObjective(pruned, tokens), pruned.table
    with EvaluationLog(table, meter, path, MINE, resume=resume) as log:
        population = evolve(log, uniform(table), FrontSettings(population=6), budget, random.Random(1))
        return (population, log.evaluations, log.tokens), meter.asked


def records(content: bytes) -> list[bytes]:
    """What is not the time."""
    return [line for line in content.splitlines(keepends=True) if b'"seconds"' not in line]


@pytest.mark.every(2)
@pytest.mark.slow
def test_a_search_goes_on_wherever_it_was_killed(pruned: PrunedModel, tokens: Tensor, tmp_path: Path) -> None:
    """Cut at ends of lines, next to them and inside: the same population, no figure measured twice, the same file."""
    whole = tmp_path / "whole.jsonl"
    expected, asked = search(pruned, tokens, whole)
    assert search(pruned, tokens, None) == (expected, asked)
    assert len(asked) == len(set(asked))
    assert {kind for kind, *_ in asked} == {"values", "slopes"}
    content = whole.read_bytes()
    assert len(records(content)) == 1 + len(asked)
    ends = [place + 1 for place, byte in enumerate(content) if byte == 10]
    count, fifth = len(ends), len(content) // 5
    cuts = [0, 1, ends[0] - 1, ends[0], ends[1], ends[count // 2], ends[-2], ends[-1]]
    cuts += [ends[count // 3] - 1, ends[count // 4] + 1, *range(fifth, len(content), fifth)]
    for cut in cuts:
        path = tmp_path / "cut.jsonl"
        path.write_bytes(content[:cut])
        whole_lines = content[: max(end for end in (0, *ends) if end <= cut)]  # settings come with the first record
        EvaluationLog(pruned.table, CandidateObjective(pruned, tokens), path, MINE, resume=True).__exit__(
            None, None, None
        )
        assert path.read_bytes() == whole_lines, cut
        known = max(0, len(records(whole_lines)) - 1)
        found, more = search(pruned, tokens, path, resume=True)
        assert found == expected, cut
        assert more == asked[known:], cut
        assert records(path.read_bytes()) == records(content), cut


def test_a_longer_budget_goes_on_behind(pruned: PrunedModel, tokens: Tensor, tmp_path: Path) -> None:
    """Rounds end at shares of the budget, so that what is known is asked again, and only what is not is measured."""
    path = tmp_path / "a.jsonl"
    _, asked = search(pruned, tokens, path)
    expected, fresh = search(pruned, tokens, None, Budget(evaluations=70))
    found, more = search(pruned, tokens, path, Budget(evaluations=70), resume=True)
    assert found == expected
    assert not set(more) & set(asked)
    assert set(more) <= set(fresh)


def test_what_a_search_returns(pruned: PrunedModel, tokens: Tensor) -> None:
    table = pruned.table
    (population, evaluations, _), asked = search(pruned, tokens, None)
    assert 30 <= evaluations <= 50
    assert evaluations == len({levels for kind, levels, *_ in asked if kind == "values"})
    assert population == front(population, 4)
    fresh = CandidateObjective(pruned, tokens)
    for one in population:
        assert one.values == fresh.measure(one.levels, 0, 4)
        assert one.sparsity == table.sparsity(one.levels)
        assert 0.39 < one.sparsity < 0.81
    begun = [Measured(levels, table.sparsity(levels), fresh.measure(levels, 0, 4)) for levels in uniform(table)]
    assert hypervolume(population, 4) > hypervolume(begun, 4)


@pytest.mark.slow
def test_a_search_ends_where_there_is_nothing_new(model: Model, tokens: Tensor) -> None:
    """Three genes of four levels: 64 candidates, fewer than the budget asks for."""
    pruned = pruned_model(model, level_table(model, "n:m", "block"))
    (population, evaluations, _), _ = search(pruned, tokens, None, Budget(evaluations=1000))
    assert evaluations <= 64
    assert population == front(population, 4)
    pruned.dense()


def test_a_search_by_the_clock_is_told_the_same_times(pruned: PrunedModel, tokens: Tensor, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    budget = Budget(minutes=0.01)
    expected, _ = search(pruned, tokens, path, budget)
    content = path.read_bytes()
    for _ in range(2):
        assert search(pruned, tokens, path, budget, resume=True) == (expected, [])
        assert path.read_bytes() == content


@pytest.mark.parametrize("minutes", [9, 14, 40, 90])
def test_a_search_ends_about_when_its_minutes_are_over(
    pruned: PrunedModel, tokens: Tensor, minutes: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch takes a minute, a backward pass three: whatever there is time for, and at least two on all batches."""
    now = [0.0]
    monkeypatch.setattr(budget_module, "time", SimpleNamespace(monotonic=lambda: now[0]))

    class Slow(NotingObjective):
        def measure_all(self, asked: Sequence[Asked]) -> Iterator[list[float]]:
            for (_, first, last), found in zip(asked, super().measure_all(asked), strict=True):
                now[0] += 60 * (last - first)
                yield found

        def slopes(self, levels: Levels, last: int) -> list[np.ndarray]:
            now[0] += 180 * last
            return super().slopes(levels, last)

    with EvaluationLog(pruned.table, Slow(pruned, tokens), None, MINE) as log:
        found = evolve(
            log, uniform(pruned.table), FrontSettings(population=6), Budget(minutes=minutes), random.Random(1)
        )
    whole = [one for one in log.candidates.values() if len(one.values) == 4]
    assert len(whole) >= 2
    assert found == front(whole, 4)
    assert now[0] / 60 <= max(11, 1.25 * minutes)  # five to begin with, and two on three more batches


def test_shares_of_a_budget(
    pruned: PrunedModel, tokens: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hand: 3 of 12 candidates, a batch of 48 tokens each, and three times as many for a backward pass."""
    now = iter([100.0, 106.0, 112.0, 500.0, 503.0])
    monkeypatch.setattr(budget_module, "time", SimpleNamespace(monotonic=lambda: next(now)))
    levels = [pruned.table.nearest([share] * len(pruned.table.genes)) for share in (0.1, 0.5, 0.75)]
    for resume in (False, True):
        with EvaluationLog(pruned.table, CandidateObjective(pruned, tokens), tmp_path / "a", resume=resume) as log:
            assert [log.measure(one, 1).levels for one in levels] == levels
            log.slopes(levels[1], 1)
            assert log.tokens == 3 * 48 + 3 * 48
            assert log.spent(Budget(evaluations=12, tokens=576, minutes=1)) == 0.5
            assert log.spent(Budget(evaluations=12, minutes=0.5)) == 0.4
            if resume:  # 3 s on from the last time known
                assert log.spent(Budget(minutes=1)) == 0.25


def test_slopes_and_dead_candidates_are_kept(pruned: PrunedModel, tokens: Tensor, tmp_path: Path) -> None:
    table = pruned.table
    levels = table.nearest([0.5] * len(table.genes))
    meter = CandidateObjective(pruned, tokens)
    exact = meter.slopes(levels, 2)
    with EvaluationLog(table, meter, tmp_path / "a") as log:
        told = log.slopes(levels, 2)
        hook = pruned.model.blocks[-1].module.register_forward_hook(lambda *_: torch.full((2, 24, 32), torch.nan))
        dead = log.measure(levels, 3)
        hook.remove()
        assert dead.values == [math.inf] * 3
    for counts, found, level in zip(exact, told, levels, strict=True):
        far = np.abs(np.arange(len(counts)) - level) > RADIUS
        assert np.isnan(found).tolist() == far.tolist()
        assert np.allclose(found[~far], counts[~far], rtol=1e-4, atol=0)
    with EvaluationLog(table, meter, tmp_path / "a", resume=True) as log:
        assert log.measure(levels, 3) == dead
        for found, again in zip(told, log.slopes(levels, 2), strict=True):
            assert np.array_equal(found, again, equal_nan=True)


@pytest.fixture
def written(pruned: PrunedModel, tokens: Tensor, tmp_path: Path) -> Path:
    search(pruned, tokens, tmp_path / "a.jsonl", Budget(evaluations=8))
    return tmp_path / "a.jsonl"


def test_files_that_are_refused_stay_as_they_are(pruned: PrunedModel, tokens: Tensor, written: Path) -> None:
    content = written.read_bytes()
    meter = CandidateObjective(pruned, tokens)
    with pytest.raises(InputError, match=r"^--ledger '.*a.jsonl' exists: go on with --resume, or name another$"):
        EvaluationLog(pruned.table, meter, written, MINE)
    for settings, told in (
        (MINE | {"seed": 2}, "is another search's: seed is 1 there, 2 here"),
        ({"seed": 1}, "is another search's: genes is 'module' there, None here"),
        (MINE | {"more": [1]}, r"is another search's: more is None there, \[1\] here"),
    ):
        with pytest.raises(InputError, match=told):
            EvaluationLog(pruned.table, meter, written, settings, resume=True)
    assert written.read_bytes() == content
    for foreign in (b"a poem", b"a poem\n", b"[1]\n", b'{"format": 0}\n', b"\xff\n"):
        written.write_bytes(foreign)
        with pytest.raises(InputError, match=r"is no ledger of gpmetric allocate|format is 0 there, 1 here"):
            EvaluationLog(pruned.table, meter, written, resume=True)
        assert written.read_bytes() == foreign
    with pytest.raises(InputError, match="cannot be used: Is a directory"):
        EvaluationLog(pruned.table, meter, written.parent, resume=True)


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b"5",
        b"\xff",
        b'{"seconds": null}',
        b'{"levels": [1], "first": 0, "values": ["x"]}',
        b'{"levels": [Infinity], "first": 0, "values": [1]}',
        b'{"levels": [1], "batches": 1, "slopes": [[1]]}',
    ],
)
def test_damaged_lines(pruned: PrunedModel, tokens: Tensor, written: Path, line: bytes) -> None:
    lines = written.read_bytes().splitlines()
    lines[3] = line
    written.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(InputError, match=r"^--ledger '.*a.jsonl' is damaged at line 4$"):
        search(pruned, tokens, written, resume=True)
