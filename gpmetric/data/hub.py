"""Texts of the Hugging Face Hub: `hf:owner/name[/config]:split`, or one file of a dataset with its path.

    hf:allenai/c4/en/c4-train.00000-of-01024.json.gz:train

Rows are streamed, so that no more is fetched than is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpmetric.data.files import first_line, open_file
from gpmetric.data.tables import checked, recognise
from gpmetric.data.text import Source
from gpmetric.errors import DataError

__all__ = ["open_hub"]

_HUB_SECONDS = 10  # to answer at all
_FILES = (".json", ".jsonl", ".ndjson", ".parquet", ".csv", ".tsv", ".txt")


def open_hub(source: str, column: str | None) -> Source:
    """A split of a dataset, or a file of it.

    Raises:
        DataError: another form, or the Hub cannot be reached.
    """
    name, _, split = source.removeprefix("hf:").partition(":")  # a split may hold one more: train[:1%]
    parts = name.split("/")
    is_file = len(parts) > 2 and parts[-1].lower().removesuffix(".gz").endswith(_FILES)
    if not split or not all(parts) or (len(parts) > 3 and not is_file):
        raise DataError(
            f"text {source!r} is not of the form hf:owner/dataset[/config]:split or hf:owner/dataset/path/to/file:split"
        )
    repository = "/".join(parts[:2])
    _reach_hub(source, repository)
    if is_file:
        return _HubFile(source, column, repository, split, "/".join(parts[2:]))
    return _HubRows(source, column, repository, split, parts[2:])


@dataclass(frozen=True)
class _HubRows:
    """A split, streamed; what is not to be asked of the Hub, or is a slice, is read as it was downloaded."""

    source: str
    column: str | None
    repository: str
    split: str
    config: Sequence[str] = ()

    def parts(self) -> Iterator[tuple[bool, str]]:
        streaming = not _is_offline() and "[" not in self.split
        return _rows(self, _load(self, *self.config, streaming=streaming))

    def documents(self) -> Sequence[str]:
        column = self.column or "text"
        rows = _load(self, *self.config)
        return rows[column] if column in rows.column_names else [text for _, text in _rows(self, rows)]


@dataclass(frozen=True)
class _HubFile:
    """A file of a dataset: streamed, or downloaded where documents are drawn of all of it."""

    source: str
    column: str | None
    repository: str
    split: str
    file: str

    def parts(self) -> Iterator[tuple[bool, str]]:
        if _is_offline():
            return self._downloaded().parts()
        return _rows(self, _load(self, data_files={self.split: self.file}, streaming=True))

    def documents(self) -> Sequence[str]:
        return self._downloaded().documents()

    def _downloaded(self) -> Source:
        from huggingface_hub import hf_hub_download

        try:
            path = Path(hf_hub_download(self.repository, self.file, repo_type="dataset"))
        except Exception as error:  # the hub's own and its HTTP library's
            raise DataError(f"text {self.source!r} cannot be loaded: {first_line(error)}") from error
        return recognise(open_file(self.source.rpartition(":")[0], path), self.column)


def _load(asked: _HubRows | _HubFile, *config: str, **options: Any) -> Any:
    from datasets import load_dataset  # 1 s to import

    try:
        return load_dataset(asked.repository, *config, split=asked.split, **options)
    except Exception as error:  # datasets raises its own, pyarrow's, fsspec's and the hub's errors
        raise DataError(f"text {asked.source!r} cannot be loaded: {first_line(error)}") from error


def _rows(asked: _HubRows | _HubFile, rows: Any) -> Iterator[tuple[bool, str]]:
    column = asked.column or "text"
    try:
        for number, row in enumerate(rows, start=1):
            if column not in row:
                raise DataError(f"text {asked.source!r} has no column {column!r}; it has {', '.join(row)}")
            yield True, checked(row[column], asked.source, f"row {number}", column)
    except DataError:
        raise
    except Exception as error:  # what is streamed may fail at any row
        raise DataError(f"text {asked.source!r} cannot be loaded: {first_line(error)}") from error


def _is_offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _reach_hub(source: str, repository: str) -> None:
    """Asks the Hub once whether it is there: `datasets` would ask for half a minute."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        HfApi().dataset_info(repository, timeout=_HUB_SECONDS)
    except (HfHubHTTPError, OfflineModeIsEnabled):
        pass  # it answered, or is not to be asked: load_dataset says what is wrong, or reads its cache
    except Exception as error:  # the HTTP library's own, which changes between releases of huggingface_hub
        raise DataError(
            f"text {source!r}: the Hugging Face Hub cannot be reached ({first_line(error)}); "
            "HF_HUB_OFFLINE=1 reads what was downloaded before"
        ) from error
