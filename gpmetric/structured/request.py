"""What a run of `gpmetric slim` is asked for, checked before torch is imported."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gpmetric.errors import InputError, one_of
from gpmetric.pruning.metrics import resolve_metric

__all__ = [
    "BUDGETS",
    "COSTS",
    "ESTIMATORS",
    "FORMATS",
    "GRANULARITIES",
    "OBJECTIVES",
    "REPAIRS",
    "RULES",
    "STARTS",
    "Estimator",
    "Objective",
    "Rule",
    "SlimRequest",
    "check_request",
]

Estimator = Literal["rloo", "paper"]
Objective = Literal["kl", "loss"]
Placing = Literal["uniform", "global"]

ESTIMATORS: dict[Estimator, str] = {
    "rloo": "the two of an antithetic pair against each other",
    "paper": "against a moving average, as published",
}

# Of the variance of what a pair of drawn models differs by on one window of 256 tokens, the window's part was 0.23 to
# 0.87 for the loss and 0.15 to 0.53 for the divergence (ten pairs on each of four models at 0.2 and 0.5; more at 0.2).
OBJECTIVES: dict[Objective, str] = {
    "kl": "divergence from the dense model's predictions",
    "loss": "log-loss, as published",
}

GRANULARITIES = {
    "channel": "channels of an MLP",
    "head": "attention heads, with their key/value group",
    "layer": "whole attentions, whole MLPs and whole blocks",
}

FORMATS = {
    "hetero": "every layer its own widths: a folder with its modelling file",
    "uniform": "all layers alike: loads in stock transformers",
    "padded": "zeros in the original shapes: loads anywhere, no smaller",
}

BUDGETS = {"global": "one for all kinds", "kind": "the same share of the heads and of the channels"}

COSTS = {
    "parameters": "weights and biases of a unit",
    "macs": "multiply-accumulates per token, attention scores included",
}

REPAIRS = {
    "none": "output layers keep their weights and biases",
    "bias": "the mean of what is gone goes into the output's bias, where it has one",
    "least-squares": "the output's kept weights and bias are fitted to the dense output",
}


@dataclass(frozen=True)
class Rule:
    """A published way of choosing units.

    Attributes:
        metric: of the output layer's weights; None for what has a function of its own.
        placing: the same share of every part, or all parts against each other.
    """

    metric: str | None
    placing: Placing
    source: str


# name -> a published way of choosing; what has no metric scores units, not weights
RULES: Mapping[str, Rule] = {
    "magnitude_sp": Rule("W*W", "uniform", "norm of a unit's output weights"),
    "wanda_sp": Rule("wanda", "uniform", "Wanda summed over a unit (code of An et al. 2024), of the dense model"),
    "flap": Rule(
        None, "global", "An et al. 2024 (FLAP), equations 5 and 6: variance of a feature times the squared norm"
    ),
    "random": Rule(None, "global", "uniform noise"),
    "block_influence": Rule(
        None, "global", "Men et al. 2024 (ShortGPT), equation 1: blocks that turn their input least"
    ),
}


STARTS = ("constant", *RULES)  # or a metric of weights


@dataclass(frozen=True)
class SlimRequest:
    """Everything `gpmetric slim` can be asked for; names and defaults are those of the command line.

    Attributes:
        model: a directory or Hub name; None is the demo model.
        calibration, search, validation: texts for the statistics, for the draws, and for the figures that are reported;
            with the first alone, it is cut into three parts.
        sparsity: share of the parameters inside the blocks that is removed.
        granularity: what is removed as one; keys of GRANULARITIES.
        format: how the model is written; a key of FORMATS. `uniform` is searched for with equal counts in all layers.
        budget: a key of BUDGETS.
        cost: what the search's budget counts; a key of COSTS.
        estimator: a key of ESTIMATORS.
        objective: what drawn models are compared by; a key of OBJECTIVES.
        start: what the probabilities begin from; one of STARTS or a metric of weights, as `prune` takes it.
        repair: a key of REPAIRS; `add_bias` gives a bias to outputs that have none.
        steps, minutes: when the search ends, whichever comes first.
        draws: models drawn per step.
        batch: windows that they are measured on.
        rate: of the first step; it falls to 0 as a cosine. By default that of the estimator.
        samples, search_windows, windows: windows of calibration, search and validation.
        ledger: file of the search's progress; `resume` goes on with it.
    """

    model: str | None = None
    calibration: str | None = None
    search: str | None = None
    validation: str | None = None
    sparsity: float = 0.3
    granularity: tuple[str, ...] = ("channel", "head")
    format: str = "hetero"
    budget: str = "global"
    cost: str = "parameters"
    estimator: Estimator = "rloo"
    objective: Objective = "kl"
    start: str = "wanda_sp"
    repair: str = "bias"
    add_bias: bool = False
    steps: int | None = None
    minutes: float | None = None
    draws: int = 2
    batch: int = 1
    rate: float | None = None
    samples: int = 128
    search_windows: int = 256
    windows: int = 64
    sequence_length: int | None = None
    shuffle: bool = False
    seed: int = 0
    device: str = "auto"
    dtype: str | None = None
    ledger: Path | None = None
    resume: bool = False


def check_request(request: SlimRequest) -> None:
    """Refuses what is wrong whatever the model.

    Raises:
        InputError: naming option, value and what is accepted.
    """
    if not request.granularity:
        raise InputError(f"--granularity is empty: accepted are {', '.join(GRANULARITIES)}")
    for kind in request.granularity:
        one_of("--granularity", kind, GRANULARITIES)
    one_of("--format", request.format, FORMATS)
    one_of("--budget", request.budget, BUDGETS)
    one_of("--cost", request.cost, COSTS)
    one_of("--estimator", request.estimator, ESTIMATORS)
    one_of("--objective", request.objective, OBJECTIVES)
    one_of("--repair", request.repair, REPAIRS)
    if request.start not in STARTS:
        resolve_metric(request.start)
    if not 0 < request.sparsity < 1:
        raise InputError(f"--sparsity must be above 0 and below 1, but got {request.sparsity}")
    for name in ("steps", "batch", "samples", "search_windows", "windows"):
        value = getattr(request, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1, but got {value}")
    for name in ("minutes", "rate"):
        value = getattr(request, name)
        if value is not None and not 0 < value < math.inf:
            raise InputError(f"--{name} must be above 0, but got {value}")
    if request.draws < 2 or (request.estimator == "rloo" and request.draws % 2):
        raise InputError(f"--draws must be at least 2, and even for rloo's pairs, but got {request.draws}")
    if "layer" in request.granularity and (request.format == "uniform" or request.budget == "kind"):
        other = "--format uniform" if request.format == "uniform" else "--budget kind"
        raise InputError(f"--granularity layer: {other} gives all layers the same share, so none can go as a whole")
    if request.format == "uniform" and (request.budget, request.cost) != ("global", "parameters"):
        raise InputError(
            "--format uniform counts parameters, the same in every layer: --budget and --cost do not apply"
        )
    if request.add_bias and request.repair == "none":
        raise InputError("--add-bias gives --repair a place, and --repair is none")
    if (request.search is None) != (request.validation is None):
        raise InputError("--search and --validation belong together; without both, --calibration is cut into three")
    if request.resume and request.ledger is None:
        raise InputError("--resume goes on with a --ledger FILE, which is not named")
    if request.ledger is not None and request.ledger.is_dir():
        raise InputError(f"--ledger {str(request.ledger)!r} is a directory; a file is wanted")
    if request.ledger is not None and not request.resume and request.ledger.exists() and request.ledger.stat().st_size:
        raise InputError(f"--ledger {str(request.ledger)!r} exists: go on with --resume, or name another")
