"""What a ledger says of its campaign besides rows: settings that must agree, a budget that may change, a history.

Settings are JSON values by the name of their option; `models` holds digests of the models and of the windows by split.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["BUDGET_KEYS", "HISTORY_KEYS", "differences"]

BUDGET_KEYS = frozenset({"generations", "evaluations", "minutes"})  # settings a resumed campaign may change
# What became of a campaign: the population it was forked from, [generation, seed] from which on it draws anew, the
# campaigns that were merged, and that settings were lost.
HISTORY_KEYS = frozenset({"fork", "reseeded", "merged", "lost"})
_DIGITS = 12  # of a digest
_SHOWN = 60  # characters of a value


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """A line for each setting that differs, budget and history apart: the option, its value there and that here."""
    found: list[str] = []
    for key in sorted(there.keys() | here.keys(), key=str):
        old, new = there.get(key), here.get(key)
        if key in BUDGET_KEYS | HISTORY_KEYS or json.dumps(old, sort_keys=True) == json.dumps(new, sort_keys=True):
            continue
        if key == "models" and isinstance(old, dict) and isinstance(new, dict) and _are_models(old, new):
            found += _models(old, new)
        else:
            found.append(_line(f"--{str(key).replace('_', '-')}", *_values(old, new)))
    return found


def _values(there: Any, here: Any) -> tuple[str, str]:
    """Both as on the command line; of long lists, what only one of them has."""
    texts = _text(there), _text(here)
    if isinstance(there, list) and isinstance(here, list | tuple) and max(map(len, texts)) > _SHOWN:
        more = [[one for one in mine if one not in others] for mine, others in ((there, here), (here, there))]
        texts = tuple(f"also {_text(one)}" if one else "without these" for one in more)  # type: ignore[assignment]
    old, new = (text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..." for text in texts)
    return old, new


def _models(there: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[str]:
    """What differs of the models: names, files, precision, and the windows of each text."""
    names = list(there), list(here)
    if sorted(names[0]) != sorted(names[1]):
        same = sorted(one["digest"] for one in there.values()) == sorted(one["digest"] for one in here.values())
        yield _line("--model", ", ".join(names[0]), ", ".join(names[1])) + " (the same files)" * same
    pairs = zip(*names, strict=True) if len(there) == len(here) == 1 else ((one, one) for one in there if one in here)
    for old, new in pairs:
        yield from _model(new, there[old], here[new])


def _model(name: str, there: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[str]:
    if there["digest"] != here["digest"]:
        yield _line(f"files of model {name}", there["digest"][:_DIGITS], here["digest"][:_DIGITS])
    if there["dtype"] != here["dtype"]:
        yield _line("--dtype", there["dtype"], here["dtype"])
    for split in sorted(there["tokens"].keys() | here["tokens"].keys()):
        old, new = (str(one["tokens"].get(split, "none"))[:_DIGITS] for one in (there, here))
        if there["tokens"].get(split) != here["tokens"].get(split):
            yield _line(f"windows of the {split} text", old, new)


def _are_models(*values: dict[str, Any]) -> bool:
    return all(
        isinstance(one, dict) and {"digest", "dtype", "tokens"} <= one.keys() and isinstance(one["tokens"], dict)
        for value in values
        for one in value.values()
    )


def _line(name: str, there: str, here: str) -> str:
    return f"{name}: {there} there, {here} here"


def _text(value: Any) -> str:
    if value is None:
        return "none"
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
