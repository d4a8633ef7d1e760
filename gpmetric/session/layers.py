"""What of a model is pruned, what stays dense, and why: `gpmetric layers MODEL`."""

from __future__ import annotations

from typing import Any

from gpmetric.blocks import why_dense
from gpmetric.loading import load_model
from gpmetric.options import as_function
from gpmetric.session.requests import LayersRequest

__all__ = ["layers", "run_layers"]


def run_layers(request: LayersRequest) -> dict[str, Any]:
    """Every parameter of a model, each once.

    Args:
        request: which model, and which of its layers are wanted.

    Returns:
        The JSON document of `gpmetric layers`: `layers`, each with its `name`, `shape` [out, in] and `block`; `dense`,
        every other parameter with its `name`, `shape` and `why`; `weights` of the layers, of `parameters` in all.

    Raises:
        InputError: the model cannot be used.
    """
    (name,) = request.models
    model = load_model(
        name,
        resident=False,
        device=request.device,
        dtype=request.dtype,
        include=request.include,
        exclude=request.exclude,
    )
    shapes = {key: list(one.shape) for key, one in model.module.named_parameters()}
    return {
        "model": model.name,
        "blocks": len(model.blocks),
        "parameters": sum(one.numel() for one in model.module.parameters()),
        "weights": sum(layer.weight.numel() for layer in model.layers),
        "layers": [
            {"name": layer.name, "shape": list(layer.weight.shape), "block": index}
            for index, block in enumerate(model.blocks)
            for layer in block.layers
        ],
        "dense": [{"name": key, "shape": shapes[key], "why": why} for key, why in why_dense(model).items()],
    }


layers = as_function("layers", LayersRequest, run_layers, "model")
