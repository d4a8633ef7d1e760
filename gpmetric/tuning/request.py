"""What `gpmetric tune` is asked for, checked before torch is imported."""

from __future__ import annotations

import os.path
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from gpmetric.errors import InputError
from gpmetric.metrics import resolve_metric
from gpmetric.options import Option, described
from gpmetric.pruning.requests import FORCE, OUTPUT, metric_option
from gpmetric.session.inputs import Texts
from gpmetric.session.search_inputs import SearchInputs
from gpmetric.structured.request import FORMATS
from gpmetric.targets import parse_target

__all__ = ["TuneRequest"]

_WEIGHTS = ("metric", "evolve", "include", "exclude", "statistics_dtype")  # options of single weights


@dataclass(frozen=True, kw_only=True)
class TuneRequest(SearchInputs):
    """Everything `gpmetric tune` can be asked for."""

    model: Annotated[
        str | None,
        Option(
            "Hugging Face directory or name; the embedded demo model if none.",
            metavar="MODEL",
            argument=True,
            reads=True,
        ),
    ] = None
    output: Annotated[Path | None, OUTPUT] = None
    target: Annotated[
        str,
        Option(
            "0.6 (where the metric says), layer:0.6 or 2:4; --structured: of the blocks' parameters.",
            names=("--sparsity", "--target"),
            metavar="TARGET",
            accepted=("--sparsity-ratio",),
        ),
    ] = "0.5"
    text: Annotated[str | None, Option("Text read once, at the end.", reads=True)] = None
    metric: Annotated[tuple[str, ...], metric_option("To try besides", "; may be repeated")] = ()
    evolve: Annotated[
        bool | None, Option("Evolve a formula, or take those that are known.", names=("--evolve/--no-evolve",))
    ] = None
    structured: Annotated[
        bool,
        Option(
            "Remove channels, heads and layers instead of weights: the starts, repairs and granularities of "
            "`slim`, and its search.",
            names=("--structured",),
        ),
    ] = False
    format: Annotated[
        str | None, Option("With --structured, of the model: {choices}; hetero or uniform by default.", choices=FORMATS)
    ] = None
    force: Annotated[bool, FORCE] = False

    def check(self) -> None:
        super().check()
        if self.output is None:
            raise InputError("--output (-o) DIR is needed")
        if parse_target(self.target).sparsity == 0:
            raise InputError(f"--sparsity {self.target!r:.60} removes nothing")
        for name in self.metric:
            resolve_metric(name)
        beside = self.units_ledger if self.structured else self.formulas_ledger
        if beside is not None and self.ledger is not None and os.path.exists(beside):
            if not self.resume:
                raise InputError(f"--ledger: {str(beside)!r} is of a search: go on with --resume, or name another")
            if not os.path.exists(self.ledger):
                raise InputError(
                    f"--ledger {str(self.ledger)!r} is not there, but its search {str(beside)!r} is: name another"
                )
        if self.structured:
            self._check_structured()
        elif self.format is not None:
            raise InputError(f"--format {self.format} is of models that lose channels and heads: --structured")
        elif (self.shuffle or self.sampling == "documents") and self.search is None:
            drawn = "--shuffle" if self.shuffle else "--sampling documents"
            raise InputError(f"{drawn} needs --search and --validation: prune would draw from all of the text")

    def _check_structured(self) -> None:
        """Refuses options that say something of single weights."""
        target = parse_target(self.target)
        if target.group or target.granularity:
            raise InputError(
                f"--sparsity {self.target} says where weights compete; with --structured it is the share of the "
                "parameters inside the blocks that goes, a number such as 0.3"
            )
        for field in described(type(self)):
            if field.name in _WEIGHTS and getattr(self, field.name) not in (field.default, False):
                raise InputError(f"{field.spelled} is of single weights: it has no meaning with --structured")

    @property
    def evolves(self) -> bool:
        """Whether a formula is evolved."""
        return self.evolve is not False and not self.structured

    @property
    def formulas_ledger(self) -> Path | None:
        """The campaign's file beside the ledger."""
        return self.ledger and self.ledger.with_name(f"{self.ledger.name}.sqlite")

    @property
    def units_ledger(self) -> Path | None:
        """The file beside the ledger of the search for what stays."""
        return self.ledger and self.ledger.with_name(f"{self.ledger.name}.search")

    @property
    def recipe_beside(self) -> Path:
        """Where the best recipe is kept until the checkpoint has it."""
        assert self.output is not None
        return self.output.with_name(f"{self.output.name}.recipe.toml")

    @property
    def beside(self) -> dict[str, tuple[Path, str]]:
        found = {"--output's recipe": (self.recipe_beside, "recipe")} if self.output and self.output.name else {}
        ledger = self.units_ledger if self.structured else self.formulas_ledger
        return found if ledger is None else found | {"--ledger's search": (ledger, "ledger")}

    @property
    def texts(self) -> Texts:
        found = super().texts
        tested = () if self.text is None and self.model is not None else (self.text,)
        return Texts(found.splits, found.windows, found.cut, tested, found.disjoint)
