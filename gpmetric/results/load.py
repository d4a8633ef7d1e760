"""A file of --json read back."""

from __future__ import annotations

from pathlib import Path

from gpmetric.errors import GpmetricError, InputError
from gpmetric.files import read_object
from gpmetric.results import kinds
from gpmetric.results.result import Result

__all__ = ["RESULTS", "load_result"]

_LARGEST = 2**29  # bytes; a campaign of 100,000 formulas has a tenth of that

RESULTS: tuple[type[Result], ...] = tuple(
    one for one in vars(kinds).values() if isinstance(one, type) and issubclass(one, Result) and one.marks
)


def load_result(path: str | Path) -> Result:
    """The result in a file that --json or `Result.save` wrote, in the class of its command.

    A command without a class of its own gives a plain `Result`. Figures that were not finite are None.

    Raises:
        InputError: the file cannot be read, is too large, or is no result of gpmetric.
    """
    where = f"{str(path)!r}"
    try:
        size = Path(path).stat().st_size
        if size > _LARGEST:
            raise InputError(f"{where} has {size:,} bytes; a result has {_LARGEST:,} at most")
        document = read_object(Path(path))
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise InputError(f"{where} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    except GpmetricError as error:
        raise InputError(str(error)) from error
    versions = document.get("versions")
    if "gpmetric" not in document and not (isinstance(versions, dict) and "gpmetric" in versions):
        raise InputError(f"{where} is no result of gpmetric: a file that --json wrote is wanted")
    kind = next((one for one in RESULTS if any(marks <= document.keys() for marks in one.marks)), Result)
    return kind(document)
