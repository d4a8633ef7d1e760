"""A plug-in's objective tried on a few predictions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from gpmetric.errors import InputError
from gpmetric.evaluation.objectives import Objective
from gpmetric.expression.trial import check_tensor

__all__ = ["check_objective"]

_PREDICTIONS, _VOCABULARY = 6, 9


def check_objective(name: str, row: Objective, fellows: Mapping[str, Any]) -> None:
    """Refuses a row whose references tell no number of predictions, or another figure than 0 of the dense model.

    Raises:
        InputError: what is wrong.
    """
    if re.fullmatch(r"[a-z][a-z0-9_-]*", name) is None:
        raise InputError(f"an objective is called in small letters, but by {name!r}")
    generator = torch.Generator().manual_seed(0)
    dense, other = (torch.randn(_PREDICTIONS, _VOCABULARY, generator=generator) for _ in range(2))
    labels = torch.randint(_VOCABULARY, (_PREDICTIONS,), generator=generator)
    reference = row.reference(dense.clone(), labels)
    for field, accepted in (("predictions", (_PREDICTIONS,)), ("bytes", range(2**20))):
        if (value := getattr(reference, field, None)) not in accepted:
            raise InputError(f"{field} of a reference of {_PREDICTIONS} predictions is {value!r:.60}")
    check_tensor("excess", reference.excess(other.clone()), ())
    same = float(check_tensor("excess", reference.excess(dense.clone()), ()))
    if abs(same) > 1e-3:
        raise InputError(f"excess must be 0 for the dense model's own logits, but is {same:g}")
