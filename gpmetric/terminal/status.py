"""Where a campaign is, on a terminal or in a log."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table

from gpmetric.evolution.status import StatusListener
from gpmetric.evolution.status_request import StatusRequest
from gpmetric.terminal.figures import duration, shortened
from gpmetric.terminal.narrow import fitted, numbered
from gpmetric.terminal.text import Text

__all__ = ["StatusReport", "print_status"]

_STATES = {
    "running": "running",
    "elsewhere": "in use elsewhere",
    "killed": "killed",
    "stopped": "stopped",
    "finished": "finished",
}
_SHOWN = 5  # kinds of failures, and workers


class StatusReport(StatusListener):
    """Each look in the place of the one before; a line each where there is no terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, auto_refresh=False, transient=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def status(self, document: Mapping[str, Any]) -> None:
        if self._console.is_terminal:
            self._live.start()
            self._live.update(Group(*_shown(document, self._console.width)), refresh=True)
        else:
            best = document["front"][:1]
            told = [_headline(document), _pace(document), *(f"best {row['mean_excess']:.4f}" for row in best)]
            self._console.print(Text(f"{time.strftime('%H:%M:%S')} {'; '.join(filter(None, told))}"), soft_wrap=True)


def print_status(console: Console, document: Mapping[str, Any], request: StatusRequest) -> None:
    """State and step, progress, the best formulas beside the best baseline, failures, workers."""
    for one in _shown(document, console.width):
        console.print(one, soft_wrap=isinstance(one, Text))


def _shown(document: Mapping[str, Any], width: int) -> Iterator[RenderableType]:
    counts = document["counts"]
    lines = [
        _headline(document),
        _owner(document["owner"]),
        _pace(document),
        f"{counts['drawn']} drawn, {counts['unique_masks']} masks, {counts['paid']} evaluated",
        _generation(document["generation"]),
    ]
    if document["stop_asked"]:
        lines.append("asked to end the search after this generation")
    yield from (Text(line) for line in lines if line)
    if document["front"]:
        yield fitted(_table(document), width)
    yield from (Text(line) for line in _details(document))


def _headline(document: Mapping[str, Any]) -> str:
    """`campaign.sqlite: running, search (generation 4, 4 windows: 12 of 40)`."""
    told, state = f"{document['ledger']}: {_STATES[document['state']]}", document["state"]
    if state == "finished":
        return told
    if state == "stopped" and document["result"] is not None:
        ended = f"its search ended after generation {document['result']['stopped']}, as was asked"
        return f"{document['ledger']}: has a result, {ended}; gpmetric discover --resume searches further"
    progress = document["progress"]
    come = f" ({progress['what']}: {progress['done']} of {progress['total']})" if progress else ""
    further = "; gpmetric discover --resume goes on" if state in ("killed", "stopped") else ""
    return f"{told}, step {document['step']}{come}{further}"


def _owner(owner: Mapping[str, Any] | None) -> str:
    if owner is None:
        return ""
    alive = {True: "alive", False: "gone", None: "on another host or in another container"}[owner["alive"]]
    silent = duration(owner["silent_seconds"])
    return f"driver: process {owner['pid']} on {owner['host']}, {alive}, heard of {silent} ago"


def _pace(document: Mapping[str, Any]) -> str:
    """What is spent of every limit, the speed, and the time left."""
    spent, speed = document["spent"], document["speed"]
    parts = [
        f"{_amount(spent[name])} of {_amount(limit)} {name}" for name, limit in document["budget"].items()
        if limit is not None and spent[name] is not None
    ]  # fmt: skip
    if document["budget"]["generations"] is None:
        parts.append(f"{spent['generations']} generations")
    if speed is not None:
        seconds, paid = speed["seconds_per_generation"], speed["evaluations_per_generation"]
        parts.append(f"{seconds:.3g} s and {paid:.3g} evaluations a generation")
    if document["left_seconds"] is not None:
        parts.append(f"about {duration(document['left_seconds'])} left")
    return ", ".join(parts)


def _amount(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _generation(generation: Mapping[str, Any] | None) -> str:
    if generation is None:
        return ""
    rungs = ", ".join(f"{name} {count}" for name, count in generation["rungs"].items())
    return f"generation {generation['number']} has measured: {rungs}"


def _table(document: Mapping[str, Any]) -> Table:
    """The best of the front, and the best baseline by its name."""
    rows = document["front"]
    table = numbered("excess log-loss on the search text", "formula")
    for heading in ("mean", *rows[0]["excess"]):
        table.add_column(Text(heading), justify="right")
    best = document["baselines"][:1]
    marked = [(row, row["formula"], "") for row in rows] + [
        (row, f"{row['name']}: {row['formula']}", "bold") for row in best
    ]
    ranked = sorted(marked, key=lambda one: one[0]["mean_excess"])
    for place, (row, name, style) in enumerate(ranked, start=1):
        figures = (f"{value:.4f}" for value in (row["mean_excess"], *row["excess"].values()))
        table.add_row(str(place), Text(shortened(name), style), *figures)
    return table


def _details(document: Mapping[str, Any]) -> Iterator[str]:
    """A line each: on validation, the result, failures by kind, workers."""
    for kind, name in (("formula", "formula"), ("rival", "baseline of its kind")):
        rows = [row for row in document["validation"] if row["kind"] == kind]
        if rows:
            yield f"best {name} on validation: {rows[0]['metric']}, mean excess {rows[0]['mean_excess']:.4f}"
    if (result := document["result"]) is not None:
        yield f"result: {(result['winner'] or {}).get('formula')}; {result['because'] or ''}".rstrip("; ")
    for row in document["failures"][:_SHOWN]:
        yield f"{row['count']} failed: {row['reason']}"
    if len(document["failures"]) > _SHOWN:
        yield f"and {len(document['failures']) - _SHOWN} other kinds of failures"
    workers = document["workers"]
    if workers and document["state"] in ("running", "elsewhere"):
        named = [f"process {one['process']} on {one['host'] or '?'} ({one['measured']})" for one in workers[:_SHOWN]]
        more = f" and {len(workers) - _SHOWN} more" if len(workers) > _SHOWN else ""
        yield f"{len(workers)} workers at work (measurements of this generation): {', '.join(named)}{more}"
