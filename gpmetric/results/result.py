"""A result: the document that --json writes, as a dict that shows itself, in a notebook too."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from gpmetric.errors import GpmetricError
from gpmetric.files import write_json
from gpmetric.outputs import check_outputs
from gpmetric.plain import plain
from gpmetric.provenance import gpmetric_version

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

__all__ = ["Result", "Row", "marked"]

Row = dict[str, Any]

_SHOWN = 60  # rows of a table in a notebook
_CELL = 200  # characters of a cell there
_NAME = 60  # of a model's name in one line


class Result(dict[str, Any]):
    """What a command gave, as the JSON document that its page in the documentation describes.

    Attributes:
        command: of `gpmetric`.
        marks: keys of its documents by which they are known; where there are several sets, one of them.
    """

    command: ClassVar[str] = ""
    marks: ClassVar[tuple[set[str], ...]] = ()

    def table(self) -> list[Row]:
        """The result as rows with the same columns, plain values in each; the docstring of the class names them.

        Raises:
            GpmetricError: the document is not what the command gives, since another version wrote it for instance.
        """
        try:
            return list(self._rows())
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError, RecursionError) as error:
            raise GpmetricError(
                f"this result of {self._called} has no table: {type(error).__name__} {error!s:.100}; another version "
                "wrote it, or it is damaged"
            ) from error

    def to_pandas(self) -> DataFrame:
        """The table as a data frame.

        Raises:
            GpmetricError: pandas is not installed; also as of `table`.
        """
        try:
            import pandas
        except ImportError as error:
            raise GpmetricError("to_pandas needs pandas: pip install pandas") from error
        return pandas.DataFrame([{_text(name): _text(one) for name, one in row.items()} for row in self.table()])

    def plot(self) -> Figure:
        """A picture of the result, which is shown by a notebook and written by `.savefig(path)`.

        Raises:
            GpmetricError: there is nothing to draw of this command; also as of `table`.
        """
        raise GpmetricError(f"there is no picture of {self._called}; table() has the figures")

    def save(self, path: str | Path, *, force: bool = False) -> None:
        """Writes the document as --json does, whole or not at all; `load_result` reads it.

        Args:
            path: of the file.
            force: replace a file that gpmetric did not write.

        Raises:
            InputError: the place cannot be written, or holds what gpmetric did not write.
            GpmetricError: the file cannot be written.
        """
        check_outputs({"save": (Path(path), "json")}, [], force=force)
        write_json(Path(path), marked(self))

    def _rows(self) -> Iterable[Row]:
        """Of the table: what is said of the whole in one word or number each."""
        return (
            {"name": name, "value": value}
            for name, value in self.items()
            if value is None or isinstance(value, str | int | float)
        )

    @property
    def _called(self) -> str:
        return f"gpmetric {self.command}".strip()

    @property
    def _model(self) -> str:
        """Of which model it is, or of which ones; "" where it does not say."""
        several = self.get("models")
        documents = several if isinstance(several, list) else [self]
        names = [one.get("model") for one in documents if isinstance(one, Mapping)]
        told = ", ".join(plain(str(name))[-_NAME:] for name in names if name is not None)
        return told if len(told) <= _CELL else f"{told[:_CELL]}..."

    @property
    def _title(self) -> str:
        return f"{self._called}: {self._model}" if self._model else self._called

    def __repr__(self) -> str:
        """One line; what is inside is read by key, or by `table()`."""
        try:
            size = "1 row" if (rows := len(self.table())) == 1 else f"{rows} rows"
        except GpmetricError:
            size = "no table"
        return f"<{type(self).__name__}{f' of {self._model}' if self._model else ''}, {size}>"

    def _repr_html_(self) -> str:
        """The table for a notebook, or why there is none; whatever names and messages hold is text there."""
        try:
            rows = self.table()
        except GpmetricError as error:
            return f"<p>{_escaped(error)}</p>"
        columns = list(dict.fromkeys(column for row in rows for column in row))
        head = "".join(f"<th>{_escaped(column)}</th>" for column in columns)
        body = "".join(f"<tr>{''.join(_cell(row.get(one)) for one in columns)}</tr>" for row in rows[:_SHOWN])
        more = f"; {len(rows) - _SHOWN} more rows are in table()" if len(rows) > _SHOWN else ""
        return (
            f"<table><caption>{_escaped(self._title + more)}</caption>"
            f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        )


def marked(document: Mapping[str, Any]) -> dict[str, Any]:
    """The document as it is written: one that tells no versions begins with gpmetric's, by which it is known."""
    return dict(document) if "versions" in document else {"gpmetric": gpmetric_version()} | dict(document)


def _text(value: Any) -> Any:
    r"""A text as a data frame can hold it, with \ud800 for half a character; what is no text as it is."""
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


def _cell(value: Any) -> str:
    if isinstance(value, bool) or value is None or not isinstance(value, int | float):
        return f'<td style="text-align:left">{_escaped("" if value is None else value)}</td>'
    return f'<td style="text-align:right">{_escaped(f"{value:.5g}" if isinstance(value, float) else value)}</td>'


def _escaped(value: Any) -> str:
    text = plain(str(value))
    return escape(text if len(text) <= _CELL else f"{text[:_CELL]}...")
