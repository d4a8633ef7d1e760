"""Recipes: all that decides how a model is pruned, as TOML that `gpmetric tune` writes and `prune --recipe` reads.

    version = 1
    metric = "layer:W*W*F"
    target = "0.6"
    update = "admm"
    fit = "dense"
    samples = 128
    sequence_length = 2048
    bos = "auto"

An allocation may stand behind it, as a table of what an allocation file holds. With the model and the calibration text
it determines the weights; the digest of the text's windows may be in it, too, and then others are refused. Where
`bos` is not said, windows are without it. The device is left out, whose arithmetic may differ in the last bits.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gpmetric.errors import InputError
from gpmetric.files import write_text
from gpmetric.metrics import resolve_metric
from gpmetric.pruning.allocation import Allocation, allocation_of
from gpmetric.pruning.updaters import FITS, UPDATERS
from gpmetric.session.inputs import BOS, DTYPES, SAMPLINGS, STATISTICS_DTYPES
from gpmetric.targets import parse_target

__all__ = ["Recipe", "read_recipe", "recipe_of", "recipe_text", "write_recipe"]

_OF_WINDOWS = ("samples", "sequence_length", "sampling", "bos", "shuffle", "seed", "text_column")
_HEAD = "# How a model is pruned: `gpmetric prune MODEL --recipe FILE -o DIR`\n"


@dataclass(frozen=True)
class Recipe:
    """How a model is pruned; the fields are options of `gpmetric prune`, but for the allocation and the digest.

    Attributes:
        allocation: what each layer is pruned to; None prunes all to the target.
        calibration_digest: `tokens_digest` of the calibration windows; None takes any.
        text: of the file that it was read from.
    """

    metric: str
    target: str
    update: str = "none"
    fit: str = "own"
    samples: int = 128
    sequence_length: int | None = None
    shuffle: bool = False
    seed: int = 0
    include: str | None = None
    exclude: str | None = None
    allocation: Allocation | None = None
    permute: bool = False
    dtype: str | None = None
    statistics_dtype: str = "float32"
    one_shot: bool = False
    calibration_digest: str | None = None
    sampling: str = "windows"
    bos: str = "auto"
    text_column: str | None = None
    text: str | None = field(default=None, compare=False)

    @property
    def options(self) -> dict[str, Any]:
        """The options of `gpmetric prune` that it stands for."""
        names = (one.name for one in fields(self) if one.name not in ("allocation", "calibration_digest", "text"))
        return {name: getattr(self, name) for name in names}

    @property
    def digest(self) -> str | None:
        """sha256 of the file that it was read from, in hexadecimal."""
        return None if self.text is None else hashlib.sha256(self.text.encode()).hexdigest()

    def with_options(self, given: Mapping[str, Any]) -> Recipe:
        """With other options; where they are of other windows of the calibration, any are taken."""
        options = {name: given[name] for name in self.options}
        if options == self.options:
            return self
        same = all(options[name] == getattr(self, name) for name in _OF_WINDOWS)
        digest = self.calibration_digest if same else None
        made = replace(self, **options, calibration_digest=digest)
        return replace(made, text=recipe_text(made))

    def document(self) -> dict[str, Any]:
        """What a file holds; options that are None are left out."""
        said = self.options | {"calibration_digest": self.calibration_digest}
        told = {"version": 1} | {name: value for name, value in said.items() if value is not None}
        return told | ({} if self.allocation is None else {"allocation": self.allocation.document()})


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    version: Annotated[int, Field(ge=1, le=1)]
    metric: str
    target: str
    update: str = "none"
    fit: str = "own"
    permute: bool = False
    samples: Annotated[int, Field(ge=1)] = 128
    sequence_length: Annotated[int, Field(ge=2)] | None = None
    sampling: str = "windows"
    bos: str = "never"  # as windows were when recipes did not say it
    text_column: str | None = None
    shuffle: bool = False
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    include: str | None = None
    exclude: str | None = None
    dtype: str | None = None
    statistics_dtype: str = "float32"
    one_shot: bool = False
    calibration_digest: str | None = None
    allocation: dict[str, Any] | None = None


def read_recipe(path: str | Path) -> Recipe:
    """The recipe in a file.

    Raises:
        InputError: naming the file, and the key, its value and what is accepted, or why it cannot be read.
    """
    where = f"--recipe {str(path)!r}"
    try:
        text = Path(path).read_bytes().decode("utf-8")
        content = tomllib.loads(text)
    except OSError as error:
        raise InputError(f"{where} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and TOMLDecodeError are ValueErrors
        raise InputError(f"{where} is no recipe: {error}") from error
    recipe = replace(recipe_of(content, where), text=text)
    if recipe.allocation is None:
        return recipe
    return replace(recipe, allocation=replace(recipe.allocation, file=str(path), digest=recipe.digest))


def recipe_of(content: Any, where: str) -> Recipe:
    """The recipe of a document.

    Raises:
        InputError: naming where it stands, and the key, its value and what is accepted.
    """
    try:
        said = _File.model_validate(content, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        told = "is missing" if first["type"] == "missing" else f"is {first['input']!r:.60}: {first['msg']}"
        raise InputError(f"{where}: {place:.200} {told}") from error
    tables: dict[str, Collection[str | None]] = {
        "update": UPDATERS, "fit": FITS, "dtype": (None, *DTYPES), "statistics_dtype": STATISTICS_DTYPES,
        "sampling": SAMPLINGS, "bos": BOS,
    }  # fmt: skip
    for name, table in tables.items():
        if getattr(said, name) not in table:
            raise InputError(
                f"{where}: {name} is {getattr(said, name)!r:.60}; accepted: {', '.join(filter(None, table))}"
            )
    try:
        resolve_metric(said.metric)
        parse_target(said.target)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    recipe = Recipe(**said.model_dump(exclude={"version", "allocation"}))
    if said.allocation is None:
        return recipe
    return replace(recipe, allocation=allocation_of(said.allocation, f"{where}: allocation"))


def write_recipe(recipe: Recipe, path: Path) -> None:
    """Writes a recipe.

    Raises:
        GpmetricError: it cannot be written.
    """
    write_text(path, recipe_text(recipe))


def recipe_text(recipe: Recipe) -> str:
    """What a file of it holds."""
    return _HEAD + _toml(recipe.document())


def _toml(document: Mapping[str, Any], prefix: str = "") -> str:
    """Keys with plain values, then each table behind its heading."""
    plain = {key: value for key, value in document.items() if not isinstance(value, Mapping)}
    lines = [f"{_key(key)} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in plain.items()]
    for key, value in document.items():
        if isinstance(value, Mapping):
            name = f"{prefix}{_key(key)}"
            lines.append(f"\n[{name}]\n{_toml(value, f'{name}.')}")
    return "".join(lines)


def _key(name: str) -> str:
    return name if name.isidentifier() and name.isascii() else json.dumps(name, ensure_ascii=False)
