"""A mixture without some of its experts, as stock transformers has it: one number of them in the config."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpmetric.errors import ModelError
from gpmetric.experts import joined_names
from gpmetric.files import read_object, write_text
from gpmetric.models import Model
from gpmetric.structured.groups import Groups

__all__ = ["experts_left", "fewer_experts", "keep_names", "set_experts"]

_NUMBERS = ("num_experts", "num_local_experts", "n_routed_experts")  # what configs call the number of experts


def experts_left(groups: Groups, kept: Tensor) -> list[dict[str, Any]]:
    """By block, how many experts stay and which go; of a block without a mixture 0 and none.

    Args:
        kept: experts [units], bool, that stay.
    """
    found: list[dict[str, Any]] = [{"experts": 0, "removed": []} for _ in range(groups.blocks)]
    for one, mine in zip(groups.mixtures, groups.split(kept), strict=True):
        found[one.block] = {"experts": int(mine.sum()), "removed": (~mine).nonzero()[:, 0].tolist()}
    return found


def set_experts(settings: Mapping[str, Any], made: type, count: int) -> Any:
    """A config of other settings with so many experts, under every name that it has for their number.

    Raises:
        ModelError: it has none of those that are known.
    """
    config = made(**{name: count if name in _NUMBERS else value for name, value in settings.items()})
    names = [name for name in _NUMBERS if getattr(config, name, None) is not None]
    for name in names:
        setattr(config, name, count)
    if not names:
        raise ModelError(f"a {config.model_type} config has no number of experts under a known name: {_NUMBERS}")
    return config


def keep_names(settings: Mapping[str, Any], path: Path) -> None:
    """Has a written config tell the number of experts under the names of the dense one's file, too.

    transformers 5 knows several and writes one; what else reads a config looks for the one that the model came with.
    """
    written = read_object(path)
    (count,) = {written[name] for name in _NUMBERS if name in written}
    if more := {name: count for name in _NUMBERS if name in settings and name not in written}:
        write_text(path, json.dumps(written | more, indent=2, sort_keys=True) + "\n")


def fewer_experts(model: Model, groups: Groups, kept: Tensor, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A model's state under transformers' names, slices of fused weights stacked, without what is of other experts.

    Args:
        kept: experts [units], bool, that stay.
        state: of the dense model, its experts split.
    """
    names = {id(module): path for path, module in model.module.named_modules()}
    chosen: dict[str, list[int]] = {}  # by name of a module of experts
    rows: dict[str, Tensor] = {}  # by name of a router's tensor
    for one, mine in zip(groups.mixtures, groups.split(kept), strict=True):
        stays = mine.nonzero()[:, 0]
        chosen[names[id(one.experts)]] = stays.tolist()
        rows |= {f"{names[id(one.router)]}.{name}": stays for name in one.rows}
    found = {}
    for name, parts in joined_names(model.module).items():
        if (owner := name.rpartition(".")[0]) in chosen:
            found[name] = torch.stack([state[parts[index]] for index in chosen[owner]])
        else:
            found[name] = state[name][rows[name]] if name in rows else state[name]
    return found
