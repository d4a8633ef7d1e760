"""What a run of `gpmetric allocate` is asked for, checked before torch is imported."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gpmetric.errors import InputError, one_of
from gpmetric.pruning.metrics import resolve_metric
from gpmetric.pruning.target import GRANULARITIES, Target, parse_target

__all__ = [
    "ALLOCATORS",
    "GENES",
    "OBJECTIVES",
    "PATTERNS",
    "Allocator",
    "Genes",
    "Objective",
    "Request",
    "check_request",
    "parse_pattern",
]

Allocator = Literal["nsga2", "evopress", "sensitivity", "arithmetic", "owl", "uniform"]
Genes = Literal["matrix", "module", "block"]
Objective = Literal["kl", "loss"]

# allocator -> how it comes to the sparsity of each gene
ALLOCATORS: dict[Allocator, str] = {
    "nsga2": "searches the whole front between sparsity and loss",
    "evopress": "searches one sparsity by level switches",
    "sensitivity": "greedy, by what each gene alone costs",
    "arithmetic": "an arithmetic progression over the blocks",
    "owl": "blocks with more outliers keep more",
    "uniform": "every gene alike",
}

# genes -> the layers that share a level
GENES: dict[Genes, str] = {
    "matrix": "every matrix has its own level",
    "module": "the matrices of one sub-module of a block (its attention, its MLP) share one",
    "block": "the matrices of one block share one",
}

# objective -> what a pruned model is compared by, in nats per prediction
OBJECTIVES: dict[Objective, str] = {
    "kl": "divergence from the dense model's predictions, which are kept in memory",
    "loss": "log-loss beyond the dense model's",
}

PATTERNS = ("dense", "4:8", "2:4", "1:4")  # levels of an N:M mix

_ANY_PATTERN = "dense, 2:4, 4:8, 1:4 and the like"


@dataclass(frozen=True)
class Request:
    """Everything `gpmetric allocate` can be asked for; names and defaults are those of the command line.

    Attributes:
        model: a directory or Hub name; None is the demo model.
        calibration, search, validation: texts for the statistics, for the candidates, and for the figures that are
            reported; with the first alone, it is cut into three parts.
        metric: a name of BASELINES or a formula, which ranks the weights.
        sparsity: mean sparsity of the allocation that is picked.
        max_loss_ratio: or, the sparsest whose validation loss, in nats, is at most so many times the dense model's.
        granularity: where scores compete: row, layer, block, or "n:m" for a mix of `patterns`; by default the
            metric's own.
        genes: what shares a level; a key of GENES.
        allocator: a key of ALLOCATORS.
        objective: what candidates are compared by; a key of OBJECTIVES.
        lowest, highest: sparsities of the front.
        init: allocation files, of this model or another, whose profiles the search begins with too.
        population: survivors of a generation.
        evaluations, tokens, minutes: budgets of the search; the first one spent ends it. A token of a backward pass
            counts for three. The first candidates are measured in any case. With none, 800 evaluations. Calibration
            before the search and validation after it, the baselines with it, come on top.
        samples, search_windows, windows: windows of calibration, search and validation.
        chunk_layers: layers whose statistics are in memory at once; all by default.
        archive: file of everything measured; `resume` goes on with it.
    """

    model: str | None = None
    calibration: str | None = None
    search: str | None = None
    validation: str | None = None
    metric: str = "wanda"
    sparsity: float | None = None
    max_loss_ratio: float | None = None
    granularity: str | None = None
    patterns: tuple[str, ...] = PATTERNS
    genes: Genes = "matrix"
    allocator: Allocator = "nsga2"
    objective: Objective = "kl"
    lowest: float = 0.4
    highest: float = 0.8
    init: tuple[str, ...] = ()
    population: int = 24
    evaluations: int | None = None
    tokens: int | None = None
    minutes: float | None = None
    samples: int = 128
    search_windows: int = 32
    windows: int = 64
    sequence_length: int | None = None
    shuffle: bool = False
    seed: int = 0
    device: str = "auto"
    dtype: str | None = None
    include: str | None = None
    exclude: str | None = None
    chunk_layers: int | None = None
    archive: Path | None = None
    resume: bool = False


def check_request(request: Request) -> None:
    """Refuses what is wrong whatever the model.

    Raises:
        InputError: naming option, value and what is accepted.
    """
    resolve_metric(request.metric)
    one_of("--genes", request.genes, GENES)
    one_of("--allocator", request.allocator, ALLOCATORS)
    one_of("--objective", request.objective, OBJECTIVES)
    if request.granularity is not None:
        one_of("--granularity", request.granularity, GRANULARITIES)
    for text in request.patterns:
        parse_pattern(text)
    if request.patterns != PATTERNS and request.granularity != "n:m":
        raise InputError("--patterns are the levels of --granularity n:m, which is not asked for")
    _check_numbers(request)
    if request.lowest >= request.highest:
        raise InputError(f"--lowest {request.lowest} must be below --highest {request.highest}")
    if request.sparsity is not None and request.max_loss_ratio is not None:
        raise InputError("--sparsity and --max-loss-ratio both pick an allocation; give one of them")
    if request.init and request.allocator != "nsga2":
        raise InputError(f"--init: --allocator {request.allocator} begins with nothing; nsga2 does")
    if request.sparsity is None and request.allocator == "evopress":
        raise InputError("--allocator evopress searches one sparsity: --sparsity is needed")
    if (request.search is None) != (request.validation is None):
        raise InputError("--search and --validation belong together; without both, --calibration is cut into three")
    if request.archive is not None and request.archive.is_dir():
        raise InputError(f"--archive {str(request.archive)!r} is a directory; a file is wanted")
    if request.archive is not None and not request.resume and _holds_something(request.archive):
        raise InputError(f"--archive {str(request.archive)!r} exists: go on with --resume, or name another")
    if request.resume and request.archive is None:
        raise InputError("--resume goes on with an --archive FILE, which is not named")


def _holds_something(path: Path) -> bool:
    try:
        return path.stat().st_size > 0
    except OSError:
        return False


def _check_numbers(request: Request) -> None:
    for name in ("sparsity", "lowest", "highest"):
        value = getattr(request, name)
        if value is not None and not 0 < value < 1:
            raise InputError(f"--{name} must be above 0 and below 1, but got {value}")
    if request.max_loss_ratio is not None and not 1 < request.max_loss_ratio < math.inf:
        raise InputError(f"--max-loss-ratio must be above 1, but got {request.max_loss_ratio}")
    if request.minutes is not None and not 0 < request.minutes < math.inf:
        raise InputError(f"--minutes must be above 0, but got {request.minutes}")
    least: dict[str, int] = {"population": 4}
    for name in ("evaluations", "tokens", "samples", "search_windows", "windows", "chunk_layers", "population"):
        value = getattr(request, name)
        if value is not None and value < least.get(name, 1):
            raise InputError(f"--{name.replace('_', '-')} must be at least {least.get(name, 1)}, but got {value}")


def parse_pattern(text: str) -> Target:
    """A level of an N:M mix.

    Raises:
        InputError: neither `dense` nor N:M.
    """
    if text == "dense":
        return Target("0.0", "row", 0.0)
    try:
        target = parse_target(text)
    except InputError as error:
        raise InputError(f"--patterns {text!r:.60}: accepted are {_ANY_PATTERN}") from error
    if not target.group:
        raise InputError(f"--patterns {text!r:.60}: accepted are {_ANY_PATTERN}")
    return target
