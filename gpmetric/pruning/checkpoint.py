"""A pruned model as a standard Hugging Face checkpoint: the files of the dense one, with other numbers in its layers.

Files of tensors are copied, and the layers' numbers are written in their place: every tensor keeps its name, file and
dtype. The manifest, `gpmetric_manifest.json`, says what was pruned, how, and from what, and has a sha256 of every file.
`quantization_config` and its like are left out: serving engines refuse them.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from gpmetric import slim_models
from gpmetric.blockwise.couplings import Move, in_order
from gpmetric.errors import GpmetricError, ModelError
from gpmetric.files import read_object, write_text
from gpmetric.models import Layer, Model
from gpmetric.outputs import MANIFEST
from gpmetric.pruning.manifest import write_manifest
from gpmetric.pruning.output_folder import check_room, files_of, unwritable
from gpmetric.pruning.taken_over import copy_code, copy_licence, front_matter, measured, printable, titled
from gpmetric.stored_experts import gathered, put_back, read_pieces
from gpmetric.stored_names import stored_names
from gpmetric.targets import Target
from gpmetric.tensor_file import TensorFile, weight_files, write_tensors

__all__ = ["FOREIGN_KEYS", "CheckpointWriter", "is_finite", "stored_layers", "tensors", "write_masks"]

FOREIGN_KEYS = ("quantization_config", "sparsity_config", "compression_config")  # of a config.json
# What is taken over from the dense checkpoint beside its tensors: configurations, tokenizer, chat templates.
_KEPT = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "additional_chat_templates/*.jinja")

_CARD = """{head}

# {name}, pruned

`{formula}` at `{target}`{allocated}: {sparsity:.4f} of the weights of {layers} linear layers are zero.
Made by gpmetric {version}; `{manifest}` says how, and `gpmetric verify` reads it all again.

{table}
"""


class CheckpointWriter:
    """Writes a pruned model into a folder layer by layer; writing a layer again changes nothing.

    Args:
        model: its files are the dense ones; of its weights only the dtypes are looked at.
        folder: of the new files; it may hold some of them.
        rules: by layer name, what it is pruned to.
        update: whether weights that stay may have changed.

    Raises:
        GpmetricError: the checkpoint stores a layer in another form than the model has it, is damaged, or holds a
            tensor, of no use to the model, that is not finite; or an expert's weight is not where it should be.
    """

    def __init__(self, model: Model, folder: Path, rules: Mapping[str, Target], *, update: bool) -> None:
        assert model.folder is not None  # load_model knows it
        self._model, self._folder, self._rules, self._update = model, folder, rules, update
        self._source = model.folder
        self._places = tensors(self._source)
        self._names = stored_names(model.module, self._places)
        self._stored = _stored_in(model, self._places, self._names)
        self._shards = {file.path: file for file in self._places.values()}
        self._check_unused()
        _check_experts(model, self._places)

    def _check_unused(self) -> None:
        """Looks at the tensors that loading did not: they are copied, and all that is written has to be finite."""
        prefix = f"{self._model.module.base_model_prefix}."
        known = {name for name, _ in self._model.module.named_parameters(remove_duplicate=False)}
        known |= {name.removeprefix(prefix) for name in known} | set(self._names.values())
        known |= {piece.tensor for pieces in self._model.experts.values() for piece in pieces}
        for name, file in self._places.items():
            if name not in known and not all(is_finite(piece) for piece in file.pieces(name)):
                raise ModelError(
                    f"tensor {name} of {self._model.name!r} holds NaN or infinity; the model does not use it, but a "
                    "checkpoint would have it: leave it out of the model's files"
                )

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """By layer, what its weight is stored in."""
        found = {name: file.places[tensor].dtype for name, (file, tensor) in self._stored.items()}
        experts = {name: pieces[0].tensor for name, pieces in self._model.experts.items()}
        return found | {name: self._places[tensor].places[tensor].dtype for name, tensor in experts.items()}

    def copy_files(self) -> bool:
        """Copies the files of tensors that are not there yet; whether there were any.

        Raises:
            GpmetricError: the disk has no room for them.
            OSError: they cannot be written.
        """
        missing = [path for path in self._shards if not _same_size(path, self._folder / path.name)]
        check_room(self._folder.parent, sum(path.stat().st_size for path in missing))
        for path in missing:
            partial = self._folder / f".{path.name}.partial"
            shutil.copyfile(path, partial)
            os.replace(partial, self._folder / path.name)
        return bool(missing)

    def write_layer(self, layer: Layer, pruned: Tensor | None, moves: Sequence[Move] = ()) -> dict[str, Any]:
        """Puts a layer's numbers in their place, and returns what the manifest says of it.

        Args:
            layer: of the model.
            pruned: [out, in], on any device, in the order of the model; None where the layer is left alone.
            moves: of its block; those of the layer's weight are made.
        """
        if layer.name in self._model.experts:
            return self._write_expert(layer, pruned)
        file, name = self._stored[layer.name]
        written = file[name]
        before = _zeros(written)
        axes = [(move.order, move.parameters.get(f"{layer.name}.weight")) for move in moves]
        if pruned is not None:
            written = self._written(written, layer, pruned)
        for order, axis in axes:
            written = written if axis is None else in_order(written, order, axis)
        if pruned is not None or any(axis is not None for _, axis in axes):
            self._write(name, written)
        weight = layer.oriented(written)
        return self._described(layer, weight, before, name) | {"transposed": isinstance(layer.module, Conv1D)}

    def _write_expert(self, layer: Layer, pruned: Tensor | None) -> dict[str, Any]:
        """The same of an expert's weight, whose pieces go where they were."""
        pieces = self._model.experts[layer.name]
        weight = gathered(pieces, self._places)  # [out, in]
        before = _zeros(weight)
        if pruned is not None:
            stored = weight.dtype
            if self._update:
                weight = pruned.to(layer.parameter.dtype).cpu().to(stored)
            else:
                weight.masked_fill_((pruned == 0).cpu(), 0)
            put_back(pieces, self._copies, weight)
        told = self._described(layer, weight, before, pieces[0].tensor)
        return told | {"transposed": False, "pieces": [piece.describe() for piece in pieces]}

    @functools.cached_property
    def _copies(self) -> dict[str, TensorFile]:
        """By tensor, the file of the new checkpoint that holds it."""
        copies = {path: TensorFile(self._folder / path.name) for path in self._shards}
        return {name: copies[file.path] for name, file in self._places.items()}

    def _described(self, layer: Layer, written: Tensor, before: int, tensor: str) -> dict[str, Any]:
        """What the manifest says of a layer's weight [out, in]."""
        rule, zeros = self._rules[layer.name], _zeros(written)
        return {
            "name": layer.name,
            "tensor": tensor,
            "shape": list(written.shape),
            "transposed": False,
            "granularity": rule.granularity,
            "target": rule.text,
            "entries": written.numel(),
            "zeros": zeros,
            "zeros_before": before,
            "sparsity": zeros / written.numel(),
        }

    def write_moves(self, moves: Sequence[Move], layers: Sequence[Layer]) -> list[dict[str, Any]]:
        """Puts tensors that are moved in their place, but for weights of layers, and returns what the manifest says.

        Args:
            moves: of a block.
            layers: of the model; `write_layer` is called for each.

        Raises:
            GpmetricError: the checkpoint stores such a tensor in another form.
        """
        written = {f"{layer.name}.weight" for layer in layers}
        stored = functools.partial(_stored_name, self._model, self._names)
        for full in dict.fromkeys(name for move in moves for name in move.parameters):
            if full not in written:
                name = stored(full)
                value = self._places[name][name]
                for move in moves:
                    value = in_order(value, move.order, move.parameters[full]) if full in move.parameters else value
                self._write(name, value)
        return [
            {
                "order": " ".join(map(str, move.order.tolist())),
                "tensors": {stored(full): axis for full, axis in move.parameters.items()},
            }
            for move in moves
        ]

    def finish(
        self, made: dict[str, Any], layers: Sequence[Mapping[str, Any]], others: Mapping[str, str] = {}
    ) -> dict[str, Any]:
        """Writes the other files of the dense model, a model card and the manifest, and returns the manifest.

        Args:
            made: what the manifest says of source, metric, target, allocation, calibration, perplexity and versions.
            layers: what `write_layer` returned for each, in the model's order.
            others: files besides, by name.

        Raises:
            GpmetricError, OSError: the files cannot be written.
        """
        shards = {path.name for path in self._shards}
        for name in files_of(self._folder):  # of a run that was killed
            if name not in shards:
                (self._folder / name).unlink()
        _copy_others(
            self._model, self._source, self._folder, {name: made[name] for name in ("metric", "target", "update")}
        )
        zeros, entries = (sum(layer[key] for layer in layers) for key in ("zeros", "entries"))
        manifest: dict[str, Any] = {"version": 1} | made | {"sparsity": zeros / entries, "layers": list(layers)}
        for name, text in {**others, "README.md": _card(self._model, manifest)}.items():
            write_text(self._folder / name, text)
        manifest["tensors"] = sorted(self._places)
        return write_manifest(self._folder, manifest)

    def _write(self, name: str, value: Tensor) -> None:
        """Puts other numbers in the place of a tensor of the copies, which have the same places."""
        for shard in self._shards.values():
            if name in shard.places:
                TensorFile(self._folder / shard.path.name).write(name, value)

    def _written(self, stored: Tensor, layer: Layer, pruned: Tensor) -> Tensor:
        """A layer's weight as its file holds it: the dense numbers masked in place, or the updated ones, rounded."""
        if not self._update:
            return stored.masked_fill_(layer.oriented(pruned == 0).cpu(), 0)
        return layer.oriented(pruned.to(layer.parameter.dtype)).cpu().to(stored.dtype)


def stored_layers(model: Model) -> dict[str, tuple[TensorFile, str]]:
    """By layer name, the file that holds its weight, and its name there.

    Experts of a mixture are not among them: `Model.experts` has the pieces that they are stored in.

    Raises:
        GpmetricError: the checkpoint stores a layer in another form than the model has it, or is damaged.
    """
    assert model.folder is not None
    places = tensors(model.folder)
    return _stored_in(model, places, stored_names(model.module, places))


def _stored_in(
    model: Model, places: Mapping[str, TensorFile], names: Mapping[str, str]
) -> dict[str, tuple[TensorFile, str]]:
    """The same, of the files by tensor, and of the parameters' names there."""
    found = {}
    for layer in (one for one in model.layers if one.name not in model.experts):
        name = _stored_name(model, names, f"{layer.name}.weight")
        found[layer.name] = places[name], name
    return found


def _check_experts(model: Model, files: Mapping[str, TensorFile]) -> None:
    """Compares every expert's weight with the pieces of the files that it is mapped to, before any work.

    Raises:
        GpmetricError: they differ.
    """
    for layer in (one for one in model.layers if one.name in model.experts):
        weight = layer.weight
        stored = gathered(model.experts[layer.name], files).to(weight.dtype)
        if stored.shape != weight.shape or not torch.equal(stored, weight.cpu()):
            tensor = model.experts[layer.name][0].tensor
            raise GpmetricError(
                f"the checkpoint of {model.name!r} does not hold the weight of {layer.name} where transformers' "
                f"conversion puts it ({tensor}): it cannot be written back"
            )
        if model.placement is not None:
            model.placement.let_go(layer.parameter.data)


def _stored_name(model: Model, names: Mapping[str, str], full: str) -> str:
    """What the checkpoint calls a parameter."""
    if full not in names:
        layer = full.removesuffix(".weight")
        raise GpmetricError(
            f"the checkpoint of {model.name!r} does not store layer {layer} as the model has it, so that it cannot be "
            "written (--exclude it)"
        )
    return names[full]


def _zeros(values: Tensor) -> int:
    return values.numel() - int(torch.count_nonzero(values))


def _same_size(path: Path, copy: Path) -> bool:
    return copy.exists() and copy.stat().st_size == path.stat().st_size


def _copy_others(model: Model, source: Path, folder: Path, told: dict[str, Any]) -> None:
    """Takes over configurations, tokenizer and templates; `told` is what the config says of the pruning."""
    for path in (path for pattern in _KEPT for path in source.glob(pattern)):
        if path.name != MANIFEST and not (path.name.endswith(".index.json") and not _is_read(path, source)):
            copy = folder / path.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)
    config = read_object(source / "config.json")
    config = {key: value for key, value in config.items() if key not in FOREIGN_KEYS}
    config["gpmetric"] = told
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
    copy_licence(source, folder)
    copy_code(source, folder)
    if model.module.config.model_type.startswith("slim_"):
        shutil.copyfile(slim_models.__file__, folder / slim_models.SLIM_FILE)


def _is_read(index: Path, source: Path) -> bool:
    """Whether the files that an index of weights names are those that are read: none of `.bin`, none left behind."""
    with suppress(OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return named <= {path.name for path in weight_files(source)}
    return False


def _card(model: Model, manifest: dict[str, Any]) -> str:
    """The model card."""
    allocation = manifest.get("allocation")
    return _CARD.format(
        head=front_matter(model, ("sparsity", "pruning", "gpmetric")), table=measured(model, manifest),
        name=titled(Path(model.name).name), formula=printable(manifest["formula"]),
        target=printable(manifest["target"]), sparsity=manifest["sparsity"], layers=len(manifest["layers"]),
        allocated=f", allocated layer by layer by `{printable(allocation['file'])}`" if allocation else "",
        version=manifest["versions"]["gpmetric"], manifest=MANIFEST,
    )  # fmt: skip


def write_masks(folder: Path, layers: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Writes which weights of a checkpoint are not zero, boolean [out, in] by layer name, as one safetensors file.

    Args:
        folder: of the checkpoint.
        layers: what its manifest says of them.
        path: of the file.

    Raises:
        GpmetricError: it cannot be written, from an OSError, or the checkpoint is damaged.
    """
    files = tensors(folder)
    by_name = {layer["name"]: layer for layer in layers}

    def mask(name: str) -> Tensor:
        layer = by_name[name]
        if "pieces" in layer:
            return gathered(read_pieces(layer["pieces"]), files) != 0
        weight = files[layer["tensor"]][layer["tensor"]]
        return (weight.t() if layer["transposed"] else weight) != 0

    partial = path.with_name(f".{path.name[:200]}.partial")  # which one that was killed left there is written over
    try:
        write_tensors(partial, {name: (torch.bool, layer["shape"]) for name, layer in by_name.items()}, mask, {})
        os.replace(partial, path)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        partial.unlink(missing_ok=True)


def tensors(folder: Path) -> dict[str, TensorFile]:
    """Every tensor that transformers reads of a checkpoint, and the file that holds it.

    Raises:
        OSError: a file is missing.
        GpmetricError: a file is damaged, or the index names one elsewhere.
    """
    found: dict[str, TensorFile] = {}
    for path in weight_files(folder):
        file = TensorFile(path)
        found |= dict.fromkeys(file.places, file)
    return found


def is_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite; float8 is widened for that."""
    if not values.is_floating_point() or not values.numel():
        return True
    ends = torch.stack((values.float() if values.itemsize == 1 else values).aminmax())  # NaN if any is
    return bool(ends.isfinite().all())
