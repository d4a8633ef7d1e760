"""Reading a written checkpoint again: is it whole, finite, as sparse as its manifest says, and else as it was?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from gpmetric.blockwise.couplings import in_order
from gpmetric.data import STDIN
from gpmetric.errors import DataError, GpmetricError, InputError
from gpmetric.evaluation.perplexity import perplexity
from gpmetric.files import read_object
from gpmetric.functions import as_function
from gpmetric.loading import check_path, load_model, open_model, pick_device, prepare_model
from gpmetric.models import Model, Told
from gpmetric.outputs import MANIFEST
from gpmetric.pruning.checkpoint import FOREIGN_KEYS, is_finite, stored_layers, tensors
from gpmetric.pruning.manifest import LayerRecord, Manifest, read_manifest
from gpmetric.pruning.mask import by_group
from gpmetric.pruning.output_folder import file_digest, files_of
from gpmetric.pruning.requests import VerifyRequest
from gpmetric.pruning.taken_over import lacking_code
from gpmetric.pruning.verify_experts import are_there, by_tensor, expert_differences, pieces_of
from gpmetric.results import VerifyResult
from gpmetric.session.deadline import Deadline
from gpmetric.session.evaluate import text_loss
from gpmetric.session.listeners import Listener, Progress, silent
from gpmetric.session.plan import Plan, make_plan
from gpmetric.session.splits import open_text, read_windows
from gpmetric.session.work import Work
from gpmetric.stored_experts import gathered
from gpmetric.stored_names import unused_names
from gpmetric.targets import Target, parse_target
from gpmetric.tensor_file import TensorFile

__all__ = ["first_problem", "run_verify", "verify", "verify_files"]

_ROUNDED = 1e-9  # of a sparsity: what a text of it may lose
_CLOSE = 1e-3  # of a perplexity: what other versions and devices may change


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
        `ok`, `problems` and what was `unchecked` (one line each), `layers`, `sparsity` of their tensors (of `slim`, as
        the manifest says), and `perplexity` of the reloaded model, None where the text that it was measured on is not
        at hand.

    Raises:
        InputError: no such folder, no manifest in it that can be read, no dense model, or no such device.
        TimeOverError, OutOfMemoryError: there is not enough for the perplexity.
    """
    told = listener or Listener()
    watched = Deadline.starting(request.minutes, started).watching(told.progress)
    return verify_files(request, needs=told.needs, progress=watched, reading=told.progress)


def verify_files(
    request: VerifyRequest,
    windows: Tensor | None = None,
    *,
    needs: Callable[[Plan], None] = lambda plan: None,
    progress: Progress,
    reading: Progress = silent,
    digests: bool = True,
) -> dict[str, Any]:
    """What `run_verify` does and returns.

    Args:
        request: as of `run_verify`.
        windows: [n, length], to measure it on; by default those of the manifest, where their text is at hand.
        needs: told of what running the model takes.
        progress: told of the perplexity on its way.
        reading: told of files, tensors and the model that are read.
        digests: whether the files' sha256 are compared, too.
    """
    path, against = Path(request.folder), request.against
    pick_device(request.device)
    manifest, digest = read_manifest(path)
    if against is not None and manifest.kind == "slim":
        raise InputError(f"--against compares what `gpmetric prune` wrote; {str(path)!r} is of `gpmetric slim`")
    dense = None if against is None else _dense_folder(against)
    problems = [*_contradictions(manifest, digest)]
    zeros: dict[str, int] = {}
    found: float | None = None
    try:
        problems += _file_problems(path, manifest, digests, partial(reading, "files"))
        problems += _tensor_problems(path, manifest, zeros, partial(reading, "tensors"))
        if dense is not None:
            problems += _differences(path, manifest, dense, partial(reading, "tensors beside the dense ones"))
        chosen = {"include": manifest.include, "exclude": manifest.exclude}
        reading("opening the model", 0, 1)
        model = open_model(str(path), device=request.device, dtype=manifest.dtype, **chosen)
        reading("opening the model", 1, 1)
        model = prepare_model(model, resident=False, progress=reading)
        problems += _slim_problems(model, manifest, tensors(path))
        problems += _list_problems(model, manifest)
        windows = _windows(model, manifest) if windows is None else windows
    except (GpmetricError, OSError, ValueError, KeyError, TypeError) as error:
        problems.append(f"the checkpoint cannot be read: {error}")
        windows = None
    if windows is not None:
        needs(plan := make_plan(model, _work(windows), request.memory_limit))
        assert model.placement is not None
        model.placement.room = plan.room
        found = perplexity(text_loss(model, windows, progress))
    entries = sum(math.prod(layer.shape) for layer in manifest.layers)
    sparsity = sum(zeros.values()) / entries if entries and manifest.kind == "prune" else manifest.sparsity
    if zeros and abs(sparsity - manifest.sparsity) > _ROUNDED:
        problems.append(f"{sparsity:.6f} of the layers' weights are zero, the manifest says {manifest.sparsity:.6f}")
    said = manifest.perplexity
    if found is not None and said is not None and not abs(found - said) <= _CLOSE * said:
        problems.append(f"perplexity of the reloaded model is {found:.4f}, the manifest says {said:.4f}")
    return {
        "checkpoint": str(request.folder),
        "against": against,
        "ok": not problems,
        "problems": list(map(_printable, problems)),
        "unchecked": list(map(_printable, _unchecked(manifest, against, found))),
        "kind": manifest.kind,
        "layers": len(manifest.layers),
        "sparsity": sparsity,
        "perplexity": found,
    }


verify = as_function("verify", VerifyRequest, run_verify, "folder", result=VerifyResult)


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


def _printable(line: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in line)


def _contradictions(manifest: Manifest, digest: str) -> Iterator[str]:
    """What a manifest says against itself."""
    if manifest.manifest_sha256 is None and "include" in manifest.model_fields_set:  # of this version
        yield f"{MANIFEST} has lost its digest of itself"
    if manifest.manifest_sha256 not in (None, digest):
        yield f"{MANIFEST} is not as it was written: its sha256 differs"
    if manifest.kind == "prune" and manifest.allocation is None and manifest.target is not None:
        asked = parse_target(manifest.target)
        for layer in manifest.layers:
            mine = parse_target(layer.target)
            if (mine.group, mine.sparsity) != (asked.group, asked.sparsity):
                yield f"layer {layer.name} has the target {layer.target}, the manifest says {manifest.target}"


def _unchecked(manifest: Manifest, against: str | None, found: float | None) -> Iterator[str]:
    """What a checkpoint's own files, or what was given besides, do not tell."""
    if manifest.manifest_sha256 is None:
        yield "the manifest itself: earlier versions wrote no digest of it"
    if found is None or manifest.perplexity is None:
        yield f"perplexity: the text {manifest.text.text!r} is not at hand, or the model cannot be read"
    if manifest.kind == "slim":
        yield "the share of parameters that is gone: the dense model's are not here"
        return
    if "include" not in manifest.model_fields_set:
        yield "layers that the manifest does not list: earlier versions wrote no --include and --exclude"
    if manifest.allocation is not None:
        yield "whether the layers' targets are those of the allocation, which is not here"
    if against is None:
        yield "tensors that were not pruned, and kept weights: --against MODEL compares them"
    elif manifest.update != "none":
        yield f"kept weights of pruned layers: --update {manifest.update} changed them"


def _in_turn(items: Mapping[str, Any], told: Told) -> Iterator[tuple[str, Any]]:
    """The items of a mapping, each told of before it is taken up."""
    for done, item in enumerate(items.items()):
        told(done, len(items))
        yield item
    told(len(items), len(items))


def _file_problems(folder: Path, manifest: Manifest, digests: bool, told: Told) -> Iterator[str]:
    present = set(files_of(folder))
    for name, digest in _in_turn(manifest.files, told):
        if name not in present:
            yield f"{name} is missing"
        elif (folder / name).is_symlink() or (digests and file_digest(folder / name) != digest):
            yield f"{name} is not as it was written: its sha256 differs"
    for name in sorted(present - manifest.files.keys() - {MANIFEST}):
        yield f"{name} was not written with the others"
    if (folder / MANIFEST).is_symlink():
        yield f"{MANIFEST} is a link"
    known = {above for name in manifest.files for above in PurePosixPath(name).parents}
    for inner in sorted(path for path in folder.rglob("*") if path.is_dir() and not path.is_symlink()):
        if (place := PurePosixPath(inner.relative_to(folder))) not in known:
            yield f"{place} is a folder that was not written with the others"


def _tensor_problems(folder: Path, manifest: Manifest, zeros: dict[str, int], told: Told) -> Iterator[str]:
    """Tensors that are missing or not finite, and layers that are not what they should be; counts their zeros."""
    config = read_object(folder / "config.json")
    yield from (f"config.json has a {key}" for key in FOREIGN_KEYS if key in config)
    yield from (f"a configuration names code in {name}, which is missing" for name in lacking_code(folder))
    places = tensors(folder)
    yield from (f"tensor {name} is missing" for name in manifest.tensors if name not in places)
    yield from (f"tensor {name} is not in the manifest" for name in places if name not in manifest.tensors)
    for name, file in _in_turn(places, told):
        if not all(is_finite(piece) for piece in file.pieces(name)):
            yield f"tensor {name} holds NaN or infinity"
    for layer in manifest.layers:
        if layer.pieces and are_there(layer.pieces, layer.shape, places):
            yield from _layer_problems(gathered(pieces_of(layer.pieces), places), layer, zeros)
        elif layer.pieces:
            yield f"layer {layer.name} is not in the tensors that the manifest says"
        elif layer.tensor in places:
            yield from _layer_problems(places[layer.tensor][layer.tensor], layer, zeros)
        else:
            yield f"layer {layer.name} has no tensor"


def _list_problems(model: Model, manifest: Manifest) -> Iterator[str]:
    """Layers of the model that the manifest should list, and does not, or says something else of."""
    if manifest.kind != "prune":
        return
    listed = {layer.name: layer for layer in manifest.layers}
    stored = {name: tensor for name, (_, tensor) in stored_layers(model).items()}
    stored |= {name: pieces[0].tensor for name, pieces in model.experts.items()}
    for layer in model.layers:
        said = listed.pop(layer.name, None)
        if said is None:
            if "include" in manifest.model_fields_set:
                yield f"layer {layer.name} of the model is not in the manifest"
        elif said.tensor != stored[layer.name]:
            yield f"layer {layer.name} is stored as {stored[layer.name]}, the manifest says {said.tensor}"
        elif said.shape != (shape := tuple(layer.weight.shape)):
            yield f"layer {layer.name} is {list(shape)} in the model, the manifest says {list(said.shape)}"
    yield from (f"layer {name} of the manifest is none of the model's" for name in listed)


def _slim_problems(model: Model, manifest: Manifest, places: Mapping[str, TensorFile]) -> Iterator[str]:
    """Tensors, numbers of parameters, and widths where a config tells them, that are not those that `slim` wrote."""
    if manifest.kind != "slim":
        return
    yield from (f"tensor {name} is not used by the model" for name in unused_names(model.module, places))
    count = sum(parameter.numel() for parameter in model.module.parameters())
    if count != manifest.parameters_after:
        yield f"the model has {count} parameters, the manifest says {manifest.parameters_after}"
    widths = [one.model_dump() for one in manifest.widths or ()]
    told = getattr(model.module.config, "widths", widths)
    there, said = ([one for one in listed if any(one.values())] for listed in (told, widths))
    if there != said:
        yield "the layers of the model have other widths than the manifest says"


def _layer_problems(stored: Tensor, layer: LayerRecord, counted: dict[str, int]) -> Iterator[str]:
    weight = stored.t() if layer.transposed and stored.dim() == 2 else stored
    if tuple(weight.shape) != layer.shape or not weight.numel():
        yield f"layer {layer.name} is {list(weight.shape)}, the manifest says {list(layer.shape)}"
        return
    gone = weight == 0
    zeros = counted[layer.name] = int(torch.count_nonzero(gone))
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


def _differences(folder: Path, manifest: Manifest, dense: Path, told: Told) -> Iterator[str]:
    """Tensors that pruning should have left alone, dtype included."""
    layers = {layer.tensor: layer for layer in manifest.layers if not layer.pieces}
    written, there = tensors(folder), tensors(dense)
    whole = [one for one in manifest.layers if are_there(one.pieces, one.shape, written)]
    experts = by_tensor({one.name: (one.pieces, _only_masked(manifest, one)) for one in whole})
    for name, file in _in_turn(written, told):
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


def _only_masked(manifest: Manifest, layer: LayerRecord) -> bool:
    """Whether the weights that a layer kept are the dense ones."""
    return manifest.update == "none" or parse_target(layer.target).sparsity == 0


def _windows(model: Model, manifest: Manifest) -> Tensor | None:
    """[n, length], those of the manifest; None where there is no such text here."""
    said = manifest.text
    try:
        if said.text.startswith("hf:") or said.text.partition("#")[0] == STDIN:
            return None
        text = open_text(said.text, manifest.text_column)
        if text.source is None and text.digest != said.sha256:
            return None
        seed, bos = manifest.seed if manifest.shuffle else None, "always" if said.bos else "never"
        windows = read_windows(model, text, said.sequence_length, said.windows, seed, bos=bos)
    except DataError:
        return None
    return windows.tokens if windows.describe()["sha256"] == said.sha256 else None
