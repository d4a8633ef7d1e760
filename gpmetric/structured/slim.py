"""`gpmetric slim`: channels, heads and layers removed, chosen by a policy gradient, and a smaller model written."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpmetric.data import Windows
from gpmetric.errors import GpmetricError, InputError
from gpmetric.evaluation.perplexity import mean_loss, perplexity
from gpmetric.evaluation.windows import check_length, read_splits
from gpmetric.models import Model, load_model
from gpmetric.provenance import versions
from gpmetric.pruning.checkpoint import check_folder, replacing
from gpmetric.structured.budget import Pool, Space, find_space, project, top_units
from gpmetric.structured.deliver import deliver
from gpmetric.structured.export import Slimmed, check_format, stored_dtypes
from gpmetric.structured.groups import Groups, find_groups
from gpmetric.structured.ledger import Ledger
from gpmetric.structured.measure import Measure
from gpmetric.structured.plan import accepted_heads, kinds_of, macs, pools_of, uniform_counts, uniform_pools
from gpmetric.structured.policy import Policy, initial
from gpmetric.structured.repair import Repairer
from gpmetric.structured.request import SlimRequest, check_request
from gpmetric.structured.scores import Features, collect_features, standardised, unit_scores
from gpmetric.structured.search import RATES, Settings, learn
from gpmetric.structured.shrink import Repair, Shrinker

__all__ = ["Loaded", "Prepared", "SlimListener", "load", "prepare", "run_slim", "search", "slim"]

# Of what a search found. Excess on validation at 0.2, 800 steps, by share: gpt2-3m 0.025, 0.020, 0.018, 0.017, 0.016,
# llama-4m 0.057, 0.044, 0.043, 0.057, 0.072; on 48 windows of the search text the divergence has the same order.
_SHARES = (0.0, 0.125, 0.25, 0.5, 1.0)
_JUDGED = 64  # steps' windows that they are judged on
_OPEN = 0.9  # probability that a gate begins with
_MINUTES = 6.0  # of a search without a budget


class SlimListener:
    """What structured pruning tells while it runs; every method may be overridden."""

    def dense(self, ppl: Mapping[str, float]) -> None:
        """The dense model's perplexity on validation."""

    def report(self, report: Mapping[str, Any], share: float) -> None:
        """A line of the ledger, and the share of the search that is over."""


@dataclass(frozen=True)
class Loaded:
    """A model with its units and its texts.

    Attributes:
        products: whether pairs of features are wanted, too.
    """

    model: Model
    groups: Groups
    splits: Mapping[str, Windows]
    products: bool

    @cached_property
    def features(self) -> Sequence[Features]:
        """Moments of the dense model's inner features on the calibration text."""
        return collect_features(self.model, self.groups, self.splits["calibration"].tokens, products=self.products)


@dataclass(frozen=True)
class Prepared:
    """What a search begins with.

    Attributes:
        space, pools: what a policy has probabilities for, and their budgets.
        start: the probabilities that it begins with, [entries].
    """

    loaded: Loaded
    shrinker: Shrinker
    repairer: Repairer
    space: Space
    pools: Sequence[Pool]
    start: Tensor

    def slimmed(self, kept: Tensor) -> Slimmed:
        """Units [units], bool, that stay, with their repairs, rounded as they will be stored."""
        dtype = stored_dtypes(self.loaded.model)[1]
        repairs = {
            index: Repair(
                *(None if one is None else one.to(dtype).to(one.dtype) for one in (repair.weight, repair.bias))
            )
            for index, repair in self.repairer.repairs(kept).items()
        }
        return Slimmed(self.loaded.groups, kept, repairs)

    def chosen(self, probabilities: Tensor) -> Slimmed:
        """What stays by probabilities [entries]."""
        return self.slimmed(top_units(self.space.stays(probabilities), self.space, self.pools))

    def best(self, policy: Policy, measure: Measure) -> tuple[Slimmed, float, int]:
        """What a search delivers, the share of the way from its start to what it found, and the tokens that it took.

        What is found is signal and noise, in parts that depend on the model and the length of the search; on the way,
        there is less of both. So the objective of some shares is compared on the same windows of the search text.
        """
        figures, tokens = [], 0
        for share in _SHARES:
            moved = self.start + share * (policy.probabilities - self.start)
            slimmed = self.chosen(project(moved, self.space, self.pools))
            total = 0.0
            for step in range(min(_JUDGED, len(measure))):
                measure.turn(step)
                with self.shrinker.keeping(slimmed.kept, slimmed.repairs):
                    total += measure()
                tokens += measure.tokens
            figures.append((total, share, slimmed))
        _, share, slimmed = min(figures, key=lambda figure: figure[:2])
        return slimmed, share, tokens

    def loss(self, slimmed: Slimmed, split: str) -> float:
        """Mean loss on a split's windows, in nats."""
        with self.shrinker.keeping(slimmed.kept, slimmed.repairs):
            return mean_loss(self.loaded.model, self.loaded.splits[split].tokens)


def slim(model: str | None = None, *, output: str | Path, force: bool = False, **options: Any) -> dict[str, Any]:
    """Makes a model smaller: `gpmetric.slim("DIR", output="smaller", calibration="c.txt", sparsity=0.3)`.

    Args:
        model: a directory or Hub name; None is the demo model.
        output: folder to write.
        force: replace a checkpoint of gpmetric at `output`.
        options: the fields of `gpmetric.structured.request.SlimRequest`, as on the command line.

    Returns:
        The JSON document of `gpmetric slim`.

    Raises:
        InputError, GpmetricError: as `run_slim`.
    """
    if isinstance(options.get("granularity"), str):
        options["granularity"] = tuple(options["granularity"].split(","))
    if options.get("ledger") is not None:
        options["ledger"] = Path(options["ledger"])
    return run_slim(SlimRequest(model=model, **options), Path(output), force=force)


def run_slim(
    request: SlimRequest, output: Path, *, force: bool = False, listener: SlimListener | None = None
) -> dict[str, Any]:
    """Searches, writes what stays, reads it in a fresh process, and returns the JSON document of `gpmetric slim`.

    Raises:
        InputError: for anything that cannot be used, before the search.
        GpmetricError: no drawn model has a finite loss, or what was written is not what was found; `output` is then as
            it was.
    """
    check_request(request)
    told = listener or SlimListener()
    named = [Path(one) for one in (request.model, request.calibration, request.search, request.validation) if one]
    check_folder(output, force, named if request.ledger is None else [*named, request.ledger.absolute().parent])
    loaded = load(request)
    identity = _identity(request, loaded)
    if request.resume:  # another search's ledger is refused before anything is computed
        Ledger(request.ledger, identity, resume=True).close()
    prepared = prepare(request, loaded)
    model, validation = loaded.model, loaded.splits["validation"]
    dense = mean_loss(model, validation.tokens)
    if not math.isfinite(dense):
        raise GpmetricError(f"the dense model's loss on validation is not finite in {model.dtype} (--dtype)")
    told.dense({validation.text.name: perplexity(dense)})
    before = sum(parameter.numel() for parameter in model.module.parameters())
    with Ledger(request.ledger, identity, resume=request.resume) as ledger:
        best, cost = search(request, prepared, ledger, told)
    start = prepared.chosen(prepared.start)
    removed = loaded.groups.removed(best.kept)
    made = _described(request, loaded) | {"sparsity": removed / loaded.groups.parameters}
    with replacing(output, force) as partial:
        manifest = deliver(model, prepared.shrinker, best, request.format, partial, validation, made)
    return {name: value for name, value in manifest.items() if name not in ("files", "tensors")} | {
        "output": str(output),
        "parameters_before": before,
        "dense": perplexity(dense),
        "initial": perplexity(prepared.loss(start, "validation")),
        **cost,
        "progress": ledger.reports,
    }


def load(request: SlimRequest) -> Loaded:
    """Model and texts.

    Raises:
        InputError, ModelError: model or texts cannot be used.
    """
    model = load_model(request.model, device=request.device, dtype=request.dtype)
    groups = find_groups(model)
    check_format(model, request.format, biases=request.add_bias)
    stored_dtypes(model)
    splits = read_splits(
        model,
        request.model,
        {"calibration": request.calibration, "search": request.search, "validation": request.validation},
        check_length(model, request.sequence_length),
        {"calibration": request.samples, "search": request.search_windows, "validation": request.windows},
        request.seed if request.shuffle else None,
    )
    return Loaded(model, groups, splits, request.repair == "least-squares")


def prepare(request: SlimRequest, loaded: Loaded) -> Prepared:
    """Budgets, and the probabilities to begin with.

    Raises:
        InputError: start cannot be used, or the sparsity is out of reach.
    """
    model, groups, tokens = loaded.model, loaded.groups, loaded.splits["calibration"].tokens
    kinds = kinds_of(request.granularity)
    cost = groups.cost if request.cost == "parameters" else macs(groups, tokens.shape[1])
    space = find_space(groups, kinds, layers="layer" in request.granularity, cost=cost)
    if request.format == "uniform":
        counts = uniform_counts(groups, request.sparsity, kinds, accepted_heads(groups, model.module.config))
        pools = uniform_pools(groups, space, counts)
    else:
        pools = pools_of(groups, space, request.sparsity, cost, by_kind=request.budget == "kind")
    start = initial(space, pools, _worth(request, loaded, space), _OPEN, request.estimator)
    removed = float(cost[~top_units(space.stays(start), space, pools)].sum() / cost.sum())
    if removed < request.sparsity / 2:
        raise InputError(
            f"--sparsity {request.sparsity:g} cannot be met by --granularity {','.join(request.granularity)} in "
            f"--format {request.format}: the nearest below it removes {removed:.4f}"
        )
    repairer = Repairer(groups, loaded.features, request.repair, add_bias=request.add_bias)
    return Prepared(loaded, Shrinker(model, groups), repairer, space, pools, start)


def search(
    request: SlimRequest, prepared: Prepared, ledger: Ledger, listener: SlimListener | None = None
) -> tuple[Slimmed, dict[str, Any]]:
    """What a search delivers, the share of the way from its start, and the steps, tokens and seconds that it took."""
    unlimited = request.steps is None and request.minutes is None
    settings = Settings(
        request.steps,
        _MINUTES if unlimited else request.minutes,
        request.draws,
        RATES[request.estimator] if request.rate is None else request.rate,
        request.seed,
    )
    policy = Policy(prepared.space, prepared.pools, prepared.start, request.estimator)
    told = listener or SlimListener()
    model, windows = prepared.loaded.model, prepared.loaded.splits["search"].tokens
    measure = Measure(model, windows, request.objective, request.batch, request.seed)
    state = learn(policy, prepared.shrinker, prepared.repairer, measure, settings, ledger, told.report)
    begun = time.monotonic()
    best, share, tokens = prepared.best(policy, measure)
    seconds = state.seconds + time.monotonic() - begun
    return best, {"share": share, "steps": state.step, "tokens": state.tokens + tokens, "seconds": seconds}


def _worth(request: SlimRequest, loaded: Loaded, space: Space) -> Tensor:
    """Standardised score of each atom [atoms] by the rule to begin from."""
    found = torch.zeros(len(space.cost), dtype=torch.float64)
    if request.start == "constant":
        return found
    generator = torch.Generator().manual_seed(request.seed)
    groups, tokens = loaded.groups, loaded.splits["calibration"].tokens
    scores = unit_scores(loaded.model, groups, request.start, tokens, loaded.features, generator)
    whole = request.start == "block_influence"  # tells blocks apart, not the units of a part
    scores = (scores - scores.mean()) / scores.std().clamp_min(1e-12) if whole else standardised(groups, scores)
    free = space.atom >= 0
    sizes = torch.zeros_like(found).index_add_(0, space.atom[free], torch.ones_like(scores)[free])
    return found.index_add_(0, space.atom[free], scores[free]) / sizes


def _identity(request: SlimRequest, loaded: Loaded) -> dict[str, Any]:
    """All that a search depends on but its length."""
    names = ("sparsity", "budget", "cost", "estimator", "objective", "start", "repair", "add_bias", "draws", "batch")
    found = {name: getattr(request, name) for name in (*names, "rate", "seed")}
    return found | {
        "granularity": sorted(request.granularity),
        "equal": request.format == "uniform",
        "model": loaded.model.digest,
        "dtype": loaded.model.dtype,
        "device": loaded.model.device.type,
        "calibration": loaded.splits["calibration"].tokens_digest,
        "search": loaded.splits["search"].tokens_digest,
    }


def _described(request: SlimRequest, loaded: Loaded) -> dict[str, Any]:
    """What the manifest says of how a model was made."""
    names = ("format", "budget", "cost", "estimator", "objective", "start", "repair", "add_bias", "seed", "shuffle")
    return {name: getattr(request, name) for name in names} | {
        "model": loaded.model.name,
        "digest": loaded.model.digest,
        "dtype": loaded.model.dtype,
        "granularity": list(request.granularity),
        "asked": request.sparsity,
        "update": "none",
        "calibration": loaded.splits["calibration"].describe(),
        "search": loaded.splits["search"].describe(),
        "text": loaded.splits["validation"].describe(),
        "versions": versions(),
    }
