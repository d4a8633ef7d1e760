"""What `gpmetric bench`, `prune` and `verify` are asked for, checked before torch is imported."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar

from gpmetric.discovered import CATALOGUE, PREFIX
from gpmetric.errors import InputError, one_of
from gpmetric.extensible import Extensible
from gpmetric.journal import check_ledger
from gpmetric.metrics import BASELINES, Metric, resolve_metric
from gpmetric.options import Common, Option
from gpmetric.pruning.published import PUBLISHED
from gpmetric.pruning.updaters import FITS, UPDATERS, updater_of
from gpmetric.session.inputs import DEVICES, Inputs, Limits, Staff, Texts
from gpmetric.targets import Target, parse_target, plain_granularities

__all__ = [
    "BESIDE", "FIT", "MODELS", "PERMUTE", "UPDATE", "BenchRequest", "CatalogueRequest", "PruneRequest",
    "ReproduceRequest", "RowsKept", "VerifyRequest", "check_fit", "check_permute",
    "metric_option", "target_option",
]  # fmt: skip

_NAMED = f"a formula, {', '.join(BASELINES)}, {PREFIX}:NAME, a ledger or an exported formula"
MODELS = Option(
    "Hugging Face directory or name; may be repeated. The embedded demo model by default.", metavar="MODEL", reads=True
)
UPDATE = Option("What becomes of kept weights: {choices}.", metavar="UPDATE", choices=UPDATERS)
FIT = Option(
    "What kept weights are fitted to where they change: their layer's own outputs, or the dense model's.",
    choices=FITS,
)
PERMUTE = Option(
    "Under N:M, put MLP channels and values of heads in an order that keeps more of the scores.", names=("--permute",)
)
ONE_SHOT = Option("Dense statistics everywhere, or block after pruned block.", names=("--one-shot/--sequential",))
OUTPUT = Option(
    "Folder to write.", metavar="DIR", names=("--output", "-o"), accepted=("--save-model",), writes="folder"
)
FORCE = Option("Replace a checkpoint that gpmetric wrote.", names=("--force",))

BESIDE = ("wanda", "sparsegpt")  # what formulas of the catalogue are measured beside; ratios are to the last
_TARGETS = ("0.5", "0.6", "0.7", "2:4")

RESUME = Option("Go on with the same command where it was stopped, or begin anew.", names=("--resume/--restart",))


def metric_option(begin: str, end: str = "") -> Option:
    """The option --metric, between its first words and its last."""
    return Option(f"{begin}: {_NAMED}{end}.", metavar="METRIC", accepted=("--prune-method",), formula=True)


def target_option(end: str) -> Option:
    """The option --target, with a last sentence."""
    groups = ", ".join(f"{name}:0.5" for name in plain_granularities())
    return Option(
        f"0.5 (where the metric says), {groups} or 2:4; {end}",
        metavar="TARGET", accepted=("--sparsity", "--sparsity-ratio"),
    )  # fmt: skip


def check_fit(fit: str, metrics: Iterable[Metric], update: str, *, one_shot: bool = False) -> None:
    """Refuses a fit that nothing makes use of.

    Raises:
        InputError: saying what would.
    """
    if fit == "own":
        return
    if one_shot:
        raise InputError(f"--fit {fit} is for inputs that the pruned model gives; --one-shot takes the dense model's")
    if not any(updater_of(metric, update).changes for metric in metrics):
        solving = ", ".join(name for name, row in UPDATERS.items() if row.changes)
        raise InputError(f"--fit {fit} is of weights that change: take --update {solving}")


def check_permute(targets: Iterable[Target]) -> None:
    """Refuses an order of inputs where it would make no difference: none of the targets is N:M.

    Raises:
        InputError: naming the targets.
    """
    asked = list(targets)
    if not any(target.group for target in asked):
        named = ", ".join(dict.fromkeys(target.text for target in asked[:3]))
        raise InputError(f"--permute orders inputs for N:M; --target {named} is not N:M: take 2:4, for instance")


@dataclass(frozen=True, kw_only=True)
class RowsKept(Inputs):
    """The options of commands that measure row by row."""

    ledger: Annotated[
        Path | None, Option("JSON Lines file that keeps every row as it is measured.", metavar="FILE", writes="ledger")
    ] = None
    resume: Annotated[
        bool, Option("Go on with the ledger: what it has is not measured again.", names=("--resume",))
    ] = False

    def check(self) -> None:
        super().check()
        check_ledger(self.ledger, self.resume)

    @property
    def shared(self) -> dict[str, Any]:
        """The options of another request of rows for the same model and texts; it goes on with the same ledger."""
        named = {one.name: getattr(self, one.name) for one in fields(RowsKept)}
        return named | {"resume": self.ledger is not None}


@dataclass(frozen=True, kw_only=True)
class BenchRequest(RowsKept, Staff):
    """Everything `gpmetric bench` can be asked for."""

    model: Annotated[str | tuple[str, ...] | None, MODELS] = None
    text: Annotated[tuple[str, ...], Option("Text to evaluate; may be repeated.", reads=True)] = ()
    metric: Annotated[
        tuple[str, ...], metric_option("What ranks weights", "; may be repeated. All baselines by default")
    ] = ()
    target: Annotated[tuple[str, ...], target_option("may be repeated. 0.5 by default.")] = ("0.5",)
    update: Annotated[str, UPDATE] = "none"
    fit: Annotated[str, FIT] = "own"
    permute: Annotated[bool, PERMUTE] = False
    one_shot: Annotated[bool, ONE_SHOT] = False

    def check(self) -> None:
        super().check()
        check_fit(self.fit, [resolve_metric(name) for name in self.metrics], self.update, one_shot=self.one_shot)
        targets = [parse_target(text) for text in self.target]
        if self.permute:
            check_permute(targets)

    @property
    def metrics(self) -> tuple[str, ...]:
        """Every metric once; all baselines where none is named."""
        return tuple(dict.fromkeys(self.metric or BASELINES))

    @property
    def texts(self) -> Texts:
        return Texts({"calibration": self.calibration}, {"calibration": self.samples}, evaluated=self.text or (None,))


@dataclass(frozen=True, kw_only=True)
class ReproduceRequest(RowsKept):
    """Everything `gpmetric reproduce` can be asked for; what is not given is as it was published."""

    unused: ClassVar[frozenset[str]] = frozenset({"sampling", "bos", "preset", "plugin"})

    name: Annotated[
        str | None,
        Option("{choices}; all whose models are on this machine by default.", choices=PUBLISHED, argument=True),
    ] = None
    model: Annotated[str | None, Option("In place of the published model: a directory, or a name of the Hub.")] = None
    text: Annotated[str | None, Option("In place of the published test text.", reads=True)] = None
    list: Annotated[bool, Option("Show the published figures, and run nothing.", names=("--list",))] = False

    def check(self) -> None:
        super().check()
        if self.model is not None and self.name is None:
            raise InputError(f"--model {self.model!r:.60} is in place of one study's: NAME says which")


@dataclass(frozen=True, kw_only=True)
class CatalogueRequest(RowsKept):
    """Everything `gpmetric catalogue` can be asked for."""

    name: Annotated[str | None, Option("One formula, target by target; all by default.", argument=True)] = None
    model: Annotated[str | tuple[str, ...] | None, MODELS] = None
    text: Annotated[str | None, Option("Text of the perplexities, where they are measured.", reads=True)] = None
    target: Annotated[tuple[str, ...], target_option("may be repeated.")] = _TARGETS

    def check(self) -> None:
        super().check()
        if self.name is not None:
            one_of("NAME", self.name, CATALOGUE)
        if self.model is not None:
            self.bench.check()
        elif self.text or self.calibration or self.ledger:
            raise InputError("texts and ledgers are for formulas that are measured: --model says on what")

    @property
    def texts(self) -> Texts:
        return self.bench.texts

    @property
    def bench(self) -> BenchRequest:
        """What measures the formulas beside two published metrics."""
        names = CATALOGUE if self.name is None else (self.name,)
        metrics = (*BESIDE, *(f"{PREFIX}:{name}" for name in names))
        text = () if self.text is None else (self.text,)
        return BenchRequest(**self.shared | {"metric": metrics, "target": self.target, "text": text})


@dataclass(frozen=True, kw_only=True)
class PruneRequest(Inputs):
    """Everything `gpmetric prune` can be asked for."""

    output: Annotated[Path | None, OUTPUT] = None
    text: Annotated[str | None, Option("Text of the perplexity; the calibration text by default.", reads=True)] = None
    metric: Annotated[str, metric_option("What ranks weights")] = "wanda"
    target: Annotated[str | None, target_option("0.5 by default. --allocation must meet it if given.")] = None
    allocation: Annotated[
        Path | None, Option("JSON with the sparsity of each layer; see gpmetric allocate.", metavar="FILE", reads=True)
    ] = None
    update: Annotated[str, UPDATE] = "none"
    fit: Annotated[str, FIT] = "own"
    permute: Annotated[bool, PERMUTE] = False
    recipe: Annotated[
        Path | None,
        Option("A recipe.toml of gpmetric tune; options given win.", metavar="FILE", reads=True),
    ] = None
    one_shot: Annotated[bool, ONE_SHOT] = False
    save_masks: Annotated[
        Path | None,
        Option("Safetensors file of masks, True = kept, [out, in] by layer.", metavar="FILE", writes="masks"),
    ] = None
    force: Annotated[bool, FORCE] = False
    resume: Annotated[bool, RESUME] = True

    @classmethod
    def filled(cls, given: dict[str, Any]) -> dict[str, Any]:
        """With the options of the recipe; those given win, also where they are given as by default.

        Raises:
            InputError: it cannot be used.
        """
        options = super().filled(given)
        if (path := options.get("recipe")) is None:
            return options
        from gpmetric.pruning.recipe import read_recipe  # pydantic, which other requests do without

        if options.get("allocation") is not None:
            raise InputError("--allocation cannot stand beside --recipe, which has its own, or none")
        return read_recipe(path).options | options

    def check(self) -> None:
        super().check()
        if self.output is None:
            raise InputError("--output (-o) DIR is needed")
        check_fit(self.fit, [resolve_metric(self.metric)], self.update, one_shot=self.one_shot)
        target = parse_target(self.target or "0.5")
        if self.permute and self.allocation is None and self.recipe is None:
            check_permute([target])

    @property
    def texts(self) -> Texts:
        evaluated = self.text or self.calibration or "demo:calibration"
        return Texts({"calibration": self.calibration}, {"calibration": self.samples}, evaluated=(evaluated,))


@dataclass(frozen=True, kw_only=True)
class VerifyRequest(Limits, Extensible, Common):
    """Everything `gpmetric verify` can be asked for."""

    folder: Annotated[
        str, Option("A checkpoint that `gpmetric prune` or `slim` wrote.", metavar="DIR", argument=True, reads=True)
    ]
    against: Annotated[
        str | None, Option("The dense model: what was not pruned must be as it was there.", metavar="MODEL", reads=True)
    ] = None
    device: Annotated[str, Option("{choices}.", choices=DEVICES)] = "auto"
