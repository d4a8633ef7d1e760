"""A model and its units opened for `gpmetric slim`: in its own process, and again in those that measure for it."""

from __future__ import annotations

from functools import partial

import torch

from gpmetric.evaluation.references import reference_bytes
from gpmetric.executors import Executor, Serial
from gpmetric.operands import needs_gradients
from gpmetric.session.listeners import Listener
from gpmetric.session.reopening import Reopening
from gpmetric.session.session import Session, open_session
from gpmetric.session.work import Work
from gpmetric.session.workers import is_small, make_executor, shared
from gpmetric.structured.draw_objective import REFERENCE_BYTES, DrawObjective
from gpmetric.structured.draws import Measurer
from gpmetric.structured.exchange import PIECES
from gpmetric.structured.export import check_format, stored_dtypes, written_bytes
from gpmetric.structured.groups import find_groups
from gpmetric.structured.repair import Repairer
from gpmetric.structured.request import ESTIMATORS, SlimRequest
from gpmetric.structured.scores import UnitSession, read_by, score_bytes
from gpmetric.structured.shrink import Shrinker
from gpmetric.structured.slim_checkpoint import COMPARED
from gpmetric.structured.starts import started_from

__all__ = ["STEPS", "draws_executor", "make_repairer", "open_units", "slim_work", "units_of"]

STEPS = 1000  # of a search whose length is told in minutes, or not at all


def slim_work(session: Session) -> Work:
    """What `slim` does with a session's model, which is shrunk wherever its weights are."""
    request, windows, model = session.inputs, session.windows, session.model
    assert isinstance(request, SlimRequest)
    search, validated = windows["search"].tokens, windows["validation"].tokens.numel()
    steps, groups = STEPS if request.steps is None else request.steps, find_groups(model, request.kinds)
    length, names = session.tokens.shape[1], started_from(request)
    models = PIECES if ESTIMATORS[request.estimator].rate is None else 2  # of a step; those given up early take less
    parameters = sum(parameter.numel() for parameter in model.module.parameters())
    work = Work(
        length=length,
        calibration=session.tokens.numel(),
        texts=validated,
        differentiated=needs_gradients(read_by(request.start)) or "taylor2" in names,
        one_graph="taylor2" in names,
        fixed=score_bytes(request.start, groups, products=request.mended == "least-squares"),
        copied=True,  # the rows and columns of a drawn model
        disk=written_bytes(model, request.form, request.sparsity * groups.parameters),
        kept=min(REFERENCE_BYTES, reference_bytes(request.objective, model, search)),
        forward=2 * session.tokens.numel() + models * steps * search.shape[1] + 5 * validated,
        resident=True,
        after=4 * (parameters + 3 * COMPARED * length * model.vocabulary),  # compared in fp32 with what was written
    )
    return shared(work, request, model)


def open_units(request: SlimRequest, listener: Listener | None = None) -> UnitSession:
    """Model, its units, and texts.

    Raises:
        InputError, ModelError: model or texts cannot be used.
    """
    return units_of(open_session(request, work=slim_work, listener=listener))


def units_of(session: Session) -> UnitSession:
    """The units of a session's model.

    Raises:
        InputError, ModelError: they cannot be told, or not be written as is asked for.
    """
    request = session.inputs
    assert isinstance(request, SlimRequest)
    if request.shared_out and is_small(session.model):
        torch.set_num_threads(1)  # whoever collects features has the same
    groups = find_groups(session.model, request.kinds)
    check_format(session.model, request.form, biases=request.add_bias, blocks=request.blocks)
    stored_dtypes(session.model)
    return UnitSession(session, groups, request.mended == "least-squares")


def make_repairer(request: SlimRequest, units: UnitSession) -> Repairer:
    """The repair that is asked for, of a dense model."""
    features = [] if request.mended == "none" else units.features
    return Repairer(units.groups, features, request.mended, add_bias=request.add_bias)


def draws_executor(request: SlimRequest, units: UnitSession, damping: float, here: Measurer) -> Executor:
    """Who measures the models that a search draws; `here` does it in this process."""
    if not request.shared_out:
        return Serial(here)
    workers, place = units.session.plan.workers, Reopening.of(units.session, request.models[0])
    return make_executor(request, [units.model], workers, _opened, (place, damping), partial(_measuring, here))


def _opened(place: Reopening, damping: float, threads: int) -> Measurer:
    torch.set_num_threads(threads)
    units, request = units_of(place.open()), place.inputs
    assert isinstance(request, SlimRequest)
    repairer, windows = make_repairer(request, units).damped(damping), units.session.windows["search"].tokens
    objective = DrawObjective(units.model, windows, request.objective, request.batch, request.seed)
    return Measurer(Shrinker(units.model, units.groups), repairer, objective)


def _measuring(measurer: Measurer, threads: int) -> Measurer:
    torch.set_num_threads(threads)
    return measurer
