"""What of a model is pruned, what stays dense, and why: `gpmetric layers MODEL`."""

from __future__ import annotations

from typing import Any

from gpmetric.blocks import why_dense
from gpmetric.functions import as_function
from gpmetric.loading import prepare_model
from gpmetric.results import LayersResult
from gpmetric.session.listeners import Listener
from gpmetric.session.requests import LayersRequest
from gpmetric.session.session import opened_model

__all__ = ["layers", "run_layers"]


def run_layers(request: LayersRequest, listener: Listener | None = None) -> dict[str, Any]:
    """Every parameter of a model, each once.

    Args:
        request: which model, and which of its layers are wanted.
        listener: told of opening the model.

    Returns:
        The JSON document of `gpmetric layers`: `layers`, every parameter with its `name` (a layer's without `.weight`),
        its `shape` ([out, in] of a layer), whether it is `prunable`, and the `reason` where it stays dense; a layer's
        `block`, too. `weights` of prunable layers are the `share` of `parameters` in all.

    Raises:
        InputError: the model cannot be used.
    """
    told = listener or Listener()
    model = prepare_model(opened_model(request, None, told.progress), resident=False, progress=told.progress)
    shapes = {key: list(one.shape) for key, one in model.module.named_parameters()}
    parameters = sum(one.numel() for one in model.module.parameters())
    weights = sum(layer.weight.numel() for layer in model.layers)
    found: list[dict[str, Any]] = [
        {"name": layer.name, "shape": list(layer.weight.shape), "prunable": True, "reason": None, "block": index}
        for index, block in enumerate(model.blocks)
        for layer in block.layers
    ]
    found += [
        {"name": key, "shape": shapes[key], "prunable": False, "reason": why, "block": None}
        for key, why in why_dense(model).items()
    ]
    return {
        "model": model.name,
        "blocks": len(model.blocks),
        "parameters": parameters,
        "weights": weights,
        "share": weights / parameters,
        "layers": found,
    }


layers = as_function("layers", LayersRequest, run_layers, "model", result=LayersResult)
