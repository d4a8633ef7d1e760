"""A campaign from a model and texts to a winner: `gpmetric discover`.

Three disjoint texts serve calibration, search and the choice of the winner; a fourth is read once, at the end, for the
winner and every baseline.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from gpmetric.calibration.cache import cache_key, cached_statistics, default_cache, estimate_bytes
from gpmetric.calibration.collect import Statistics, collect_statistics
from gpmetric.data import Windows, overlap
from gpmetric.errors import GpmetricError
from gpmetric.evaluation.perplexity import perplexity
from gpmetric.evaluation.windows import check_length
from gpmetric.evolution.campaign import Campaign, Plan
from gpmetric.evolution.evaluator import Workplace, open_workplace
from gpmetric.evolution.executors import Executor, LocalProcesses, Serial
from gpmetric.evolution.ledger import Evaluation, Ledger
from gpmetric.evolution.request import Request, check_request, foreign_to
from gpmetric.evolution.selection import Individual
from gpmetric.evolution.splits import SPLITS, name_sources, read_splits
from gpmetric.evolution.verdict import Judge, choose_finalists, choose_winner, describe, masks_only
from gpmetric.expression import parse
from gpmetric.models import Model, load_model
from gpmetric.provenance import finite, versions
from gpmetric.pruning.bench import check_targets
from gpmetric.pruning.metrics import BASELINES, Update, resolve_metric
from gpmetric.pruning.target import parse_target

__all__ = ["DiscoverListener", "discover", "run_campaign"]

_HUNG = 3600.0  # seconds of one task after which its worker is taken for hung and replaced
_FINALISTS = 12  # front members compared on validation
_DEFAULT_EVALUATIONS = 300
_DETERMINING = (
    "target",
    "update",
    "operands",
    "primitives",
    "start",
    "population",
    "max_nodes",
    "seed",
    "include",
    "exclude",
)
_SMALL = 50_000_000  # parameters up to which every core gets a copy of the model


class DiscoverListener:
    """What a campaign tells while it runs; every method may be overridden."""

    def progress(self, what: str, done: int, total: int) -> None:
        """A step before the search has come so far."""

    def dense(self, ppl: Mapping[str, float]) -> None:
        """Perplexity of the dense model by split, before anything is pruned."""

    def baselines(self, excess: Mapping[str, Mapping[str, float]]) -> None:
        """The baselines' excess on validation by name and target."""

    def generation(self, number: int, front: Sequence[Individual], counts: Mapping[str, int]) -> None:
        """A generation is finished."""


def discover(model: str | None = None, *, ledger: str | Path, resume: bool = False, **options: Any) -> dict[str, Any]:
    """Runs a campaign to its end: `gpmetric.discover("DIR", text="t.txt", minutes=30, ledger="campaign.sqlite")`.

    A script that calls it with more than one worker needs `if __name__ == "__main__":`, since workers import it.

    Args:
        model: a directory or Hub name; None is the demo model.
        ledger: the campaign's SQLite file.
        resume: go on with the ledger if it is there.
        options: the fields of `Request`, as on the command line.

    Returns:
        The JSON document of `gpmetric discover`.

    Raises:
        InputError, GpmetricError: as `run_campaign`.
    """
    return run_campaign(Request(model=model, **options), Path(ledger), resume=resume)


def run_campaign(
    request: Request,
    ledger: Path,
    *,
    resume: bool = False,
    listener: DiscoverListener | None = None,
    started: float | None = None,
) -> dict[str, Any]:
    """Runs a campaign to its end and returns the JSON document of `gpmetric discover`.

    Args:
        request: what to search for and with.
        ledger: the campaign's SQLite file; whatever is interrupted, nothing in it is computed again.
        resume: go on with the ledger if it is there; a finished one gives its result again.
        listener: told of progress.
        started: time.monotonic() at which `minutes` begin; now by default.

    Raises:
        InputError: for anything that cannot be used, before the model runs.
        GpmetricError: the work failed; the ledger keeps what was done.
    """
    began = time.monotonic() if started is None else started
    told = listener or DiscoverListener()
    update = check_request(request)
    sources = name_sources(request.model, request.text, {split: getattr(request, split) for split in SPLITS})
    model = load_model(
        request.model, device=request.device, dtype=request.dtype, include=request.include, exclude=request.exclude
    )
    check_targets(model, [parse_target(text) for text in request.target])
    length = check_length(model, request.sequence_length)
    counts = {
        "calibration": request.samples,
        "search": request.search_windows,
        "validation": request.windows,
        "test": request.windows,
    }
    splits = read_splits(model, request.text or sources, length, counts, request.seed if request.shuffle else None)
    with ExitStack() as stack:
        book = stack.enter_context(Ledger.open(ledger, _settings(request, model, splits), resume=resume))
        finished = book.result()
        if finished is not None:
            return finished
        loaded = time.monotonic()
        statistics = _statistics(request, model, splits["calibration"], update, told)
        calibrated = time.monotonic()
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gpmetric-")))
        stack.enter_context(_threads(torch.get_num_threads()))  # an evaluator in this process takes one
        executor = stack.enter_context(_executor(request, model, splits, statistics, folder, update))
        deadline = None if request.minutes is None else began + 60 * request.minutes
        samples = splits["calibration"].tokens.shape
        verdict, steps = _search(request, book, executor, update, (samples[0], samples[1]), deadline, told)
        seconds = {"load": loaded - began, "calibration": calibrated - loaded, **steps}
        seconds["total"] = time.monotonic() - began
        result: dict[str, Any] = finite(verdict | _circumstances(request, model, splits, update, book))
        book.save_result(result, seconds)
    return result | {"seconds": seconds}


def _settings(request: Request, model: Model, splits: Mapping[str, Windows]) -> dict[str, Any]:
    """What determines the campaign's result; a resumed one must agree in all of it but its budget."""
    chosen = {name: getattr(request, name) for name in _DETERMINING}
    texts = {split: windows.tokens_digest for split, windows in splits.items()}
    budget = {name: getattr(request, name) for name in ("generations", "evaluations", "minutes")}
    return {"model": model.digest, "dtype": model.dtype, "tokens": texts, **chosen, **budget}


def _statistics(request: Request, model: Model, calibration: Windows, update: Update, told: DiscoverListener) -> Path:
    """The file of the dense model's statistics, computed if the cache does not have it."""
    gradients = _needs_gradients(request)
    gram = "D" in request.operands or update != "none"
    folder = request.cache or default_cache()
    _check_room(folder, estimate_bytes(model, gradients=gradients, gram=gram))
    key = cache_key(model, calibration.tokens, {"gradients": gradients, "gram": gram})

    def compute() -> Statistics:
        # One thread where a model is small: D differs in its last bits between thread counts
        with _threads(1 if _is_small(model) else torch.get_num_threads()):
            return collect_statistics(
                model,
                calibration.tokens,
                gradients=gradients,
                gram=gram,
                chunk_layers=request.chunk_layers,
                progress=lambda done, total: told.progress("calibration", done, total),
            )

    return cached_statistics(folder, key, compute)[1]


def _check_room(folder: Path, size: int) -> None:
    """Refuses to start what the disk cannot hold."""
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if size > free:
        raise GpmetricError(
            f"the statistics need {size / 2**30:.1f} GiB, but {str(folder)!r} has {free / 2**30:.1f} GiB free: "
            "choose another --cache, fewer --operands, or --include fewer layers"
        )


def _executor(
    request: Request, model: Model, splits: Mapping[str, Windows], statistics: Path, folder: Path, update: Update
) -> Executor:
    """Where candidates are evaluated: a process per worker, or this one."""
    tokens = folder / "tokens.safetensors"
    save_file({split: windows.tokens for split, windows in splits.items()}, tokens)
    place = Workplace(
        request.model, request.device, request.dtype, request.include, request.exclude, str(statistics), str(tokens),
        request.target, update,
    )  # fmt: skip
    workers = request.workers or (_cores() if _is_small(model) else 1)
    if workers > 1:
        return LocalProcesses(open_workplace, (place.to_json(),), workers, timeout=_HUNG)
    return Serial(open_workplace(place.to_json(), model))


def _is_small(model: Model) -> bool:
    return bool(model.module.num_parameters() <= _SMALL) and model.device.type == "cpu"


def _cores() -> int:
    """Cores this process may use, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Torch threads inside the context; the caller's number afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _search(
    request: Request,
    book: Ledger,
    executor: Executor,
    update: Update,
    samples: tuple[int, int],
    deadline: float | None,
    told: DiscoverListener,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Baselines on validation, the generation loop, the finalists, and the test: the verdict, and seconds by step."""
    judge = Judge(executor, request.target, update, book.heartbeat)
    opening = time.monotonic()
    dense = {split: judge.dense_loss(split) for split in ("search", "validation")}
    told.dense({split: perplexity(loss) for split, loss in dense.items()})
    start = time.monotonic()
    names = _baselines(request)
    baselines = judge.excess(names, "validation", dense["validation"])
    told.baselines(baselines)
    per_formula = (time.monotonic() - start) / len(names)

    def out_of_time() -> bool:
        """Whether what comes after the search would no longer fit: workers anew, finalists, winner and baselines."""
        evaluated = book.counts()["paid"]
        left = start - opening + 1.2 * per_formula * (min(_FINALISTS, evaluated) + 1 + len(names))
        return deadline is not None and time.monotonic() > deadline - left and bool(book.evaluations("done"))

    searching = time.monotonic()
    campaign = Campaign(
        _plan(request, samples),
        book,
        executor,
        dense["search"],
        out_of_time=out_of_time,
        on_generation=lambda number, campaign: told.generation(number, campaign.front(), book.counts()),
    )
    campaign.run()
    judging = time.monotonic()
    front = campaign.front()
    finalists = judge.excess(choose_finalists(front, _FINALISTS), "validation", dense["validation"])
    winner = choose_winner(finalists, baselines)
    dense["test"] = judge.dense_loss("test")
    tested = judge.excess([winner, *names], "test", dense["test"])
    verdict = {
        "winner": _row(winner) | describe(tested[winner], dense["test"]) | {"validation": finalists[winner]},
        "front": [
            _row(str(one.expression))
            | {"excess": one.excess, "mean_excess": one.mean, "validation": finalists.get(str(one.expression))}
            for one in front
        ],
        "baselines": {
            name: describe(tested[name], dense["test"])
            | {"validation": baselines[name], "masks_only": masks_only(name)}
            for name in names
        },
        "dense": {split: perplexity(loss) for split, loss in dense.items()},
    }
    return verdict, {
        "baselines": searching - start,
        "search": judging - searching,
        "final": time.monotonic() - judging,
        "per_evaluation": _time_split(book.evaluations()),
    }


def _circumstances(
    request: Request, model: Model, splits: Mapping[str, Windows], update: Update, book: Ledger
) -> dict[str, Any]:
    """What the verdict rests on."""
    counts = book.counts()
    shared = {split: {"overlap": share} for split, share in overlap(splits).items()}
    return {
        "evaluations": counts["paid"],
        "unique_masks": counts["unique_masks"],
        "counts": counts,
        "finalists": _FINALISTS,
        "splits": {split: windows.describe() | shared[split] for split, windows in splits.items()},
        "model": model.name,
        "model_sha256": model.digest,
        "dtype": model.dtype,
        "device": str(model.device),
        "targets": list(request.target),
        "update": update,
        "seed": request.seed,
        "sequence_length": splits["search"].tokens.shape[1],
        "versions": versions(),
    }


def _time_split(rows: Sequence[Evaluation]) -> dict[str, float]:
    """Mean seconds of an evaluation by what they went into: nothing is loaded, calibrated or tokenised in one."""
    done = [row for row in rows if row.seconds_score is not None and row.seconds_loss is not None]
    count = max(1, len(done))
    return {
        "score_and_mask": sum(row.seconds_score or 0.0 for row in done) / count,
        "prune_and_loss": sum(row.seconds_loss or 0.0 for row in done) / count,
    }


def _row(formula: str) -> dict[str, Any]:
    expression = parse(formula)
    return {"formula": formula, "nodes": len(expression), "operands": list(expression.operands)}


def _baselines(request: Request) -> list[str]:
    """The baselines to compare with: all of them, but for those of gradients where none are collected."""
    gradients = _needs_gradients(request)
    return [name for name in BASELINES if gradients or not resolve_metric(name).needs_gradients]


def _needs_gradients(request: Request) -> bool:
    return bool({"G", "H"} & set(request.operands))


def _plan(request: Request, samples: tuple[int, int]) -> Plan:
    """The plan with its start formulas spelled out: mask-only baselines first, then the user's.

    Args:
        samples: calibration sequences and their length, which GBLM's balance depends on.
    """
    within = (name for name in BASELINES if not foreign_to(request, resolve_metric(name).expression))
    names = [name for name in within if masks_only(name)]
    start = [str(resolve_metric(name, *samples).expression) for name in (*names, *request.start)]
    unlimited = request.generations is None and request.evaluations is None and request.minutes is None
    return Plan(
        targets=request.target,
        operands=request.operands,
        primitives=request.primitives,
        start=tuple(start),
        population=request.population,
        max_nodes=request.max_nodes,
        seed=request.seed,
        generations=request.generations,
        evaluations=_DEFAULT_EVALUATIONS if unlimited else request.evaluations,
    )
