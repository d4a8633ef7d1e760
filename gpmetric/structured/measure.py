"""What drawn models are compared by: batches of the search text, and the objective on each."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gpmetric.evaluation.perplexity import Teacher, batches, mean_loss
from gpmetric.models import Model
from gpmetric.structured.request import Objective

__all__ = ["Measure"]

_TEACHER_BYTES = 2**30  # of the dense model's predictions; those of further batches are computed when they are wanted


class Measure:
    """The objective of a model on the windows of a step.

    Every window comes once before any comes again, always with the same others. The dense model's predictions are
    computed when they are first wanted, and kept up to 1 GiB; beyond that a step has one more forward pass.

    Args:
        model: dense now.
        windows: [n, length], int64.
        objective: a key of OBJECTIVES.
        batch: windows of a step.
        seed: of their order.
    """

    def __init__(self, model: Model, windows: Tensor, objective: Objective, batch: int, seed: int) -> None:
        self.objective = objective
        self._model, self._seed = model, seed
        order = np.random.default_rng([seed, 1]).permutation(len(windows))
        self._pieces = windows[torch.from_numpy(order)].split(batch)
        self._kept: dict[int, list[Teacher]] = {}
        self._bytes = 0
        self._tokens = self._pieces[0]
        self._teachers: Sequence[Teacher] = ()

    def turn(self, step: int) -> None:
        """Takes the windows of a step; the model is dense."""
        per_round = len(self._pieces)
        order = np.random.default_rng([self._seed, 2, step // per_round]).permutation(per_round)
        index = int(order[step % per_round])
        self._tokens = self._pieces[index]
        if self.objective == "kl":
            self._teachers = self._kept.get(index) or self._taught(index)

    def __len__(self) -> int:
        """Steps until every window has come once."""
        return len(self._pieces)

    @property
    def tokens(self) -> int:
        """Of the windows of the step."""
        return self._tokens.numel()

    @torch.no_grad()
    def __call__(self) -> float:
        """The objective of the model as it is, in nats per prediction; infinite where it is not finite."""
        if self.objective == "loss":
            return mean_loss(self._model, self._tokens)
        predictions = sum(teacher.predictions for teacher in self._teachers)
        found = sum(teacher.excess(self._model).item() for teacher in self._teachers) / predictions
        return found if math.isfinite(found) else math.inf

    @torch.no_grad()
    def _taught(self, index: int) -> list[Teacher]:
        """The dense model's predictions on a piece, kept while there is room."""
        teachers = [Teacher(self._model, part) for part in batches(self._model, self._pieces[index])]
        size = sum(teacher.bytes for teacher in teachers)
        if self._bytes + size <= _TEACHER_BYTES:
            self._kept[index] = teachers
            self._bytes += size
        return teachers
