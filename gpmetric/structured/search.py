"""The search for what stays: draw, measure, update, until the steps or the minutes are over."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from gpmetric.errors import GpmetricError
from gpmetric.structured.ledger import Ledger, State
from gpmetric.structured.measure import Measure
from gpmetric.structured.policy import Policy, draw, entropy
from gpmetric.structured.repair import Repairer
from gpmetric.structured.shrink import Shrinker

__all__ = ["RATES", "Settings", "learn"]

# Estimator -> rate of the first step. Excess on validation at 0.3, 1,500 steps of one window, gpt2-05m and llama-05m:
# rloo 0.076 and 0.197 at 0.02, 0.097 and 0.196 at 0.06; paper before shares were judged, starts 0.227 and 0.365:
# 0.199 and 0.313 at 0.005, 0.183 and 0.300 at 0.01, 0.193 and 0.319 at 0.02, 0.239 and 0.384 at 0.05.
RATES = {"rloo": 0.02, "paper": 0.01}
_REPORT = 25  # steps between two lines of the ledger
_STATE = 4  # lines between two that a search can go on from,
_SECONDS = 30.0  # or so long


@dataclass(frozen=True)
class Settings:
    """How long and how to search; fields as of `SlimRequest`."""

    steps: int | None
    minutes: float | None
    draws: int
    rate: float
    seed: int


@torch.no_grad()
def learn(
    policy: Policy,
    shrinker: Shrinker,
    repairer: Repairer,
    measure: Measure,
    settings: Settings,
    ledger: Ledger,
    on_report: Callable[[Mapping[str, Any], float], None] = lambda *told: None,
) -> State:
    """Moves a policy's probabilities by the losses of drawn models; no gradient of the model is computed.

    Args:
        policy: where to begin; at the end it holds what was found.
        shrinker: takes units out of the model.
        repairer: mends the outputs of drawn models as those of the written one will be.
        measure: what drawn models are compared by.
        ledger: of which the search goes on if it holds a state.
        on_report: called with each report and the share of the search that is over.

    Raises:
        GpmetricError: no drawn model has a finite loss.
    """
    model, space = shrinker.model, policy.space
    assert not any(parameter.requires_grad for parameter in model.module.parameters())
    state = ledger.state or State(0, policy.probabilities)
    policy.probabilities, policy.average = state.probabilities, state.average
    start = time.monotonic() - state.seconds
    losses: list[float] = []
    finite, saved = state.step > 0, state

    def report() -> None:
        """A line of the ledger, with the state where it is the last one or time to save it."""
        nonlocal saved, losses
        _check_finite(finite)
        over = _share(settings, state)
        saves = over >= 1 or state.step % (_REPORT * _STATE) == 0 or state.seconds - saved.seconds >= _SECONDS
        saved = state if saves else saved
        line = _report(policy, measure, state, losses)
        ledger.write(line, state if saves else None)
        on_report(line, over)
        losses = []

    try:
        while (done := _share(settings, state)) < 1:
            measure.turn(state.step)
            antithetic = policy.estimator == "rloo"
            drawn = draw(policy.probabilities, settings.draws, settings.seed, state.step, antithetic=antithetic)
            found = []
            for one in drawn:
                kept = space.kept(space.stays(one))
                with shrinker.passing(kept, repairer.repairs(kept)):
                    found.append(measure())
            finite = finite or any(math.isfinite(loss) for loss in found)
            losses.append(sum(found) / len(found))
            policy.update(drawn, found, settings.rate * (1 + math.cos(math.pi * done)) / 2)
            tokens = state.tokens + len(drawn) * measure.tokens
            seconds = time.monotonic() - start
            state = State(state.step + 1, policy.probabilities, policy.average, seconds, tokens)
            if state.step % _REPORT == 0 or _share(settings, state) >= 1:
                report()
    except KeyboardInterrupt:
        if saved.step < state.step:
            ledger.write(_report(policy, measure, state, losses), state)
        raise
    return state


def _check_finite(finite: bool) -> None:
    if not finite:
        raise GpmetricError("no model that was drawn has a finite loss (--sparsity, --dtype)")


def _share(settings: Settings, state: State) -> float:
    """How much of the search is over."""
    shares = [0.0]
    if settings.steps is not None:
        shares.append(state.step / settings.steps)
    if settings.minutes is not None:
        shares.append(state.seconds / 60 / settings.minutes)
    return max(shares)


def _report(policy: Policy, measure: Measure, state: State, losses: list[float]) -> dict[str, Any]:
    """A line of the ledger; `loss` is the mean objective of the models drawn since the last one, None if infinite."""
    stays = policy.space.stays(state.probabilities)
    expected = float((policy.space.cost * stays).sum() / policy.space.cost.sum())
    loss = sum(losses) / len(losses) if losses else math.nan
    return {
        "step": state.step,
        "objective": measure.objective,
        "loss": loss if math.isfinite(loss) else None,
        "entropy": entropy(state.probabilities),
        "kept": expected,
        "seconds": round(state.seconds, 3),
        "tokens": state.tokens,
    }
