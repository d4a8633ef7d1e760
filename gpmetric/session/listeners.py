"""What every command tells while it runs, and several listeners told by one; nothing here needs torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from gpmetric.session.plan import Plan

__all__ = ["EvaluateListener", "Listener", "Progress", "all_of", "silent"]

Progress = Callable[[str, int, int], None]  # what, done, in all


def silent(what: str, done: int, total: int) -> None:
    """Tells nobody."""


class Listener:
    """What every command tells while it runs; each adds its own, and every method may be overridden."""

    def progress(self, what: str, done: int, total: int) -> None:
        """A step has come so far."""

    def needs(self, plan: Plan) -> None:
        """What the command is going to take of memory, disk and time."""

    def stores(self, what: str, folder: Path, size: int) -> None:
        """So many bytes are going to be written to a folder."""

    def dense(self, ppl: Mapping[str, float]) -> None:
        """Perplexity of the dense model by text or split, before anything is pruned."""


class EvaluateListener(Listener):
    """What an evaluation tells while it runs; every method may be overridden."""

    def text(self, name: str, ppl: float) -> None:
        """One text is measured."""

    def tasks(self, figures: Mapping[str, Mapping[str, float]]) -> None:
        """Tasks are measured: by task, figures by name."""


Kind = TypeVar("Kind", bound=Listener)


def all_of(kind: type[Kind], listeners: Sequence[Kind]) -> Kind:
    """A listener of a kind that tells each of these, in order, whatever it is told."""

    def passing(name: str) -> Callable[..., None]:
        def tell(*arguments: Any) -> None:
            for one in listeners:
                getattr(one, name)(*arguments)

        return tell

    told = kind()
    for name in dir(kind):
        if not name.startswith("_"):
            setattr(told, name, passing(name))
    return told
