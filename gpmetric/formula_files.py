"""Files that stand for a metric where an option takes one: a campaign's ledger or result, or an exported formula."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gpmetric.errors import GpmetricError, InputError
from gpmetric.files import read_object
from gpmetric.lazy import lazy
from gpmetric.targets import GRANULARITIES

__all__ = ["Named", "is_ledger", "named_formulas", "read_formula"]

_SUFFIXES = (".sqlite", ".json", ".py", ".tex")
_HEAD = 4096  # bytes of an exported file; the formula is in its first line, the group below it
_LARGEST = 256 * 2**20  # bytes of a JSON file that is read
_WRITTEN = re.compile(r'(?:"""Pruning (?:score|metric)|% gpmetric [^:\n]*): (.+)')  # at the top of what `export` writes
_ACCEPTED = (
    "a finished campaign's ledger or JSON result, or what gpmetric export wrote as json, python, triton or latex"
)
_LOG = logging.getLogger(__name__)
_result = lazy("gpmetric.evolution.ledger:result_of")


class Named(NamedTuple):
    """What a file says of a metric: the metric, its comparison group before it, and the use it was searched in."""

    metric: str
    use: dict[str, str]  # update and fit, where kept weights changed


def named_formulas(
    given: Mapping[str, Any], fields: Iterable[str], accepted: Collection[str]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The options with formulas in place of the files that stand for them, and these files.

    Where one metric is named by a campaign of another use, `--update` and `--fit` are its own unless they are given.

    Args:
        given: values by option.
        fields: options that take metrics.
        accepted: all options there are.

    Raises:
        InputError: a file that names no metric.
    """
    options, files = dict(given), list[str]()
    for name in fields:
        value = given.get(name)
        found = {one: read_formula(one) for one in (value if isinstance(value, tuple) else (value,)) if _is_file(one)}
        if not found:
            continue
        files += found
        if isinstance(value, tuple):
            for one, named in found.items():
                if named.use and "update" in accepted and "update" not in given:
                    searched = " ".join(f"--{key} {text}" for key, text in named.use.items())
                    _LOG.warning("%s: its formula was searched with %s, which is not given here", one, searched)
            options[name] = tuple(found[one].metric if one in found else one for one in value)
            continue
        options[name] = found[value].metric
        options = {key: text for key, text in found[value].use.items() if key in accepted} | options
    return options, tuple(files)


def is_ledger(name: str) -> bool:
    """Whether a name is a ledger's rather than a formula, which may be the name of a file, too."""
    if name.endswith(".sqlite"):
        return True
    try:
        if not os.path.isfile(name):  # reading a pipe would wait
            return False
        with open(name, "rb") as file:
            return file.read(16) == b"SQLite format 3\0"
    except (OSError, ValueError):  # a name that no file can have
        return False


def _is_file(name: Any) -> bool:
    """Whether the value of an option names a file; no formula ends as these do."""
    return isinstance(name, str) and (name.endswith(_SUFFIXES) or is_ledger(name))


def read_formula(name: str) -> Named:
    """The metric that a file names.

    Raises:
        InputError: there is no such file, it names none, or its campaign is not finished.
    """
    there = os.path.exists(name)
    if there and not os.path.isfile(name):
        raise InputError(f"metric {name!r} is no file; accepted is {_ACCEPTED}")
    if there and is_ledger(name):
        return _from_result(name, _result(Path(name)))
    try:
        if name.endswith(".json"):
            if Path(name).stat().st_size > _LARGEST:
                raise InputError(f"{name!r} is too large to be {_ACCEPTED}")
            return _from_json(name, read_object(Path(name)))
        with open(name, encoding="utf-8", errors="replace") as file:
            head = file.read(_HEAD)
    except OSError as error:
        raise InputError(f"metric {name!r} cannot be read: {error.strerror}") from error
    except InputError:
        raise
    except GpmetricError as error:
        raise InputError(f"metric {error.args[0]}; accepted is {_ACCEPTED}") from error
    written = _WRITTEN.match(head)
    if written is None:
        raise _nothing(name)
    groups = [group for group, row in GRANULARITIES.items() if row.sentence and row.sentence in head]
    return Named(_grouped(written[1].strip(), groups[0] if groups else "row"), {})


def _from_json(name: str, document: Mapping[str, Any]) -> Named:
    if "winner" in document:
        return _from_result(name, document)
    formula, group = document.get("formula"), document.get("group", "row")
    if not isinstance(formula, str) or not isinstance(group, str) or group not in GRANULARITIES:
        raise _nothing(name)
    return Named(_grouped(formula, group), {})


def _from_result(name: str, result: Mapping[str, Any]) -> Named:
    """Of a campaign's result; a winner has its comparison group before it."""
    try:
        formula = result["winner"]["formula"]
        use = {key: str(result[key]) for key in ("update", "fit") if key in result}
    except (KeyError, TypeError) as error:
        raise _nothing(name) from error
    if not isinstance(formula, str):
        raise _nothing(name)
    return Named(formula, use if use.get("update", "none") != "none" else {})


def _grouped(formula: str, group: str) -> str:
    return formula if group == "row" else f"{group}:{formula}"


def _nothing(name: str) -> InputError:
    return InputError(f"metric {name!r} names no formula; accepted is {_ACCEPTED}")
