"""Inputs of `gpmetric report` for its tests: results as commands wrote them, and ledgers of any size."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from gpmetric.evolution.ledger import Ledger
from gpmetric.evolution.records import Candidate, Evaluation, HeldOutMeasurement, Measurement

GOLDEN = Path(__file__).parent / "golden"
RESULTS = {
    path.stem: path for path in sorted((GOLDEN / "report").glob("*.json"))
}  # of the demo and small models; shortened
SETTINGS: dict[str, Any] = {"target": ["0.5", "2:4"], "update": "none", "objective": "kl", "evaluations": 10, "seed": 3}
# ends a script, a style, an attribute; writes from right to left; moves a terminal's cursor; is no line of its own
HOSTILE = "</script><script>alert(1)</script>\"'><img src=x onerror=alert(2)> \u202egnp.exe \x1b[31m\u2028 {{7*7}}"


def make_ledger(path: Path, count: int, *, finished: bool = True, strange: tuple[str, ...] = ()) -> Path:
    """A campaign of so many candidates in generations of forty, every fifth one measured; `strange` ones failed."""
    rng = random.Random(7)
    with Ledger.open(path, SETTINGS, resume=False) as book, book.together():
        for place in range(count):
            generation, position = divmod(place, 40)
            formula = f"abs(W)**{1 + place / 9999:.4f}*X**0.5*(1/rowsum(abs(W))+1/colsum(abs(W)))"
            formula = ("abs(W)", "layer:abs(W)", "abs(W)*X")[place] if place < 3 else formula
            book.measure([Measurement(generation, position, "reconstruction", {"fingerprint": "f"}, None, 0.01)])
            if place % 5 and place > 2:
                book.record(Candidate(generation, position, formula, formula, "screened", reason="screened out"))
                continue
            worth = 1.2 - 0.3 * place / count + 0.1 * rng.random()
            figures = {kind: {"0.5": 0.6 * worth, "2:4": 1.4 * worth} for kind in ("loss", "kl")}
            paid = Evaluation(formula, formula, generation, "done", formula, figures=figures, nodes=9, operands="WX")
            book.record(Candidate(generation, position, formula, formula, "evaluated", fingerprint=formula), paid)
        for position, formula in enumerate(strange):
            book.record(Candidate(10**6, position, formula, None, "failed", reason="no scores"))
        for number in range((count + 39) // 40):
            book.commit_generation(number, ["abs(W)"], [3, [1], None])
        for metric, excess in (("wanda", 0.9), ("magnitude", 1.1), ("sparsegpt", 0.5), ("abs(W)*X", 0.95)):
            for target in SETTINGS["target"]:
                book.hold_out(HeldOutMeasurement(metric, target, "validation", "calibration", excess, 3.0))
        if finished:
            book.save_result(json.loads(RESULTS["discover"].read_text()), {"total": 60.0, "search": 40.0})
    return path


def changed(path: Path, target: Path, text: str) -> Path:
    """A result with this text for every name in it: model, metric, texts, formulas that are not read, warnings."""
    names = ("model", "text", "metric", "output", "because", "what", "error", "device")

    def change(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {name: change(one, name) for name, one in value.items()}
        if isinstance(value, list):
            return [change(one, key) for one in value]
        return f"{value}{text}" if key in names and isinstance(value, str) else value

    document = change(json.loads(path.read_text()))
    document["warnings"] = [text]
    target.write_text(json.dumps(document))
    return target
