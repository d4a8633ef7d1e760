"""`gpmetric tune --structured`: the best model without some of its channels, heads and layers, chosen on validation."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from gpmetric.errors import GpmetricError
from gpmetric.files import finite
from gpmetric.pruning.output_folder import check_room, replacing
from gpmetric.session.deadline import Deadline
from gpmetric.session.session import Session, open_session
from gpmetric.session.work import Work
from gpmetric.structured.export import check_format, stored_dtypes, written_bytes
from gpmetric.structured.groups import find_groups
from gpmetric.structured.open_units import STEPS, slim_work
from gpmetric.structured.scores import UnitSession
from gpmetric.structured.shrink import Shrinker
from gpmetric.structured.slim_checkpoint import describe_slim, write_slimmed
from gpmetric.tuning.listener import TuneListener
from gpmetric.tuning.request import TuneRequest
from gpmetric.tuning.steps import Steps
from gpmetric.tuning.trial_log import Measurement
from gpmetric.tuning.unit_recipes import (
    UnitRecipe,
    dampings,
    every_kind,
    left_out,
    published,
    shapes,
    slim_request,
    starts_and_repairs,
)
from gpmetric.tuning.unit_trials import UnitTrials

__all__ = ["UnitChoice", "run_structured", "structured_work"]

_DEFAULT = "hetero"  # format that recipes are compared in where none is named; it holds whatever is found
# Of the time before the table, when the search for what stays must have begun. On llama-05m at 0.3, 64 windows of 256
# tokens, 4 minutes, 0.4 left half of the recipes unmeasured on all windows, and 681 steps found nothing better
# than their start: excess on validation 0.1175, with an eighth of the way 0.120, with all of it 0.145.
_CHOOSING = 0.6
_FEWEST = 25  # steps that it is worth while for
_PASSES = 3.0  # forward passes of a step, backwards and forwards between shapes included
_TABLE = 12  # recipes that the table may have to measure
_WRITING = 3.0  # times what measuring takes, to write, read and compare
_CAUTION = 1.3  # times what was measured before, on a machine that is busy


@dataclass
class UnitChoice(Steps[UnitRecipe]):
    """The steps to a model of fewer units.

    Attributes:
        opened: seconds to open the model, as a fresh process does that reads what is written.
    """

    trials: UnitTrials
    opened: float = 0.0

    def run(self) -> Measurement[UnitRecipe]:
        """The best recipe on validation.

        Raises:
            GpmetricError: time was over before one was measured, or none can be used.
        """
        named = self.request.format
        form = named or _DEFAULT
        forms = (named,) if named else ("uniform", _DEFAULT)  # of equals, what opens everywhere
        self.told.dense({"validation": math.exp(self.trials.dense())})
        self.told.step("published recipes")
        rivals = published(form)
        self.measure(rivals)
        for one in rivals:
            if not any(trial.recipe == one for trial in self.trials.found):
                self.cut(f"{one.start}, which the choice was not compared with")
        if self.best is None:
            raise self.nothing()
        left = self.deadline.left
        end = self.deadline.end - min(self._after(), left / 2)
        until = self.deadline.now() + _CHOOSING * (end - self.deadline.now())
        model = self.trials.session.model
        biased = all(one.output.bias is not None for one in find_groups(model).sublayers)
        self.halve("starts and repairs", starts_and_repairs(form, biased=biased, may=_may(model, form)), until)
        if damped := dampings(self.best.recipe):
            self.halve("dampings", damped, until)
        self.halve("what goes as one, and where", shapes(self.best.recipe, forms), until)
        with self.lasting("a search for what stays"):
            self._search(end)
        self.trials.recall()
        while self._compare(rivals):  # a part that does harm is left out, and the others are looked at again
            self.told.step("without a part that does harm")
        return self.best

    def _after(self) -> float:
        """Seconds that the table and the writing are thought to take."""
        assert self.best is not None
        session = self.trials.session
        texts = sum(len(one.tokens) for one in session.evaluated) / len(session.windows["validation"].tokens)
        each = self.trials.expected(self.best.recipe, 1.0)
        return _CAUTION * (self.opened + each * (1 + _TABLE * (1 + texts) + _WRITING))

    def _search(self, end: float) -> None:
        """What slim's search finds from the best recipe; the start is kept if better.

        A search that the ledger has begun goes on, and one that is over there is as it was.
        """
        assert self.best is not None
        known = self.trials.searched.get("units", {})
        recipe = UnitRecipe.of(known["recipe"]) if known else self.best.recipe
        minutes, steps = self._minutes(recipe, end), STEPS if self.request.minutes is None else None
        if "steps" in known:
            minutes, steps = None, int(known["steps"])
        if minutes == 0:
            self.cut("a search for what stays" if not known else "the rest of the search for what stays")
            if not known:
                return
            minutes = 1e-9  # where it was stopped
        self.told.step("a search for what stays")
        begun = {"recipe": recipe.document()}
        if not known:
            self.trials.keep("units", begun)
        steps = self.trials.search(recipe, self.told, steps, minutes, self.request.units_ledger)
        if "steps" not in known:
            self.trials.keep("units", begun | {"steps": steps})
        if not self.measure([replace(recipe, steps=steps)]):
            self.cut("what the search for what stays found")

    def _minutes(self, recipe: UnitRecipe, end: float) -> float | None:
        """Of a search that must be over by `end`; 0 where it is not worth while, None without a limit."""
        if self.request.minutes is None:
            return None
        left = end - self.deadline.now()
        step = _PASSES * self.trials.expected(recipe, 1.0) / len(self.trials.session.windows["validation"].tokens)
        return left / 60 if left > _FEWEST * step else 0.0

    def _compare(self, rivals: list[UnitRecipe]) -> bool:
        """The table: the best, the published ones, and the best without each of its parts."""
        assert self.best is not None
        best = self.best.recipe
        rows = {f"{one.start}, as published": one for one in rivals}
        rows |= {f"without {part}": recipe for part, recipe in left_out(best)}
        each = self.trials.expected(best, 1.0)
        return self.compare(rows, self.deadline.end - _CAUTION * (self.opened + _WRITING * each))


def run_structured(request: TuneRequest, told: TuneListener, deadline: Deadline) -> dict[str, Any]:
    """Finds a recipe, writes the model that it leaves, and says what each of its parts is worth; see `run_tune`."""
    session = open_session(request, work=structured_work, listener=told)
    stored_dtypes(session.model)
    opened = deadline.elapsed
    form = request.format or _DEFAULT
    asked = slim_request(request, UnitRecipe("auto", every_kind(layers=False), form))
    units = UnitSession(replace(session, inputs=asked), find_groups(session.model, asked.kinds), products=True)
    assert request.output is not None
    check_room(request.output, written_bytes(session.model, form, asked.sparsity * units.groups.parameters))
    windows = {name: one.tokens_digest for name, one in session.windows.items()}
    settings = {"model": session.model.digest, "dtype": session.model.dtype, "structured": True, **windows} | {
        "target": request.target, "format": request.format, "seed": request.seed,
        "device": session.model.device.type,
        "texts": [one.tokens_digest for one in session.evaluated],
    }  # fmt: skip
    progress = deadline.watching(told.progress)
    with UnitTrials(request, units, deadline, progress, request.ledger, settings, resume=request.resume) as trials:
        choice = UnitChoice(request, trials, told, deadline, opened=opened)
        best = choice.run()
        document = choice.describe(best)
        told.step("writing")
        written = _written(request, trials, best.recipe, told)
    result: dict[str, Any] = finite(document | {"pruned": written, "seconds": deadline.elapsed})
    return result


def structured_work(session: Session) -> Work:
    """What `tune --structured` does with a session's model, as far as it can be told beforehand."""
    request = session.inputs
    assert isinstance(request, TuneRequest)
    whole = UnitRecipe("auto", every_kind(layers=True), _DEFAULT, repair="least-squares")
    work = slim_work(replace(session, inputs=slim_request(request, whole)))
    tested = sum(one.tokens.numel() for one in session.evaluated)
    measured = len(starts_and_repairs(_DEFAULT, biased=False, may=True)) * work.texts + _TABLE * (work.texts + tested)
    return replace(work, texts=max(work.texts, tested), forward=work.forward + measured)


def _written(request: TuneRequest, trials: UnitTrials, recipe: UnitRecipe, told: TuneListener) -> dict[str, Any]:
    """What is said of the checkpoint, which is written as `gpmetric slim` does and read in a fresh process."""
    assert request.output is not None
    session, slimmed, asked = trials.session, trials.slimmed(recipe), slim_request(request, recipe)
    trials.forget()  # before the model is compared in float32 with what is written
    windows, groups = next(iter(session.evaluated), session.windows["validation"]), slimmed.groups
    sparsity = groups.removed(slimmed.kept) / groups.parameters
    before = sum(parameter.numel() for parameter in session.model.module.parameters())
    dense = trials.dense_on(windows.tokens) if session.evaluated else trials.dense()
    made = describe_slim(asked, UnitSession(session, groups)) | {
        "sparsity": sparsity, "text": windows.describe(), "recipe": recipe.document(), "dense": math.exp(dense),
    }  # fmt: skip
    with replacing(request.output, request.force) as partial:
        shrinker = Shrinker(session.model, groups)
        manifest = write_slimmed(session.model, shrinker, slimmed, recipe.format, partial, windows, made)
    return {
        "output": str(request.output), "sparsity": sparsity, "dense": math.exp(dense), "text": windows.describe(),
        "parameters_before": before, "asked": asked.sparsity,
    } | {name: manifest[name] for name in ("perplexity", "parameters_after", "bytes", "widths", "format")}  # fmt: skip


def _may(model: Any, form: str) -> bool:
    """Whether a format can hold biases of outputs that have none."""
    try:
        check_format(model, form, biases=True)
    except GpmetricError:
        return False
    return True
