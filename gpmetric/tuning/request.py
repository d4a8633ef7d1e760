"""What `gpmetric tune` is asked for, checked before torch is imported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from gpmetric.errors import InputError
from gpmetric.metrics import resolve_metric
from gpmetric.options import Option
from gpmetric.pruning.requests import FORCE, METRIC, OUTPUT
from gpmetric.session.inputs import Texts
from gpmetric.session.search_inputs import SearchInputs
from gpmetric.targets import parse_target

__all__ = ["TuneRequest"]


@dataclass(frozen=True, kw_only=True)
class TuneRequest(SearchInputs):
    """Everything `gpmetric tune` can be asked for."""

    model: Annotated[
        str | None, Option("Hugging Face directory or name; the embedded demo model if none.", argument=True)
    ] = None
    output: Annotated[Path | None, OUTPUT] = None
    target: Annotated[
        str,
        Option("0.6 (where the metric says), layer:0.6 or 2:4.", names=("--sparsity", "--target"), metavar="TARGET"),
    ] = "0.5"
    text: Annotated[str | None, Option("Text read once, at the end.", reads=True)] = None
    metric: Annotated[tuple[str, ...], Option(f"To try besides: {METRIC.help[:-1]}; may be repeated.")] = ()
    evolve: Annotated[
        bool, Option("Evolve a formula, or take those that are known.", names=("--evolve/--no-evolve",))
    ] = True
    force: Annotated[bool, FORCE] = False

    def check(self) -> None:
        super().check()
        if self.output is None:
            raise InputError("--output (-o) DIR is needed")
        if parse_target(self.target).sparsity == 0:
            raise InputError(f"--sparsity {self.target!r:.60} removes nothing")
        for name in self.metric:
            resolve_metric(name)
        if self.ledger is not None and not self.resume and self.formulas_ledger.exists():
            raise InputError(
                f"--ledger: {str(self.formulas_ledger)!r} is of a search: go on with --resume, or name another"
            )
        if self.shuffle and self.search is None:
            raise InputError("--shuffle needs --search and --validation: prune would draw from all of the text")

    @property
    def formulas_ledger(self) -> Path:
        """The campaign's file beside the ledger."""
        assert self.ledger is not None
        return self.ledger.with_name(f"{self.ledger.name}.sqlite")

    @property
    def texts(self) -> Texts:
        found = super().texts
        tested = () if self.text is None and self.model is not None else (self.text,)
        return Texts(found.splits, found.windows, found.cut, tested, found.disjoint)
