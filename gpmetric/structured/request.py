"""What a run of `gpmetric slim` is asked for, and the tables of its choices, read before torch is imported."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from gpmetric.errors import InputError
from gpmetric.evaluation.objectives import OBJECTIVES
from gpmetric.lazy import lazy
from gpmetric.metrics import resolve_metric
from gpmetric.options import Option
from gpmetric.pruning.requests import FORCE, OUTPUT
from gpmetric.session.inputs import Staff
from gpmetric.session.search_inputs import SearchInputs
from gpmetric.tracking.table import TRACK, check_trackers, folders_of

__all__ = [
    "BUDGETS",
    "COSTS",
    "ESTIMATORS",
    "FORMATS",
    "REPAIRS",
    "STARTS",
    "UNIT_KINDS",
    "UNIT_RULES",
    "Estimator",
    "Format",
    "SlimRequest",
    "UnitKind",
    "UnitRule",
]


@dataclass(frozen=True)
class UnitKind:
    """What is removed as one; the first kind of a sublayer is what it consists of where no kind of it is named."""

    meaning: str
    # that it is a part of: a key of `groups.SUBLAYERS`, or "experts"; None for whole sublayers and whole blocks
    sublayer: str | None
    together: int = 1  # neighbouring heads, or channels, that are one unit
    alone: bool = False  # whether nothing else goes with it; then the format is uniform, and nothing is repaired


UNIT_KINDS: dict[str, UnitKind] = {
    "channel": UnitKind("channels of an MLP", "mlp"),
    "head": UnitKind("attention heads, with their key/value group", "attention"),
    "layer": UnitKind("whole attentions, whole MLPs and whole blocks", None),
    "block": UnitKind("whole blocks and nothing else", None, alone=True),
    "expert": UnitKind("whole experts of mixtures, the same share in every block, nothing else", "experts", alone=True),
}


@dataclass(frozen=True)
class Estimator:
    """What is made of the losses of models: an exchange of units, or a step of their probabilities (in `policy`)."""

    meaning: str  # what a loss is compared with
    sharpness: float  # of the probabilities to begin with
    rate: float | None = None  # of the first step of probabilities; None where units are exchanged
    pairs: bool = False  # whether draws come in antithetic pairs


# Rates: excess on validation at 0.3, 1,500 steps of one window, gpt2-05m and llama-05m: rloo 0.076 and 0.197 at 0.02,
# 0.097 and 0.196 at 0.06; paper before shares were judged, starts 0.227 and 0.365: 0.199 and 0.313 at 0.005, 0.183 and
# 0.300 at 0.01, 0.193 and 0.319 at 0.02, 0.239 and 0.384 at 0.05. Sharpness: the sharper, the nearer are drawn models
# to the one that would be delivered: llama-4m at 0.5, 800 steps of rloo, excess on validation 0.292 from 3, 0.298 from
# 1 as published, 0.301 of the start.
ESTIMATORS: dict[str, Estimator] = {
    "exchange": Estimator("units exchanged, against what stays until then, on the same windows", sharpness=3.0),
    "rloo": Estimator("drawn, the two of an antithetic pair against each other", 3.0, rate=0.02, pairs=True),
    "paper": Estimator("drawn, against a moving average, as published", 1.0, rate=0.01),
}


@dataclass(frozen=True)
class Format:
    """How a slimmed model is written."""

    meaning: str
    make: Callable[..., Any]  # (model, its shrinker, what stays) -> config, state and class of the model to write
    opening: str  # how its card says that it is opened
    stock: bool = True  # whether stock transformers opens it; otherwise the modelling file goes with it
    equal: bool = False  # whether all blocks keep as many units
    full: bool = False  # whether zeros stand where units are gone


FORMATS: dict[str, Format] = {
    "hetero": Format(
        "every layer its own widths: a folder with its modelling file",
        lazy("gpmetric.structured.export:make_hetero"),
        "Its layers differ in width: open it with `gpmetric.load(DIR)`, or with transformers and "
        "`trust_remote_code=True`, which runs the modelling file beside this card.",
        stock=False,
    ),
    "uniform": Format(
        "all layers alike: loads in stock transformers",
        lazy("gpmetric.structured.export:make_uniform"),
        "It is a stock model of smaller shapes: transformers opens it as any other.",
        equal=True,
    ),
    "padded": Format(
        "zeros in the original shapes: loads anywhere, no smaller",
        lazy("gpmetric.structured.export:make_padded"),
        "It has the original shapes, with zeros: transformers opens it as any other.",
        full=True,
    ),
}

BUDGETS = {
    "global": "one for all kinds",
    "kind": "the same share of the heads and of the channels",
    "block": "as many heads and as many channels in every block",
}

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
class UnitRule:
    """A published way of choosing units."""

    source: str
    placing: Literal["uniform", "global"]  # the same share of every sublayer, or all sublayers against each other
    metric: str | None = None  # of the output layer's weights, where a unit is scored by them
    score: Callable[..., Any] | None = None  # (UnitSession) -> score of each unit, where it is scored otherwise
    experts: Callable[..., Any] | None = None  # the same of experts, where these are not scored by a metric
    blocks: bool = False  # whether it tells blocks apart, and not the units of a sublayer
    loss: bool = False  # whether scores are in nats, to be weighed against what a unit costs
    tried: bool = True  # whether `--start auto` measures it

    def tells(self, *, experts: bool) -> bool:
        """Whether it has scores of experts, or of channels, heads and blocks."""
        return self.metric is not None or (self.experts if experts else self.score) is not None


UNIT_RULES: dict[str, UnitRule] = {
    "taylor2": UnitRule(
        "Kwon et al. 2022, diagonal Fisher information of a unit's gate: divergence that its removal would cost",
        "global",
        score=lazy("gpmetric.structured.fisher:removal_costs"),
        loss=True,
    ),
    "magnitude_sp": UnitRule("norm of a unit's output weights", "uniform", "W*W"),
    "wanda_sp": UnitRule("Wanda summed over a unit (code of An et al. 2024), of the dense model", "uniform", "wanda"),
    "flap": UnitRule(
        "An et al. 2024 (FLAP), equations 5 and 6: variance of a feature times the squared norm",
        "global",
        score=lazy("gpmetric.structured.scores:fluctuation"),
    ),
    "random": UnitRule(
        "uniform noise",
        "global",
        score=lazy("gpmetric.structured.scores:noise"),
        experts=lazy("gpmetric.structured.scores:noise"),
        tried=False,
    ),
    "block_influence": UnitRule(
        "Men et al. 2024 (ShortGPT), equation 1: blocks that turn their input least",
        "global",
        score=lazy("gpmetric.structured.scores:block_influence"),
        blocks=True,
    ),
    "reap": UnitRule(
        "Lasby et al. 2025 (REAP): mean over an expert's tokens of its gate times the norm of its output",
        "uniform",
        experts=lazy("gpmetric.structured.expert_scores:router_weighted_activation"),
    ),
    "frequency": UnitRule(
        "share of the tokens that are routed to an expert",
        "uniform",
        experts=lazy("gpmetric.structured.expert_scores:routing_frequency"),
    ),
}

STARTS = ("auto", "constant", *UNIT_RULES)  # or a metric of weights


def _meanings(table: Mapping[str, Any]) -> str:
    return "; ".join(f"{name}: {getattr(row, 'meaning', row)}" for name, row in table.items())


def _told(table: Mapping[str, Any]) -> Option:
    """The option of a table, whose help says what each choice means."""
    return Option(f"{_meanings(table)}.", choices=table)


@dataclass(frozen=True, kw_only=True)
class SlimRequest(SearchInputs, Staff):
    """Everything `gpmetric slim` can be asked for."""

    unused: ClassVar[frozenset[str]] = frozenset({"include", "exclude", "statistics_dtype"})

    output: Annotated[Path | None, OUTPUT] = None
    search: Annotated[str | None, Option("Text that smaller models are measured on.", reads=True)] = None
    validation: Annotated[str | None, Option("Text the perplexity is reported on.", reads=True)] = None
    sparsity: Annotated[
        float,
        Option(
            "Share of the parameters inside the blocks that is removed; of experts, share of those of every block.",
            accepted=("--sparsity-ratio",),
            above=0,
            below=1,
        ),
    ] = 0.3
    granularity: Annotated[tuple[str, ...], Option("What goes as one: {choices}.", choices=UNIT_KINDS, listed=True)] = (
        "channel",
        "head",
    )
    format: Annotated[
        str | None,
        Option(f"{_meanings(FORMATS)}; where blocks or experts go as a whole uniform, else hetero.", choices=FORMATS),
    ] = None
    budget: Annotated[str, _told(BUDGETS)] = "global"
    cost: Annotated[str, Option("What the budget counts.", choices=COSTS)] = "parameters"
    multiple_of: Annotated[
        int,
        Option(
            "Of equal widths: channels that stay are a multiple of this; runtimes and GPUs are fast at 32.", least=1
        ),
    ] = 1
    estimator: Annotated[str, _told(ESTIMATORS)] = "exchange"
    objective: Annotated[
        str, Option("What models are compared by; kl is the divergence from the dense model.", choices=OBJECTIVES)
    ] = "kl"
    start: Annotated[
        str,
        Option(
            f"What the search begins from: {', '.join(STARTS)}, a metric or a formula; auto is the rule "
            "whose model is best on the search text.",
            metavar="START",
            formula=True,
        ),
    ] = "auto"
    repair: Annotated[str, _told(REPAIRS)] = "least-squares"
    add_bias: Annotated[
        bool, Option("Give a bias to outputs that have none, for the repair.", names=("--add-bias/--no-add-bias",))
    ] = False
    steps: Annotated[
        int | None, Option("Steps of the search at most, 0 for the start alone; 6 minutes if no limit.", least=0)
    ] = None
    draws: Annotated[int, Option("Models drawn per step of a policy.")] = 2
    batch: Annotated[int, Option("Windows that models are measured on together.", least=1)] = 1
    rate: Annotated[float | None, Option("Of the first step; the estimator's own by default.", above=0)] = None
    search_windows: Annotated[int, Option("Windows of the search text.", least=1)] = 256
    track: Annotated[tuple[str, ...], TRACK] = ()
    force: Annotated[bool, FORCE] = False

    @property
    def beside(self) -> dict[str, tuple[Path, str]]:
        return folders_of(self.track)

    def check(self) -> None:
        if self.output is None:
            raise InputError("--output (-o) DIR is needed")
        if not self.granularity:
            raise InputError(f"--granularity is empty: accepted are {', '.join(UNIT_KINDS)}")
        super().check()
        check_trackers(self.track)
        if self.start not in STARTS:
            resolve_metric(self.start)
        if self.rate is not None and ESTIMATORS[self.estimator].rate is None:
            accepted = " or ".join(name for name, row in ESTIMATORS.items() if row.rate is not None)
            raise InputError(f"--rate is of --estimator {accepted}, but got --estimator {self.estimator}")
        if self.draws < 2 or (ESTIMATORS[self.estimator].pairs and self.draws % 2):
            raise InputError(f"--draws must be at least 2, and even for rloo's pairs, but got {self.draws}")
        self._check_together()

    def _check_together(self) -> None:
        """Refuses options that exclude each other."""
        equal, form = FORMATS[self.form].equal, f"--format {self.form}"
        sublayers = [UNIT_KINDS[name].sublayer for name in self.granularity]
        twice = next((one for one in sublayers if sublayers.count(one) > 1), None)
        if twice:
            named = ",".join(name for name in self.granularity if UNIT_KINDS[name].sublayer == twice)
            raise InputError(f"--granularity {named}: an {twice} is cut into units of one kind; name one of them")
        if self.alone and len(self.granularity) > 1:
            named = ",".join(self.granularity)
            told = f"whole {self.alone}s go alone; slim what is left once more for the rest"
            raise InputError(f"--granularity {named}: {told}")
        self._check_experts()
        same = equal and not self.blocks
        if None in sublayers and (same or self.budget != "global"):
            named, other = ",".join(self.granularity), form if same else f"--budget {self.budget}"
            raise InputError(f"--granularity {named}: {other} gives all layers the same share; none can go as a whole")
        if equal and (self.budget, self.cost) != ("global", "parameters"):
            raise InputError(f"{form} counts parameters, the same in every layer: --budget and --cost do not apply")
        if self.multiple_of > 1 and ("channel" not in self.granularity or not (equal or self.budget == "block")):
            raise InputError(
                f"--multiple-of {self.multiple_of} is of --granularity channel with equal widths: --format uniform or "
                "--budget block"
            )
        if (self.budget, self.cost) == ("block", "macs"):
            raise InputError("--budget block counts parameters: --cost macs does not apply")
        if self.add_bias and self.mended == "none":
            told = f"--granularity {self.alone} repairs nothing" if self.alone else "--repair is none"
            raise InputError(f"--add-bias gives --repair a place, and {told}")

    def _check_experts(self) -> None:
        """Refuses what cannot hold or draw fewer experts, and a start that tells apart other units than go."""
        if self.experts and not (FORMATS[self.form].equal and FORMATS[self.form].stock):
            accepted = " or ".join(name for name, row in FORMATS.items() if row.equal and row.stock)
            raise InputError(
                f"--granularity expert: a config has one number of experts for all blocks, so --format {self.form} "
                f"cannot hold fewer; accepted is {accepted}"
            )
        if self.experts and ESTIMATORS[self.estimator].rate is not None:
            accepted = " or ".join(name for name, row in ESTIMATORS.items() if row.rate is None)
            raise InputError(
                f"--granularity expert: --estimator {self.estimator} draws models whose blocks keep unequal numbers of "
                f"experts; accepted is {accepted}"
            )
        rule = UNIT_RULES.get(self.start)
        if rule is not None and not rule.tells(experts=self.experts):
            told = "no experts" if self.experts else "experts only"
            accepted = ", ".join(name for name, one in UNIT_RULES.items() if one.tells(experts=self.experts))
            raise InputError(
                f"--start {self.start} tells {told} apart, but --granularity is {','.join(self.granularity)}; accepted "
                f"are auto, constant, {accepted}, or a metric or formula of weights"
            )

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of units that are told apart inside a sublayer."""
        return tuple(name for name in self.granularity if UNIT_KINDS[name].sublayer)

    @property
    def layers(self) -> bool:
        """Whether sublayers and blocks can go as a whole."""
        return "layer" in self.granularity

    @property
    def blocks(self) -> bool:
        """Whether blocks go as a whole, and nothing else."""
        return "block" in self.granularity

    @property
    def experts(self) -> bool:
        """Whether experts go as a whole, and nothing else."""
        return "expert" in self.granularity

    @property
    def alone(self) -> str | None:
        """The kind of units that nothing else goes with, if it is asked for."""
        return next((name for name in self.granularity if UNIT_KINDS[name].alone), None)

    @property
    def form(self) -> str:
        """The format that is written, a key of FORMATS."""
        return self.format or ("uniform" if self.alone else "hetero")

    @property
    def mended(self) -> str:
        """The repair of what stays, a key of REPAIRS; whole blocks and experts leave no output with fewer inputs."""
        return "none" if self.alone else self.repair
