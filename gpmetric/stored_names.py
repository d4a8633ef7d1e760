"""What a checkpoint's files call the parameters of a model: transformers renames many when it loads them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

__all__ = ["stored_names"]


def stored_names(module: Any, stored: Iterable[str]) -> dict[str, str]:
    """By name in memory, the name in the files, of every parameter that is one tensor there, as it is in memory.

    Those that loading transposes, cuts or joins, fused experts for instance, are left out.

    Args:
        module: transformers' model, as it was loaded.
        stored: names of the tensors in its files.
    """
    known = dict.fromkeys(module.state_dict(), True)
    mapping = get_model_conversion_mapping(module)
    renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
    converters = [one for one in mapping if isinstance(one, WeightConverter)]
    found: dict[str, str] = {}
    for name in stored:
        renamed, converted = rename_source_key(name, renamings, converters, module.base_model_prefix, known)
        if renamed not in known and name in known:
            renamed, converted = name, None
        if renamed in known and converted is None and found.get(renamed) != renamed:
            found[renamed] = name
    by_parameter = {id(one): name for name, one in _parameters(module) if name in found}
    tied = {name: found[by_parameter[id(one)]] for name, one in _parameters(module) if id(one) in by_parameter}
    return tied | found


def _parameters(module: Any) -> list[tuple[str, Any]]:
    return list(module.named_parameters(remove_duplicate=False))
