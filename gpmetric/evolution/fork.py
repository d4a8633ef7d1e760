"""`gpmetric discover --fork FILE`: a new campaign that begins with an old one's population."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from gpmetric.errors import ExpressionError, LedgerError
from gpmetric.evolution.grammar import foreign_to
from gpmetric.evolution.ledger import Ledger
from gpmetric.evolution.request import DiscoverRequest
from gpmetric.metrics import resolve_metric

__all__ = ["population_of"]

_LOG = logging.getLogger(__name__)


def population_of(path: Path, request: DiscoverRequest) -> dict[str, Any]:
    """The formulas of the last generation of a ledger, and which ledger and generation they are of.

    What the request's space leaves out is left out, and told.

    Raises:
        LedgerError: the ledger cannot be used, has no finished generation, or no formula of it is in the space.
    """
    with Ledger.read(path) as ledger:
        last = ledger.last_generation()
    if last is None:
        raise LedgerError(f"--fork {str(path)!r} holds no finished generation")
    foreign = {str(formula): reason for formula in last.population if (reason := _why_not(str(formula), request))}
    for formula, reason in foreign.items():
        _LOG.warning("--fork %s: leaves out %s, which %s", path, formula, reason)
    formulas = [formula for formula in last.population if formula not in foreign]
    if not formulas:
        raise LedgerError(f"--fork {str(path)!r} holds no formula that --operands, --primitives and --max-nodes allow")
    return {"ledger": str(path), "generation": last.number, "formulas": formulas}


def _why_not(formula: str, request: DiscoverRequest) -> str:
    try:
        return foreign_to(request, resolve_metric(formula).expression)
    except ExpressionError as error:
        return f"this version does not read: {error}"
