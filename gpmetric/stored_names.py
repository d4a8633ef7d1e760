"""What a checkpoint's files call the parameters of a model: transformers renames many when it loads them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from gpmetric.experts import joined_names

__all__ = ["stored_names", "unused_names"]


def stored_names(module: Any, stored: Iterable[str]) -> dict[str, str]:
    """By name in memory, the name in the files, of every parameter that is one tensor there, as it is in memory.

    Those that loading transposes, cuts or joins, fused experts for instance, are left out.

    Args:
        module: transformers' model, as it was loaded.
        stored: names of the tensors in its files.
    """
    known = module.state_dict().keys()
    found: dict[str, str] = {}
    for name, renamed, converted in _renamed(module, stored, known):
        if renamed in known and converted is None and found.get(renamed) != renamed:
            found[renamed] = name
    by_parameter = {id(one): name for name, one in _parameters(module) if name in found}
    tied = {name: found[by_parameter[id(one)]] for name, one in _parameters(module) if id(one) in by_parameter}
    return tied | found


def unused_names(module: Any, stored: Iterable[str]) -> list[str]:
    """Names of tensors in a model's files that no parameter or buffer of it is made of; arguments as above."""
    known = joined_names(module).keys()
    return [name for name, renamed, _ in _renamed(module, stored, known) if renamed not in known]


def _renamed(module: Any, stored: Iterable[str], known: Iterable[str]) -> Iterator[tuple[str, str, str | None]]:
    """Each name of the files, what loading calls it, and the pattern by which it is put together with others, if so."""
    names = dict.fromkeys(known, True)
    mapping = get_model_conversion_mapping(module)
    renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
    converters = [one for one in mapping if isinstance(one, WeightConverter)]
    for name in stored:
        renamed, converted = rename_source_key(name, renamings, converters, module.base_model_prefix, names)
        if renamed not in names and name in names:
            renamed, converted = name, None
        yield name, renamed, converted


def _parameters(module: Any) -> list[tuple[str, Any]]:
    return list(module.named_parameters(remove_duplicate=False))
