"""A router that chooses among some of the experts of its mixture only; the experts stay where they are."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from gpmetric.structured.mixtures import Mixture

__all__ = ["Routing"]


class Routing:
    """Takes experts from a router and gives them back.

    It computes what a mixture without them does: their rows are gone, and what it chooses is told to the experts by
    their old numbers.

    Args:
        mixture: as it came.
    """

    def __init__(self, mixture: Mixture) -> None:
        self._mixture = mixture
        self._dense = {name: mixture.tensor(name).data for name in mixture.rows}
        self._hook: RemovableHandle | None = None

    def keep(self, experts: Tensor) -> None:
        """Only these experts, by number, rising, [n]."""
        self.widen()
        if len(experts) == self._mixture.units:
            return
        for name, rows in self._dense.items():
            self._mixture.tensor(name).data = rows[experts.to(rows.device)]
        self._tell(len(experts))

        def renumbered(_: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            states, chosen, weights = args
            return states, experts.to(chosen.device)[chosen], weights

        self._hook = self._mixture.experts.register_forward_pre_hook(renumbered)

    def widen(self) -> None:
        """All of them."""
        if self._hook is None:
            return
        self._hook.remove()
        self._hook = None
        for name, rows in self._dense.items():
            self._mixture.tensor(name).data = rows
        self._tell(self._mixture.units)

    def _tell(self, experts: int) -> None:
        """The router's own record of their number."""
        self._mixture.router.num_experts = experts
