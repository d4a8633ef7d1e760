"""A campaign's search alone, for who measures its formulas elsewhere: no baselines, no held-out text, no verdict."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from gpmetric.evolution.campaign import Campaign
from gpmetric.evolution.discover import campaign_settings
from gpmetric.evolution.held_out import choose_finalists
from gpmetric.evolution.ledger import Ledger
from gpmetric.evolution.multi_model import label_targets
from gpmetric.evolution.request import DiscoverRequest
from gpmetric.evolution.search_config import make_config
from gpmetric.evolution.selection import Individual
from gpmetric.evolution.workplace import collect_statistics, make_executor
from gpmetric.executors import TaskClock
from gpmetric.session.listeners import Progress
from gpmetric.session.session import Session
from gpmetric.session.workers import torch_threads

__all__ = ["evolve"]


def evolve(
    request: DiscoverRequest,
    session: Session,
    count: int,
    clock: TaskClock,
    progress: Progress,
    told: Callable[[int, Sequence[Individual], int], None],
) -> tuple[list[str], int, bool]:
    """The first metrics of the front that differ in more than constants, evaluations paid for, whether time cut it.

    The best is the first. What time has cut goes on with the request's ledger, if `resume` says so.

    Args:
        request: what formulas are made of, and what they are measured by; its ledger keeps the search if it has one.
        session: dense; its windows of calibration and search are read.
        count: metrics at most.
        clock: ends the search.
        progress: told of calibrating.
        told: called after every generation with its number, the front, and the evaluations so far.
    """
    name = Path(session.model.name).name
    sessions = {name: replace(session, inputs=request, dense=None)}
    statistics = {name: collect_statistics(request, sessions[name], progress)}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gpmetric-")))
        path = request.ledger or folder / "campaign.sqlite"
        ledger = stack.enter_context(Ledger.open(path, campaign_settings(request, sessions), resume=request.resume))
        stack.enter_context(torch_threads())  # an evaluator in this process takes its own number
        executor = stack.enter_context(make_executor(request, sessions, statistics))
        executor.clock = clock
        labels = tuple(target.label for target in label_targets(request.target, sessions))

        def tell(number: int, campaign: Campaign) -> None:
            told(number, campaign.front(), ledger.counts()["paid"])

        campaign = Campaign(make_config(request, sessions, labels), ledger, executor, on_generation=tell)
        campaign.run()
        finalists, _ = choose_finalists(campaign.front(), count)
        cut = clock.limited and campaign.wants_more()
        return [metric.name for metric in finalists], ledger.counts()["paid"], cut
