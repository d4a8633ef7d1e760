"""The manifest of a checkpoint: what was made of what, by which file each, and a digest over all that it says."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, Field, ValidationError, model_validator

from gpmetric.errors import InputError
from gpmetric.files import finite, write_text
from gpmetric.outputs import MANIFEST
from gpmetric.plugins import in_use
from gpmetric.pruning.allocation import GranularityName
from gpmetric.pruning.output_folder import file_digest, files_of
from gpmetric.pruning.updaters import UPDATERS
from gpmetric.pruning.verify_experts import Count, StoredPiece

__all__ = ["LayerRecord", "Manifest", "manifest_digest", "read_manifest", "write_manifest"]

_OWN = "manifest_sha256"  # of all else that stands there


def manifest_digest(content: Mapping[str, Any]) -> str:
    """sha256 of a manifest without its own digest, in hexadecimal: of its JSON with sorted keys and no spaces."""
    told = {key: value for key, value in content.items() if key != _OWN}
    return hashlib.sha256(json.dumps(told, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_manifest(folder: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """Writes the manifest of a folder whose other files are all there, with a sha256 of each, and returns it.

    Raises:
        GpmetricError, OSError: it cannot be written.
    """
    files = {name: file_digest(folder / name) for name in files_of(folder) if name != MANIFEST}
    told: dict[str, Any] = finite({**content, "files": files})
    told[_OWN] = manifest_digest(told)
    write_text(folder / MANIFEST, json.dumps(told, indent=1, allow_nan=False) + "\n")
    return told


def _known(name: str) -> str:
    if name not in UPDATERS:
        raise ValueError(f"accepted are {', '.join(UPDATERS)}")
    return name


_UpdateName = Annotated[str, AfterValidator(_known)]
Number = Annotated[float, Field(allow_inf_nan=False)]


class LayerRecord(BaseModel):
    name: str
    tensor: str
    shape: tuple[Count, Count]
    transposed: bool
    granularity: GranularityName
    target: str
    zeros: Count
    pieces: list[StoredPiece] = []


class _Text(BaseModel):
    text: str
    sha256: str
    windows: Annotated[int, Field(ge=1)]
    sequence_length: Annotated[int, Field(ge=2)]
    bos: bool = False


class _Width(BaseModel):
    heads: Count
    channels: Count
    attention_bias: bool
    mlp_bias: bool


class _Experts(BaseModel):
    experts: Count
    removed: list[Count]


class _Move(BaseModel):
    """Tensors of which an axis has another order than in the dense model."""

    order: str
    tensors: dict[str, Literal[0, 1]]


class Manifest(BaseModel):
    """What is read of a manifest; the last two are those of `slim`.

    Earlier versions wrote neither `include` and `exclude` nor `manifest_sha256`.
    """

    version: Literal[1]
    kind: Literal["prune", "slim"] = "prune"
    dtype: Literal["float32", "bfloat16", "float16"]
    update: _UpdateName
    perplexity: Number | None
    sparsity: Number
    seed: Count
    shuffle: bool
    text_column: str | None = None
    text: _Text
    layers: list[LayerRecord]
    tensors: list[str]
    files: dict[str, str]
    moves: list[_Move] = []
    target: str | None = None
    allocation: dict[str, Any] | None = None
    include: str | None = None
    exclude: str | None = None
    manifest_sha256: str | None = None
    parameters_after: Count | None = None
    widths: list[_Width | _Experts] | None = None

    @model_validator(mode="after")
    def _has_layers(self) -> Self:
        if not self.layers and self.kind == "prune":
            raise ValueError("layers is empty")
        if self.kind == "slim" and (self.parameters_after is None or self.widths is None):
            raise ValueError("parameters_after or widths is missing")
        return self


def _plugins(text: str) -> list[str]:
    """The plug-ins that the text of a manifest names, and that are not loaded here."""
    named = json.loads(text).get("plugins")
    return [name for name in named if name not in in_use("").get("", {})] if isinstance(named, dict) else []


def read_manifest(folder: Path) -> tuple[Manifest, str]:
    """What a manifest says, and the digest that it should have.

    Raises:
        InputError: there is none in the folder, or it cannot be read.
    """
    path = folder / MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
        return Manifest.model_validate_json(text, strict=True), manifest_digest(json.loads(text))
    except OSError as error:
        raise InputError(f"{str(folder)!r} is no checkpoint of gpmetric: {MANIFEST}: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        if place == "update" and (lacking := _plugins(text)):
            raise InputError(
                f"{str(path)!r} names what a plug-in added: --plugin {' --plugin '.join(lacking)}"
            ) from error
        raise InputError(f"{str(path)!r} is no manifest: {place}: {first['msg']}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{str(path)!r} is no manifest: {error}") from error
