"""What a page is made of: a ledger, or a result in JSON, told by what is in the file."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gpmetric.errors import GpmetricError, InputError
from gpmetric.files import read_object
from gpmetric.journal import read_journal
from gpmetric.reporting.blocks import Page
from gpmetric.reporting.campaign import of_ledger, of_result
from gpmetric.reporting.of_bench import bench_page, tuned_page
from gpmetric.reporting.of_campaign import campaign_page
from gpmetric.reporting.of_journal import journal_page
from gpmetric.reporting.of_pruned import allocation_page, pruned_page, slimmed_page

__all__ = ["page_of"]

_LARGEST = 2**27  # bytes of a result
_ACCEPTED = "a ledger of discover, or what discover, bench, allocate, prune, slim or tune wrote by --json"
_SQLITE = b"SQLite format 3\0"
# keys of a result -> the page of it
_PAGES: dict[frozenset[str], Callable[[Mapping[str, Any]], Page]] = {
    frozenset({"winner", "front", "baselines", "confidence"}): lambda document: campaign_page(of_result(document)),
    frozenset({"picked", "front", "baselines", "allocator"}): allocation_page,
    frozenset({"recipe", "table", "trials"}): tuned_page,
    frozenset({"widths", "parameters_before"}): slimmed_page,
    frozenset({"layers", "metric", "target", "perplexity"}): pruned_page,
    frozenset({"results", "dense"}): bench_page,
    frozenset({"models", "transfer"}): bench_page,
}


def page_of(path: Path) -> Page:
    """The page of a ledger or result.

    Raises:
        InputError: it is missing, empty, damaged, or something else.
    """
    where = repr(str(path))
    try:
        if not path.is_file():
            raise InputError(f"{where} is {'a folder' if path.is_dir() else 'not there'}: {_ACCEPTED} is wanted")
        with path.open("rb") as file:
            begin, size = file.read(len(_SQLITE)), os.fstat(file.fileno()).st_size
    except (OSError, ValueError) as error:
        raise InputError(f"{where} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not size:
        raise InputError(f"{where} is empty: {_ACCEPTED} is wanted")
    try:
        if begin == _SQLITE:
            return campaign_page(of_ledger(path))
        return _of_document(path, where, size)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError, RecursionError) as error:
        told = f"{type(error).__name__}: {error}"
        raise InputError(f"{where} is damaged, or not {_ACCEPTED} ({told:.100})") from error


def _of_document(path: Path, where: str, size: int) -> Page:
    if size > _LARGEST:
        raise InputError(f"{where} has {size:,} bytes, more than {_LARGEST:,}: {_ACCEPTED} is wanted")
    try:
        if path.suffix == ".jsonl":
            return journal_page(path.name, *read_journal(path))
        document = read_object(path)
    except InputError:
        raise
    except (GpmetricError, OSError) as error:
        raise InputError(f"{error}: {_ACCEPTED} is wanted") from error
    for keys, made in _PAGES.items():
        if keys <= document.keys():
            return made(document)
    raise InputError(f"{where} is another kind of JSON: {_ACCEPTED} is wanted")
