"""What drawn models are compared by: the objective on a step's windows of the search text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from gpmetric.evaluation.objectives import OBJECTIVES, Reference
from gpmetric.evaluation.references import References, parts_of
from gpmetric.models import Model
from gpmetric.session.memory import retried

__all__ = ["REFERENCE_BYTES", "DrawObjective"]

REFERENCE_BYTES = 2**30  # of the dense model's predictions; beyond, a step has one more forward pass


class DrawObjective:
    """The objective of a model on the windows of a step.

    Every window comes once before any comes again, always with the same others.

    Args:
        model: dense now.
        windows: [n, length], int64.
        objective: a key of OBJECTIVES; measured as it is, the dense model's share included, where it has such a form.
        batch: windows of a step.
        seed: of their order.
    """

    def __init__(self, model: Model, windows: Tensor, objective: str, batch: int, seed: int) -> None:
        self.objective = objective
        self._row = OBJECTIVES[objective]
        self._model, self._seed = model, seed
        order = np.random.default_rng([seed, 1]).permutation(len(windows))
        self._pieces: Sequence[Tensor] = torch.split(windows[torch.from_numpy(order)], batch)
        self._kept: References[Reference] = References(self._row.reference, REFERENCE_BYTES)
        self._windows = self._pieces[0]
        self._references: Sequence[Reference] = ()

    def turn(self, step: int) -> None:
        """Takes the windows of a step; the model is dense."""
        index = self._piece(step)
        self._windows = self._pieces[index]
        if self._row.absolute is None:  # of the dense model, which takes more memory than those it is compared with
            dense = partial(parts_of, self._model, self._windows)
            self._references = retried(self._model, lambda: list(self._kept.of(index, dense)), self._kept.clear)

    def __len__(self) -> int:
        """Steps until every window has come once."""
        return len(self._pieces)

    def tokens(self, step: int) -> int:
        """Of the windows of a step."""
        return self._pieces[self._piece(step)].numel()

    def _piece(self, step: int) -> int:
        per_round = len(self._pieces)
        order = np.random.default_rng([self._seed, 2, step // per_round]).permutation(per_round)
        return int(order[step % per_round])

    @torch.no_grad()
    def __call__(self) -> float:
        """The objective of the model as it is, in nats per prediction; infinite where it is not finite."""
        if self._row.absolute is not None:
            return self._row.absolute(self._model, self._windows)
        predictions = sum(one.predictions for one in self._references)
        parts = zip(self._references, parts_of(self._model, self._windows), strict=True)
        found = sum(one.excess(logits).item() for one, (logits, _) in parts) / predictions
        return found if math.isfinite(found) else math.inf
