"""`gpmetric tune`: the best pruned model at a budget, its parts chosen together on validation text."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from gpmetric.files import finite
from gpmetric.functions import as_function
from gpmetric.options import command_line
from gpmetric.pruning.checkpoint import stored_layers
from gpmetric.pruning.output_folder import check_folder, check_room
from gpmetric.pruning.protocol import Protocol, check_targets
from gpmetric.pruning.prune import run_prune
from gpmetric.pruning.recipe import Recipe, read_recipe, write_recipe
from gpmetric.pruning.requests import PruneRequest
from gpmetric.results import TuneResult
from gpmetric.session.deadline import Deadline
from gpmetric.session.inputs import Inputs
from gpmetric.session.session import Session, open_session
from gpmetric.session.work import Work
from gpmetric.targets import parse_target
from gpmetric.tensor_file import weight_bytes
from gpmetric.tuning.choice import Choice, search_work
from gpmetric.tuning.listener import TuneListener
from gpmetric.tuning.parts import SOLVER, first_recipe, methods
from gpmetric.tuning.request import TuneRequest
from gpmetric.tuning.structured import run_structured, structured_work
from gpmetric.tuning.trial_log import SHARES
from gpmetric.tuning.trials import Trials

__all__ = ["run_tune", "tune", "tune_work"]

_LOG = logging.getLogger(__name__)


def run_tune(
    request: TuneRequest, listener: TuneListener | None = None, started: float | None = None
) -> dict[str, Any]:
    """Finds a recipe for a model and a target, prunes by it, and says what each of its parts is worth.

    Everything is decided on the validation text, by successive halving; formulas and allocations are searched on the
    search text. Wanda and SparseGPT at uniform sparsity are among the recipes, so that what is chosen is not worse than
    they are on validation, unless there was no time to measure them, which is said. Stopped, the same command with
    `--ledger` and `--resume` measures nothing again, and goes on with searches that time had cut. The best recipe so
    far is in a file beside the output until the checkpoint has it.
    With `structured`, units are chosen in the same way: published rules are among the recipes, and slim's search, which
    begins from the best of them, goes on where it was stopped.

    Args:
        request: of which model, at which target.
        listener: told of every trial.
        started: time.monotonic() at which `minutes` began; now by default.

    Returns:
        `recipe`, as its file holds it, and its `excess` log-loss on validation, in nats per token, `test_excess` on the
        first text that is read once; `table`, the same of the recipe without each of its parts (these alone are
        `ablation`) and of the rivals; `recipes`, those measured on all of validation, the best first;
        `experts`, of a mixture, what `prune` says of them;
        `trials`, all that was measured, and what was `cut`; `pruned`, what `prune` or `slim` says of the checkpoint.

    Raises:
        InputError: for anything that cannot be used, before the model runs.
        GpmetricError: time was over before one recipe was measured, or before the checkpoint was written.
    """
    told, deadline = listener or TuneListener(), Deadline.starting(request.minutes, started)
    output = request.output
    assert output is not None
    read = (request.model, request.calibration, request.search, request.validation, request.text, request.ledger)
    check_folder(output, request.force, [Path(name) for name in read if name is not None])
    if request.structured:
        return run_structured(request, told, deadline)
    with _kept(request) as (pruning, keep_best):
        document = _chosen(request, told, deadline, keep_best)
        gc.collect()  # models are in reference cycles: the next one would be loaded beside this one
        told.step("pruning")
        minutes = request.minutes and max(0.01, deadline.left / 60)
        assert pruning.recipe is not None
        found = run_prune(replace(pruning, minutes=minutes, **read_recipe(pruning.recipe).options), told)
    pruned = {key: found[key] for key in ("output", "sparsity", "dense", "perplexity", "seconds", "text")}
    experts = {"experts": found["experts"]} if "experts" in found else {}
    result: dict[str, Any] = finite(document | experts | {"pruned": pruned, "seconds": deadline.elapsed})
    return result


tune = as_function("tune", TuneRequest, run_tune, "model", result=TuneResult)


@contextmanager
def _kept(request: TuneRequest) -> Iterator[tuple[PruneRequest, Callable[[Recipe], None]]]:
    """What prunes by a file beside the output, and what writes a recipe there; the file is gone if the block ends well.

    Where it does not end well, whatever the reason, the file stays, and how to go on with it is said.
    """
    assert request.output is not None
    path = request.recipe_beside
    names = {one.name for one in fields(Inputs)} - {one.name for one in fields(Recipe)}
    cut = "demo:test" if request.model is None else f"{request.calibration}#validation"
    pruning = PruneRequest(
        **{name: getattr(request, name) for name in names}, recipe=path, output=request.output, force=request.force,
        text=request.text or request.validation or cut,
    )  # fmt: skip
    written: list[Recipe] = []

    def keep_best(recipe: Recipe) -> None:
        write_recipe(recipe, path)
        written.append(recipe)

    try:
        yield pruning, keep_best
    except BaseException:
        if written:
            _LOG.warning(
                "the best recipe so far is in %r: %s", str(path), command_line("prune", replace(pruning, minutes=None))
            )
        raise
    path.unlink(missing_ok=True)


def _chosen(
    request: TuneRequest, told: TuneListener, deadline: Deadline, keep_best: Callable[[Recipe], None]
) -> dict[str, Any]:
    """What is said of the recipe that is chosen, which was kept."""
    session = open_session(request, work=tune_work, listener=told)
    stored_layers(session.model)  # what cannot be written is not searched for first
    assert request.output is not None
    assert session.model.folder is not None
    check_room(request.output, weight_bytes(session.model.folder))
    check_targets(session.model, [parse_target(request.target)])
    chosen = {name: getattr(request, name) for name in ("target", "include", "exclude", "statistics_dtype")}
    settings = {"model": session.model.digest, "dtype": session.model.dtype, **chosen} | {
        name: windows.tokens_digest for name, windows in session.windows.items()
    }
    settings["texts"] = [one.tokens_digest for one in session.evaluated]
    progress = deadline.watching(told.progress)
    with Trials(
        session, deadline, progress, request.ledger, settings, resume=request.resume, keep_best=keep_best
    ) as trials:
        choice = Choice(request, trials, told, deadline)
        return choice.describe(choice.run())


def tune_work(session: Session) -> Work:
    """What `tune` does with a session's model, as far as it can be told beforehand."""
    request = session.inputs
    assert isinstance(request, TuneRequest)
    if request.structured:
        return structured_work(session)
    plain = first_recipe(request, session)
    metrics = [session.metric(one.metric) for one in methods(plain, request.metric)]
    update, fit = SOLVER
    texts = session.windows["validation"].tokens.numel()
    rules, permute = len(SHARES) * len(metrics), bool(parse_target(request.target).group)
    work = Protocol(session, one_shot=False).work(metrics, update, fit=fit, rules=rules, texts=texts, permute=permute)
    assert session.model.folder is not None
    work = replace(work, fits_blocks=True, disk=weight_bytes(session.model.folder))
    searched = search_work(request, session)
    if searched is None:
        return work
    return replace(
        searched, block=searched.block | work.block, texts=max(searched.texts, work.texts),
        forward=searched.forward + work.forward, fits_blocks=True, permutes=permute, disk=work.disk,
    )  # fmt: skip
