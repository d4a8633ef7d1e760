"""The file that keeps a bench's rows as they are measured: one that was stopped measures only what is missing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gpmetric.files import checksum
from gpmetric.journal import Journal
from gpmetric.metrics import Metric
from gpmetric.pruning.requests import BenchRequest
from gpmetric.session.session import Session

__all__ = ["BenchLog", "BenchRow"]

_Pair = tuple[str, str]  # target, metric


@dataclass(frozen=True)
class BenchRow:
    """One pruned model: perplexity by text name, the sparsity reached, and the seconds pruning took.

    `permuted` says whether inputs of any layer are in another order than the model's, so that N:M keeps more there.
    `error` says why a metric could not be applied at this target; its perplexities are infinite then.
    """

    metric: str
    target: str
    update: str
    formula: str
    ppl: dict[str, float]
    seconds: float
    sparsity: float
    error: str | None = None
    fit: str = "own"
    permuted: bool = False


class BenchLog(Journal):
    """Rows by all that determines them; a row that failed is tried again.

    Args:
        path: the file; None keeps nothing.
        resume: go on with it if it is there.

    Raises:
        InputError: as of `Journal`.
    """

    def __init__(self, path: Path | None, *, resume: bool) -> None:
        self._rows: dict[str, BenchRow] = {}
        super().__init__(path, "bench", {"format": 1}, resume=resume)

    def take(self, record: dict[str, Any]) -> bool:
        self._rows[str(record["of"])] = BenchRow(**record["row"])
        return True

    def known(self, session: Session, metrics: Sequence[Metric], targets: Sequence[str]) -> dict[_Pair, BenchRow]:
        """The rows that need not be measured, by target and metric."""
        if self._file is None:
            return {}
        keys = {(target, metric.name): _key(session, metric, target) for metric in metrics for target in targets}
        return {pair: self._rows[key] for pair, key in keys.items() if key in self._rows}

    def keep(self, session: Session, metric: Metric, row: BenchRow) -> None:
        """Adds a row that was measured."""
        if self._file is not None and row.error is None:
            self.write({"of": _key(session, metric, row.target), "row": asdict(row)})


def _key(session: Session, metric: Metric, target: str) -> str:
    """Of what a row depends on, the weights and windows by their digests."""
    request = session.inputs
    assert isinstance(request, BenchRequest)
    options = ("update", "fit", "permute", "one_shot", "statistics_dtype", "seed")
    settings: Mapping[str, Any] = {name: getattr(request, name) for name in options} | {
        "model": session.model.digest,
        "computed": [session.model.dtype, session.model.device.type],
        "layers": [layer.name for layer in session.model.layers],
        "calibration": session.windows["calibration"].tokens_digest,
        "texts": [[part.text.name, part.tokens_digest] for part in session.evaluated],
        "metric": [metric.name, str(metric.expression), metric.granularity, metric.update, metric.fit],
        "target": target,
    }
    return checksum(json.dumps(settings, sort_keys=True).encode())
