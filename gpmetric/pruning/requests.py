"""What `gpmetric bench`, `prune` and `verify` are asked for, checked before torch is imported."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from gpmetric.errors import InputError
from gpmetric.metrics import BASELINES, Metric, resolve_metric
from gpmetric.options import Option
from gpmetric.pruning.updaters import FITS, UPDATERS, updater_of
from gpmetric.session.inputs import DEVICES, Inputs, Limits, Texts
from gpmetric.targets import parse_target, plain_granularities

__all__ = [
    "FIT", "METRIC", "MODELS", "UPDATE", "BenchRequest", "PruneRequest", "VerifyRequest", "check_fit", "target_option",
]  # fmt: skip

METRIC = Option(f"{', '.join(BASELINES)}, or a formula.")
MODELS = Option("Hugging Face directory or name; may be repeated. The embedded demo model by default.")
UPDATE = Option("Kept weights: {choices}.", choices=UPDATERS)
FIT = Option(
    "What kept weights are fitted to where they change: their layer's own outputs, or the dense model's. {choices}.",
    choices=FITS,
)
ONE_SHOT = Option("Dense statistics everywhere, or block after pruned block.", names=("--one-shot/--sequential",))
OUTPUT = Option("Folder to write.", metavar="DIR", names=("--output", "-o"), writes="folder")
FORCE = Option("Replace a checkpoint that gpmetric wrote.", names=("--force",))

RESUME = Option("Go on with the same command where it was stopped, or begin anew.", names=("--resume/--restart",))


def target_option(end: str) -> Option:
    """The option --target, with a last sentence."""
    groups = ", ".join(f"{name}:0.5" for name in plain_granularities())
    return Option(f"0.5 (where the metric says), {groups} or 2:4; {end}")


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


@dataclass(frozen=True, kw_only=True)
class BenchRequest(Inputs):
    """Everything `gpmetric bench` can be asked for."""

    model: Annotated[str | tuple[str, ...] | None, MODELS] = None
    text: Annotated[tuple[str, ...], Option("Text to evaluate; may be repeated.", reads=True)] = ()
    metric: Annotated[tuple[str, ...], Option(f"{METRIC.help[:-1]}; may be repeated. All by default.")] = ()
    target: Annotated[tuple[str, ...], target_option("may be repeated. 0.5 by default.")] = ("0.5",)
    update: Annotated[str, UPDATE] = "none"
    fit: Annotated[str, FIT] = "own"
    one_shot: Annotated[bool, ONE_SHOT] = False

    def check(self) -> None:
        super().check()
        check_fit(self.fit, [resolve_metric(name) for name in self.metrics], self.update, one_shot=self.one_shot)
        for text in self.target:
            parse_target(text)

    @property
    def metrics(self) -> tuple[str, ...]:
        """Every metric once; all baselines where none is named."""
        return tuple(dict.fromkeys(self.metric or BASELINES))

    @property
    def texts(self) -> Texts:
        return Texts({"calibration": self.calibration}, {"calibration": self.samples}, evaluated=self.text or (None,))


@dataclass(frozen=True, kw_only=True)
class PruneRequest(Inputs):
    """Everything `gpmetric prune` can be asked for."""

    output: Annotated[Path | None, OUTPUT] = None
    text: Annotated[str | None, Option("Text of the perplexity; the calibration text by default.", reads=True)] = None
    metric: Annotated[str, METRIC] = "wanda"
    target: Annotated[str | None, target_option("0.5 by default. --allocation must meet it if given.")] = None
    allocation: Annotated[
        Path | None, Option("JSON with the sparsity of each layer; see gpmetric allocate.", metavar="FILE", reads=True)
    ] = None
    update: Annotated[str, UPDATE] = "none"
    fit: Annotated[str, FIT] = "own"
    one_shot: Annotated[bool, ONE_SHOT] = False
    save_masks: Annotated[
        Path | None,
        Option("Safetensors file of masks, True = kept, [out, in] by layer.", metavar="FILE", writes="file"),
    ] = None
    force: Annotated[bool, FORCE] = False
    resume: Annotated[bool, RESUME] = True

    def check(self) -> None:
        super().check()
        if self.output is None:
            raise InputError("--output (-o) DIR is needed")
        check_fit(self.fit, [resolve_metric(self.metric)], self.update, one_shot=self.one_shot)
        if self.target is not None:
            parse_target(self.target)

    @property
    def texts(self) -> Texts:
        evaluated = self.text or self.calibration or "demo:calibration"
        return Texts({"calibration": self.calibration}, {"calibration": self.samples}, evaluated=(evaluated,))


@dataclass(frozen=True, kw_only=True)
class VerifyRequest(Limits):
    """Everything `gpmetric verify` can be asked for."""

    folder: Annotated[str, Option("A checkpoint that `gpmetric prune` or `slim` wrote.", metavar="DIR", argument=True)]
    against: Annotated[
        str | None, Option("The dense model: what was not pruned must be as it was there.", metavar="MODEL")
    ] = None
    seed: Annotated[int, Option("Not used; every command takes one.", least=0, below=2**63)] = 0
    device: Annotated[str, Option("{choices}.", choices=DEVICES)] = "auto"
