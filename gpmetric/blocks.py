"""Blocks of a causal language model and the layers in them that are pruned, by structure; no architecture by name.

A list of blocks is an outermost ModuleList of the decoder whose members hold linear layers. The largest one and its
kin, of the same parent or made of the same classes, are the blocks; towers for images and sound are not. Prunable are
the Linear and Conv1D modules inside, but for what chooses experts. Blocks that share a layer are one block, in which
the layer is one layer: its statistics are those of all its uses.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from gpmetric.errors import InputError, ModelError
from gpmetric.experts import refuse_unsplit
from gpmetric.models import Block, Layer, Model

__all__ = ["find_blocks", "find_layers", "leave_dense", "why_dense"]

_LINEAR = (nn.Linear, Conv1D)
# A module whose name says that it chooses experts; what is found by its use is told by `check_blocks`.
_ROUTER = re.compile(r"(^|\.)(\w*router|gate|shared_expert_gate)(\.|$)")
_TOWER = re.compile(r"(^|\.)\w*(vision|visual|image|video|audio|speech)")
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def find_blocks(module: Any, include: str | None = None, exclude: str | None = None) -> tuple[Block, ...]:
    """The blocks that `find_layers` finds; arguments and errors as there."""
    return find_layers(module, include, exclude)[0]


def find_layers(
    module: Any, include: str | None = None, exclude: str | None = None
) -> tuple[tuple[Block, ...], dict[str, str]]:
    """The blocks of a model, with those of their layers that are pruned, and why others of them stay dense, by name.

    Args:
        module: transformers' model.
        include, exclude: regular expressions, found in a name or not.

    Raises:
        InputError: not a regular expression.
        ModelError: no repeated blocks, no layer left, or weights that would silently stay dense.
    """
    wanted, unwanted = _compile("--include", include), _compile("--exclude", exclude)
    members = [(f"{prefix}.{index}", block) for prefix, found in _lists(module) for index, block in enumerate(found)]
    for name, block in members:
        refuse_unsplit(name, block)
    _unify([block for _, block in members])
    owners = _owners(module)
    dense: dict[str, str] = {}
    layers: dict[nn.Module, tuple[Layer, list[int]]] = {}  # and the members that use it
    for place, (prefix, block) in enumerate(members):
        for name, child in block.named_modules(prefix=prefix):
            if not isinstance(child, _LINEAR):
                continue
            if child in layers:
                layers[child][1].append(place)
            elif why := _why(name, child, owners, wanted, unwanted):
                dense.setdefault(name, why)
            else:
                layers[child] = Layer(name, child), [place]
    if not layers:
        raise ModelError(f"no prunable layer is left in {type(module).__name__} (--include, --exclude)")
    blocks = []
    for first, last in _spans([places for _, places in layers.values()], len(members)):
        inside = [block for _, block in members[first : last + 1]]
        found = tuple(layer for layer, places in layers.values() if first <= places[0] <= last)
        blocks.append(Block(inside[0] if len(inside) == 1 else nn.ModuleList(inside), found))
    return tuple(blocks), dense


def leave_dense(model: Model, whys: Mapping[str, str]) -> Model:
    """A model of which some layers, by name, are not pruned.

    Raises:
        ModelError: no layer is left.
    """
    if not whys:
        return model
    blocks = [
        replace(block, layers=tuple(layer for layer in block.layers if layer.name not in whys))
        for block in model.blocks
    ]
    if not any(block.layers for block in blocks):
        name, why = next(iter(whys.items()))
        raise ModelError(f"no prunable layer is left in model {model.name!r}: {name} is {why}")
    return replace(model, blocks=tuple(blocks), dense={**model.dense, **whys})


def why_dense(model: Model) -> dict[str, str]:
    """By name, why each parameter that is not pruned stays as it is."""
    pruned = {id(layer.parameter) for layer in model.layers}
    inside = {id(one) for block in model.blocks for one in block.module.parameters()}
    output = model.module.get_output_embeddings()
    behind = set() if output is None else {id(one) for one in output.parameters()}
    found: dict[str, str] = {}
    seen = set(pruned)
    for owner_name, owner in model.module.named_modules():
        for own_name, parameter in owner.named_parameters(recurse=False):
            name = ".".join(filter(None, (owner_name, own_name)))
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            told = model.dense.get(owner_name) if own_name == "weight" else None
            where = "a part of the output layer" if id(parameter) in behind else None
            outside = None if id(parameter) in inside else "outside the blocks"
            found[name] = told or _kind(owner, own_name, parameter.dim(), where or outside)
    return found


def _kind(owner: nn.Module, name: str, dimensions: int, outside: str | None) -> str:
    """What a parameter is that is no weight of a layer."""
    if isinstance(owner, nn.Embedding):
        return "an embedding"
    if dimensions < 2:
        return "a bias" if "bias" in name else "a vector"
    if isinstance(owner, _CONVOLUTIONS):
        return "a convolution"
    if outside:
        return outside
    return "not of a linear layer" if dimensions == 2 else f"of {dimensions} dimensions, not of a linear layer"


def _lists(module: Any) -> list[tuple[str, nn.ModuleList]]:
    """The lists of blocks of a model, by name, in module order."""
    decoder = module.get_decoder()
    if not any(isinstance(child, nn.ModuleList) for child in decoder.modules()):
        decoder = module.base_model  # of ModernBERT's the output layer is called decoder
    inside = set(decoder.modules())
    found: list[tuple[str, nn.ModuleList]] = []
    for name, child in module.named_modules():
        nested = any(name.startswith(f"{other}.") for other, _ in found)
        if child in inside and not nested and _holds_blocks(child):
            found.append((name, child))
    found = [pair for pair in found if not _TOWER.search(pair[0])] or found
    if not found:
        raise ModelError(f"{type(module).__name__} has no list of repeated blocks")
    prefix, largest = max(found, key=lambda pair: sum(weight.numel() for weight in pair[1].parameters()))
    classes = {type(block) for block in largest}
    return [
        (name, one)
        for name, one in found
        if name.rpartition(".")[0] == prefix.rpartition(".")[0] or classes & {type(block) for block in one}
    ]


def _holds_blocks(child: nn.Module) -> bool:
    """Whether a module is a list whose members, none a list or a layer itself, hold linear layers."""
    if not isinstance(child, nn.ModuleList) or any(isinstance(one, (nn.ModuleList, *_LINEAR)) for one in child):
        return False
    return any(isinstance(one, _LINEAR) for one in child.modules())


def _unify(blocks: Sequence[nn.Module]) -> None:
    """Makes layers that have the same parameters one module, so that who watches one sees all its uses."""
    known: dict[tuple[int, ...], nn.Module] = {}
    for parent in (one for block in blocks for one in block.modules()):
        for name, child in parent.named_children():
            if isinstance(child, _LINEAR):
                twin = known.setdefault(tuple(map(id, child.parameters())), child)
                if twin is not child and type(twin) is type(child):
                    setattr(parent, name, twin)


def _owners(module: nn.Module) -> dict[int, set[nn.Module]]:
    """By parameter, the modules that hold it themselves."""
    found: dict[int, set[nn.Module]] = {}
    for owner in module.modules():
        for parameter in owner.parameters(recurse=False):
            found.setdefault(id(parameter), set()).add(owner)
    return found


def _why(
    name: str,
    layer: nn.Module,
    owners: Mapping[int, set[nn.Module]],
    wanted: re.Pattern[str] | None,
    unwanted: re.Pattern[str] | None,
) -> str | None:
    """Why a layer stays dense, None where it is pruned."""
    if _ROUTER.search(name):
        return "a router, by its name"
    if len(owners[id(layer.weight)]) > 1:
        return "shared with a module that uses it otherwise"
    if (wanted is not None and not wanted.search(name)) or (unwanted is not None and unwanted.search(name)):
        return "left out by --include or --exclude"
    return None


def _spans(uses: Sequence[Sequence[int]], count: int) -> list[tuple[int, int]]:
    """The members 0 to count - 1 in runs [first, last], such that no layer is used in two of them."""
    ends = list(range(count))
    for places in uses:
        ends[places[0]] = max(ends[places[0]], places[-1])
    found: list[tuple[int, int]] = []
    for place in range(count):
        if found and place <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], ends[place])
        else:
            found.append((place, ends[place]))
    return found


def _compile(option: str, pattern: str | None) -> re.Pattern[str] | None:
    try:
        return None if pattern is None else re.compile(pattern)
    except re.error as error:
        raise InputError(f"{option} {pattern!r} is not a regular expression: {error}") from error
