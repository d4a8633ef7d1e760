"""The trackers that `--track` knows, one row each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from gpmetric.errors import InputError, one_of
from gpmetric.lazy import lazy
from gpmetric.options import Option

__all__ = ["TRACK", "TRACKERS", "Tracker", "TrackerKind", "check_trackers", "folders_of", "split_tracker"]


class Tracker(Protocol):
    """One run in one tracker. Each method is called once, but `log`; whatever they raise ends the tracking."""

    def start(self, settings: Mapping[str, Any]) -> None:
        """Begins the run of these settings: texts, numbers and truth values by name."""

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Takes finite figures of a step; steps never go back."""

    def finish(self, result: Mapping[str, Any] | None) -> None:
        """Ends the run with its result, or without one: the command was stopped, or failed."""


@dataclass(frozen=True)
class TrackerKind:
    """A kind of tracker.

    Attributes:
        library: that it takes, as it is imported; also the extra that installs it.
        make: called with what stands behind the colon, or "", and the run's name.
        place: what stands behind the colon.
        needs_place: whether that may not be left out.
        is_folder: whether that is a folder that is written.
    """

    library: str
    make: Callable[..., Tracker]
    place: str
    needs_place: bool = False
    is_folder: bool = False


TRACKERS: dict[str, TrackerKind] = {
    "tensorboard": TrackerKind(
        "tensorboard", lazy("gpmetric.tracking.kinds:TensorBoard"), "DIR", needs_place=True, is_folder=True
    ),
    "mlflow": TrackerKind("mlflow", lazy("gpmetric.tracking.kinds:MLflow"), "URI"),
    "trackio": TrackerKind("trackio", lazy("gpmetric.tracking.kinds:Trackio"), "PROJECT"),
    "wandb": TrackerKind("wandb", lazy("gpmetric.tracking.kinds:WandB"), "PROJECT"),
}
_FORMS = tuple(
    f"{name}:{kind.place}" if kind.needs_place else f"{name}[:{kind.place}]" for name, kind in TRACKERS.items()
)
TRACK = Option(
    f"Keep figures in a tracker: {', '.join(_FORMS)}; may be repeated. It can fail without harm to the command.",
    metavar="TRACKER",
)


def split_tracker(text: str) -> tuple[str, str]:
    """The kind of a tracker, a key of TRACKERS, and what stands behind the colon."""
    name, _, place = text.partition(":")
    return name, place


def check_trackers(texts: Iterable[str]) -> None:
    """Refuses what is no tracker, and one whose library is not installed.

    Raises:
        InputError: naming what is accepted, or the command that installs the library.
    """
    for text in texts:
        name, place = split_tracker(text)
        kind = TRACKERS[one_of("--track", name, TRACKERS)]
        if not place and (kind.needs_place or text.endswith(":")):
            raise InputError(f"--track {text}: {kind.place} is missing; accepted are {', '.join(_FORMS)}")
        found = find_spec(kind.library)
        if found is None or found.origin is None:  # a folder of this name, as W&B leaves one, is no library
            raise InputError(f"--track {text} needs {kind.library}: pip install 'gpmetric[{kind.library}]'")


def folders_of(texts: Iterable[str]) -> dict[str, tuple[Path, str]]:
    """The folders that trackers write, as `Request.beside` has it."""
    placed = ((text, *split_tracker(text)) for text in texts)
    return {f"--track {text}": (Path(place), "folder") for text, name, place in placed if _is_folder(name) and place}


def _is_folder(name: str) -> bool:
    return name in TRACKERS and TRACKERS[name].is_folder
