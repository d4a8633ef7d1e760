"""Layers and weights one at a time, and windows and sessions of a text file, for tests of everything that prunes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpmetric.calibration.accumulators import DAMPING, LayerStatistics
from gpmetric.data import Windows
from gpmetric.metrics import Metric
from gpmetric.models import Model
from gpmetric.outputs import MANIFEST
from gpmetric.pruning.updaters import prune_weights
from gpmetric.session.inputs import Inputs
from gpmetric.session.session import Session
from gpmetric.session.splits import open_text, read_windows
from gpmetric.targets import Target


def prune_weight(
    weight: Tensor,
    metric: Metric,
    target: Target,
    statistics: LayerStatistics,
    update: str = "none",
    score: Tensor | None = None,
) -> Tensor:
    """`prune_weights` of one weight at one target."""
    return prune_weights([weight], metric, [target], [statistics], update, None if score is None else [score])[0][0]


def make_layer(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight [out, in] and the Gram matrix [in, in] of inputs that are correlated and of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    inputs = torch.randn(4 * columns, columns, generator=generator) @ mixing
    inputs *= torch.linspace(0.5, 2, columns)
    return torch.randn(rows, columns, generator=generator), inputs.t() @ inputs / len(inputs)


def damped(gram: Tensor) -> Tensor:
    """A Gram matrix [in, in] with the damping of the solvers, float64."""
    gram = gram.double()
    return gram + DAMPING * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)


def output_error(change: Tensor, gram: Tensor) -> float:
    """Squared change of the layer's output per token."""
    change, gram = change.double(), gram.double()
    return float(((change @ gram) * change).sum())


@contextmanager
def restored(model: Model) -> Iterator[None]:
    """Gives every bit of the layers back that is changed in place while the context is open."""
    copies = [layer.parameter.data.clone() for layer in model.layers]
    try:
        yield
    finally:
        for layer, copy in zip(model.layers, copies, strict=True):
            layer.parameter.data.copy_(copy)


def windows_of(model: Model, text: Path, length: int = 32, count: int | None = 12) -> Windows:
    """The first windows of a text file."""
    return read_windows(model, open_text(str(text)), length, count)


def session_of(model: Model, calibration: Windows, **inputs: Any) -> Session:
    """A session of a model that is loaded, which is evaluated on what it is calibrated on."""
    return Session(Inputs(**inputs), model, {"calibration": calibration}, [calibration])


def sign_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Writes a manifest with the digest that it is to have: of its JSON, sorted and without spaces, but for itself."""
    manifest.pop("manifest_sha256", None)
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    signed = manifest | {"manifest_sha256": hashlib.sha256(text.encode()).hexdigest()}
    (folder / MANIFEST).write_text(json.dumps(signed))
