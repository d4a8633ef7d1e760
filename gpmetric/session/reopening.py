"""A session opened again in another process, from what the first one read: no text is read twice."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from gpmetric.data import Text, Windows
from gpmetric.loading import open_model
from gpmetric.models import Model
from gpmetric.session.inputs import Inputs
from gpmetric.session.plan import Plan
from gpmetric.session.session import Session

__all__ = ["Reopening"]

_Cut = tuple[str, np.ndarray, bool]  # name of the text, tokens [windows, length], whether they begin with BOS


@dataclass(frozen=True)
class Reopening:
    """What another process, maybe on another machine, opens a session with; made by `of`.

    Attributes:
        inputs: with the device and dtype that the first process has.
        model: where its files are, as an absolute path if they are in a folder; None is the demo model.
        name: of the model in results.
        plan: of one process.
    """

    inputs: Inputs
    model: str | None
    name: str
    windows: Mapping[str, _Cut]
    evaluated: tuple[_Cut, ...]
    plan: Plan

    @classmethod
    def of(cls, session: Session, name: str | None, more: Mapping[str, torch.Tensor] = {}) -> Reopening:
        """Of a session, opened by this name of its model; `more` windows by split, [windows, length]."""
        model = session.model
        inputs = replace(session.inputs, device=model.device.type, dtype=model.dtype)
        where = str(Path(name).absolute()) if name is not None and Path(name).exists() else name
        windows = {split: _cut(one) for split, one in session.windows.items()}
        windows |= {split: (split, tokens.numpy(), False) for split, tokens in more.items()}
        return cls(inputs, where, model.name, windows, tuple(map(_cut, session.evaluated)), session.plan)

    def open(self, model: Model | None = None) -> Session:
        """The session; `model` where this process has it, ready, already.

        Raises:
            ModelError: its files cannot be read here.
        """
        one = self.inputs
        found = model or replace(
            open_model(self.model, device=one.device, dtype=one.dtype, include=one.include, exclude=one.exclude),
            name=self.name,
        )
        windows = dict(zip(self.windows, _windows(self.windows.values()), strict=True))
        session = Session(one, found, windows, list(_windows(self.evaluated)), plan=self.plan)
        if model is None:
            session.start()
        return session


def _cut(windows: Windows) -> _Cut:
    return windows.text.name, windows.tokens.numpy(), windows.bos


def _windows(cuts: Iterable[_Cut]) -> list[Windows]:
    return [Windows(Text(name, ""), torch.from_numpy(tokens), bos) for name, tokens, bos in cuts]
