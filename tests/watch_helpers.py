"""A whole campaign of seconds on a tiny random model, for tests of what is told while one runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpmetric.evolution.listener import DiscoverListener
from gpmetric.evolution.request import DiscoverRequest

__all__ = ["Calling", "tiny_request"]


class Calling(DiscoverListener):
    """Calls a function after each generation, and keeps what it is told."""

    def __init__(self, call: Callable[[int], None] = lambda number: None) -> None:
        self.call, self.steps, self.generations, self.results = call, [], [], []  # type: ignore[var-annotated]

    def step(self, name: str) -> None:
        self.steps.append(name)

    def generation(self, number: int, *_: Any) -> None:
        self.generations.append(number)
        self.call(number)

    def finished(self, result: Any) -> None:
        self.results.append(result)


def tiny_request(model: Path, text: Path, folder: Path, **changes: Any) -> DiscoverRequest:
    """Of 24 evaluations in some generations."""
    values: dict[str, Any] = {
        "model": str(model), "text": str(text), "target": ("0.5",), "population": 4, "evaluations": 24,
        "operands": ("W", "X"), "samples": 4, "search_windows": 2, "windows": 2, "calibration_seeds": 0,
        "sequence_length": 32, "include": r"\.0\.", "workers": 1, "cache": folder / "cache",
        "ledger": folder / "a.sqlite",
    }  # fmt: skip
    return DiscoverRequest(**(values | changes))
