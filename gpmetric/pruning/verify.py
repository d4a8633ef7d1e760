"""Reading a written checkpoint again: is it whole, finite, as sparse as its manifest says, and else as it was?"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import AfterValidator, BaseModel, Field, ValidationError, model_validator
from torch import Tensor

from gpmetric.blockwise.couplings import in_order
from gpmetric.errors import DataError, GpmetricError, InputError
from gpmetric.evaluation.perplexity import perplexity
from gpmetric.loading import check_path, load_model, pick_device
from gpmetric.models import Model
from gpmetric.options import as_function
from gpmetric.pruning.allocation import GranularityName
from gpmetric.pruning.checkpoint import FOREIGN_KEYS, tensors
from gpmetric.pruning.mask import by_group
from gpmetric.pruning.output_folder import MANIFEST, file_digest, files_of
from gpmetric.pruning.requests import VerifyRequest
from gpmetric.pruning.updaters import UPDATERS
from gpmetric.pruning.verify_experts import Count, StoredPiece, are_there, by_tensor, expert_differences, pieces_of
from gpmetric.session.deadline import Deadline
from gpmetric.session.evaluate import text_loss
from gpmetric.session.plan import Plan, make_plan
from gpmetric.session.session import Listener, Progress
from gpmetric.session.splits import open_text, read_windows
from gpmetric.session.work import Work
from gpmetric.stored_experts import gathered
from gpmetric.targets import Target, parse_target
from gpmetric.tensor_file import TensorFile

__all__ = ["first_problem", "run_verify", "verify", "verify_files"]

_CLOSE = 1e-3  # of a perplexity: what other versions and devices may change


def _known(name: str) -> str:
    if name not in UPDATERS:
        raise ValueError(f"accepted are {', '.join(UPDATERS)}")
    return name


_UpdateName = Annotated[str, AfterValidator(_known)]
Number = Annotated[float, Field(allow_inf_nan=False)]


class _Layer(BaseModel):
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


class _Width(BaseModel):
    heads: Count
    channels: Count
    attention_bias: bool
    mlp_bias: bool


class _Move(BaseModel):
    """Tensors of which an axis has another order than in the dense model."""

    order: str
    tensors: dict[str, Literal[0, 1]]


class _Manifest(BaseModel):
    """What is read of a manifest; the last two are those of `slim`."""

    version: Literal[1]
    kind: Literal["prune", "slim"] = "prune"
    dtype: Literal["float32", "bfloat16", "float16"]
    update: _UpdateName
    perplexity: Number | None
    sparsity: Number
    seed: Count
    shuffle: bool
    text: _Text
    layers: list[_Layer]
    tensors: list[str]
    files: dict[str, str]
    moves: list[_Move] = []
    parameters_after: Count | None = None
    widths: list[_Width] | None = None

    @model_validator(mode="after")
    def _has_layers(self) -> Self:
        if not self.layers and self.kind == "prune":
            raise ValueError("layers is empty")
        if self.kind == "slim" and (self.parameters_after is None or self.widths is None):
            raise ValueError("parameters_after or widths is missing")
        return self


def run_verify(
    request: VerifyRequest, listener: Listener | None = None, started: float | None = None
) -> dict[str, Any]:
    """Re-reads a checkpoint that `prune` or `slim` wrote, one tensor at a time, and runs it block by block.

    Args:
        request: which, and the dense model whose other tensors, and kept weights, must be the same (kept weights not
            where they were updated).
        listener: told of what it takes, and of the perplexity on its way.
        started: time.monotonic() at which `minutes` began; now by default.

    Returns:
        `ok`, `problems` (one line each), `layers`, `sparsity`, and `perplexity` of the reloaded model, None where the
        text that it was measured on is not at hand.

    Raises:
        InputError: no such folder, no manifest in it that can be read, no dense model, or no such device.
        TimeOverError, OutOfMemoryError: there is not enough for the perplexity.
    """
    told = listener or Listener()
    watched = Deadline.starting(request.minutes, started).watching(told.progress)
    return verify_files(request, needs=told.needs, progress=watched)


def verify_files(
    request: VerifyRequest,
    windows: Tensor | None = None,
    *,
    needs: Callable[[Plan], None] = lambda plan: None,
    progress: Progress,
    digests: bool = True,
) -> dict[str, Any]:
    """What `run_verify` does and returns.

    Args:
        request: as of `run_verify`.
        windows: [n, length], to measure it on; by default those of the manifest, where their text is at hand.
        needs: told of what running the model takes.
        progress: told of the perplexity on its way.
        digests: whether the files' sha256 are compared, too.
    """
    path, against = Path(request.folder), request.against
    pick_device(request.device)
    manifest = _read_manifest(path)
    if against is not None and manifest.kind == "slim":
        raise InputError(f"--against compares what `gpmetric prune` wrote; {str(path)!r} is of `gpmetric slim`")
    dense = None if against is None else _dense_folder(against)
    problems: list[str] = []
    found: float | None = None
    try:
        problems += _file_problems(path, manifest, digests)
        problems += _tensor_problems(path, manifest)
        if dense is not None:
            problems += _differences(path, manifest, dense)
        model = load_model(str(path), device=request.device, dtype=manifest.dtype, resident=False)
        problems += _shape_problems(model, manifest)
        windows = _windows(model, manifest) if windows is None else windows
    except (GpmetricError, OSError, ValueError, KeyError, TypeError) as error:
        problems.append(f"the checkpoint cannot be read: {error}")
        windows = None
    if windows is not None:
        needs(plan := make_plan(model, _work(windows), request.memory_limit))
        assert model.placement is not None
        model.placement.room = plan.room
        found = perplexity(text_loss(model, windows, progress))
    said = manifest.perplexity
    if found is not None and said is not None and not abs(found - said) <= _CLOSE * said:
        problems.append(f"perplexity of the reloaded model is {found:.4f}, the manifest says {said:.4f}")
    return {
        "checkpoint": str(request.folder),
        "against": against,
        "ok": not problems,
        "problems": ["".join(letter if letter.isprintable() else "?" for letter in line) for line in problems],
        "kind": manifest.kind,
        "layers": len(manifest.layers),
        "sparsity": manifest.sparsity,
        "perplexity": found,
    }


verify = as_function("verify", VerifyRequest, run_verify, "folder")


def _work(windows: Tensor) -> Work:
    """What the perplexity on windows [n, length] takes; each block is read once."""
    return Work(length=windows.shape[1], texts=windows.numel(), forward=windows.numel(), resident=False)


def first_problem(result: Mapping[str, Any]) -> str | None:
    """Why a checkpoint is not as it should be, if it is not."""
    if result["ok"]:
        return None
    return f"{result['checkpoint']!r} has {len(result['problems'])} problems, first: {result['problems'][0]}"


def _dense_folder(name: str) -> Path:
    """Where the files of the dense model are; a name of the Hub's has to be loaded for that.

    Raises:
        ModelError: there is no such model.
    """
    check_path(name)
    folder = Path(name) if Path(name).is_dir() else load_model(name, device="cpu").folder
    assert folder is not None
    return folder


def _read_manifest(folder: Path) -> _Manifest:
    path = folder / MANIFEST
    try:
        return _Manifest.model_validate_json(path.read_text(encoding="utf-8"), strict=True)
    except OSError as error:
        raise InputError(f"{str(folder)!r} is no checkpoint of gpmetric: {MANIFEST}: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise InputError(f"{str(path)!r} is no manifest: {place}: {first['msg']}") from error
    except ValueError as error:
        raise InputError(f"{str(path)!r} is no manifest: {error}") from error


def _file_problems(folder: Path, manifest: _Manifest, digests: bool) -> Iterator[str]:
    present = set(files_of(folder))
    for name, digest in manifest.files.items():
        if name not in present:
            yield f"{name} is missing"
        elif (folder / name).is_symlink() or (digests and file_digest(folder / name) != digest):
            yield f"{name} is not as it was written: its sha256 differs"
    for name in sorted(present - manifest.files.keys() - {MANIFEST}):
        yield f"{name} was not written with the others"


def _tensor_problems(folder: Path, manifest: _Manifest) -> Iterator[str]:
    """Tensors that are missing or not finite, and layers that are not what they should be."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    yield from (f"config.json has a {key}" for key in FOREIGN_KEYS if key in config)
    places = tensors(folder)
    yield from (f"tensor {name} is missing" for name in manifest.tensors if name not in places)
    yield from (f"tensor {name} is not in the manifest" for name in places if name not in manifest.tensors)
    for name, file in places.items():
        if not all(_is_finite(piece) for piece in file.pieces(name)):
            yield f"tensor {name} holds NaN or infinity"
    for layer in manifest.layers:
        if layer.pieces and are_there(layer.pieces, layer.shape, places):
            yield from _layer_problems(gathered(pieces_of(layer.pieces), places), layer)
        elif layer.pieces:
            yield f"layer {layer.name} is not in the tensors that the manifest says"
        elif layer.tensor in places:
            yield from _layer_problems(places[layer.tensor][layer.tensor], layer)
        else:
            yield f"layer {layer.name} has no tensor"


def _is_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite; float8 is widened for that."""
    if not values.is_floating_point():
        return True
    ends = torch.stack((values.float() if values.itemsize == 1 else values).aminmax())  # NaN if any is
    return bool(ends.isfinite().all())


def _shape_problems(model: Model, manifest: _Manifest) -> Iterator[str]:
    """Numbers of parameters, and widths where a config tells them, that are not those that `slim` wrote."""
    if manifest.kind != "slim":
        return
    count = sum(parameter.numel() for parameter in model.module.parameters())
    if count != manifest.parameters_after:
        yield f"the model has {count} parameters, the manifest says {manifest.parameters_after}"
    widths = [one.model_dump() for one in manifest.widths or ()]
    told = getattr(model.module.config, "widths", widths)
    there, said = ([one for one in listed if any(one.values())] for listed in (told, widths))
    if there != said:
        yield "the layers of the model have other widths than the manifest says"


def _layer_problems(stored: Tensor, layer: _Layer) -> Iterator[str]:
    weight = stored.t() if layer.transposed and stored.dim() == 2 else stored
    if tuple(weight.shape) != layer.shape or not weight.numel():
        yield f"layer {layer.name} is {list(weight.shape)}, the manifest says {list(layer.shape)}"
        return
    gone = weight == 0
    zeros = int(torch.count_nonzero(gone))
    if zeros != layer.zeros:
        yield f"layer {layer.name} has {zeros} zeros, the manifest says {layer.zeros}"
    target = parse_target(layer.target)
    if not target.group and layer.granularity != "n:m":
        target = target.within(layer.granularity)
    if short := _too_full(gone, target):
        yield f"layer {layer.name} has {short} groups with more weights than {target.text} leaves"


def _too_full(gone: Tensor, target: Target) -> int:
    """How many comparison groups of zeros [out, in], bool, have fewer of them than the target removes."""
    if not target.fits(gone.shape[1]):
        return 1
    found = 0

    def count(groups: Tensor) -> Tensor:
        nonlocal found
        found += int((groups.sum(dim=1, dtype=torch.int32) < target.removed(groups.shape[1])).sum())
        return groups

    by_group(count, gone, target)
    return found


def _differences(folder: Path, manifest: _Manifest, dense: Path) -> Iterator[str]:
    """Tensors that pruning should have left alone, dtype included."""
    layers = {layer.tensor: layer for layer in manifest.layers if not layer.pieces}
    written, there = tensors(folder), tensors(dense)
    whole = [one for one in manifest.layers if are_there(one.pieces, one.shape, written)]
    experts = by_tensor({one.name: (one.pieces, _only_masked(manifest, one)) for one in whole})
    for name, file in written.items():
        if name not in there:
            yield f"tensor {name} is not in {str(dense)!r}"
            continue
        mine, other = file.places[name], there[name].places[name]
        if mine.shape != other.shape or mine.dtype != other.dtype:
            kinds = [f"{one.dtype} {list(one.shape)}" for one in (mine, other)]
            yield f"tensor {name} is {kinds[0]}, in {str(dense)!r} {kinds[1]}"
            continue
        if name in experts:
            yield from expert_differences(file, there[name], name, experts[name])
            continue
        moves = [(move.order, move.tensors[name]) for move in manifest.moves if name in move.tensors]
        try:
            pairs = _pairs(file, there[name], name, moves)
        except (ValueError, IndexError) as error:
            yield f"tensor {name} cannot have the order that the manifest says: {error}"
            continue
        masked = name in layers and _only_masked(manifest, layers[name])
        if name not in layers and not all(torch.equal(*pair) for pair in pairs):
            yield f"tensor {name} is not that of {str(dense)!r}, though it was not pruned"
        elif masked and not all(torch.equal(found, was.masked_fill_(found == 0, 0)) for found, was in pairs):
            yield f"weights of layer {layers[name].name} that were kept are not those of {str(dense)!r}"


def _pairs(
    file: TensorFile, dense: TensorFile, name: str, moves: Sequence[tuple[str, int]]
) -> Iterable[tuple[Tensor, Tensor]]:
    """A tensor beside that of the dense model, piece by piece; as a whole where some axes have another order.

    Raises:
        ValueError, IndexError: an order is none of its axis.
    """
    if not moves:
        return zip(file.pieces(name), dense.pieces(name), strict=True)
    value = dense[name]
    for text, axis in moves:
        order = torch.tensor([int(one) for one in text.split()])
        if sorted(order.tolist()) != list(range(value.shape[axis])):
            raise ValueError(f"not each of {value.shape[axis]} is in it once")
        value = in_order(value, order, axis)
    return [(file[name], value)]


def _only_masked(manifest: _Manifest, layer: _Layer) -> bool:
    """Whether the weights that a layer kept are the dense ones."""
    return manifest.update == "none" or parse_target(layer.target).sparsity == 0


def _windows(model: Model, manifest: _Manifest) -> Tensor | None:
    """[n, length], those of the manifest; None where there is no such text here."""
    said = manifest.text
    try:
        if said.text.startswith("hf:"):
            return None
        text = open_text(said.text)
    except DataError:
        return None
    if text is None or text.digest != said.sha256:
        return None
    seed = manifest.seed if manifest.shuffle else None
    return read_windows(model, text, said.sequence_length, said.windows, seed).tokens
