"""What the commands of `gpmetric ledger` show."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console

from gpmetric.files import STDOUT
from gpmetric.options import Request
from gpmetric.terminal.text import Text

__all__ = ["print_check", "print_free", "print_ledger_export", "print_merge", "print_repair"]


def print_check(console: Console, result: Mapping[str, Any], request: Request) -> None:
    """Each problem in a line, or that there is none, and whose the ledger is."""
    for problem in result["problems"]:
        console.print(Text(problem), soft_wrap=True)
    counts = _rows(result["counts"])
    if result["ok"]:
        console.print(Text(f"nothing is wrong with {result['ledger']}{counts and f': {counts}'}"), soft_wrap=True)
    if (owner := result["owner"]) and owner["state"] != "ended":
        where = f"process {owner['pid']} on host {owner['host']}"
        console.print(Text(f"it is in use by {where}{', which may have ended' * (owner['state'] != 'alive')}"))


def print_repair(console: Console, result: Mapping[str, Any], request: Request) -> None:
    """What was kept and what was lost, by kind."""
    told = [f"{result['output']}: {_rows(result['kept'])}"]
    told += [f"lost as damaged: {_rows(result['damaged'])}"] * bool(result["damaged"])
    told += [f"{table} could not be read whole: {why}" for table, why in result["unreadable"].items()]
    told += [f"dropped with what they depend on: {_rows(result['dropped'])}"] * bool(result["dropped"])
    told.append(
        "settings were lost: discover --fork begins a campaign from its population"
        if result["settings_lost"]
        else f"discover --resume goes on with generation {result['next_generation']}"
    )
    for line in told:
        console.print(Text(line), soft_wrap=True)


def print_ledger_export(console: Console, result: Mapping[str, Any], request: Request) -> None:
    """How much was written; nothing where that is on standard output itself."""
    if result["output"] != str(STDOUT):
        console.print(Text(f"{result['output']}: {result['candidates']} candidates"), soft_wrap=True)


def print_merge(console: Console, result: Mapping[str, Any], request: Request) -> None:
    """What each campaign added."""
    for part in result["merged"]:
        new = f"{part['evaluations']} evaluations of new masks"
        told = (
            f"{part['ledger']}: {part['candidates']} candidates, {new}, generations from {part['first_generation']} on"
        )
        console.print(Text(told), soft_wrap=True)
    told = f"{result['output']}: {result['candidates']} candidates, {result['evaluations']} evaluations"
    console.print(Text(told), soft_wrap=True)


def print_free(console: Console, result: Mapping[str, Any], request: Request) -> None:
    """Whether there was an owner."""
    told = f"{result['ledger']} is free: discover --resume goes on" if result["freed"] else "nobody has the ledger"
    console.print(Text(told), soft_wrap=True)


def _rows(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {table}" for table, count in counts.items())
