"""What searches compare a pruned model by, one row each: the dense model's reference for some predictions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from gpmetric.lazy import lazy
from gpmetric.plugins import open_table

if TYPE_CHECKING:
    from torch import Tensor

    from gpmetric.models import Model

__all__ = ["OBJECTIVES", "Objective", "Reference"]


class Reference(Protocol):
    """What the dense model says of some predictions, for a pruned one to be compared with."""

    predictions: int
    bytes: int  # memory that it keeps

    def excess(self, logits: Tensor) -> Tensor:
        """What a model with these logits is worse by, summed over predictions, in nats, fp32; a scalar with gradients.

        Args:
            logits: [predictions, vocabulary], fp32, of the same predictions; they may be written to where they have no
                gradients.
        """


@dataclass(frozen=True)
class Objective:
    """A figure of a pruned model that is to be small, 0 for the dense one, in nats per prediction.

    Attributes:
        meaning: what it is, for the help.
        reference: (logits [predictions, vocabulary] of the dense model, fp32, labels [predictions]) -> Reference.
        keeps_predictions: whether its references take 2 bytes for every token of the vocabulary and every prediction.
        absolute: (model, windows) -> the same with the dense model's own figure in it, None where that is 0. The policy
            gradient of `slim` compares it with a moving average over windows, as published.
    """

    meaning: str
    reference: Callable[..., Reference]
    keeps_predictions: bool = False
    absolute: Callable[[Model, Tensor], float] | None = None


# Over 40 formulas on the demo model, the rank correlation with the loss on 192 other windows was 0.86 for the
# divergence on 8 windows, 0.88 for the loss on 128; among the best 20 formulas 0.55 and 0.54. Of the variance of what a
# pair of drawn structured models differs by on one window of 256 tokens, the window's part was 0.23 to 0.87 for the
# loss and 0.15 to 0.53 for the divergence (ten pairs on each of four models at 0.2 and 0.5; more at 0.2).
OBJECTIVES: dict[str, Objective] = {
    "kl": Objective(
        "divergence KL(dense || pruned) of the predictions, those of the dense model being kept in memory",
        lazy("gpmetric.evaluation.perplexity:Teacher"),
        keeps_predictions=True,
    ),
    "loss": Objective(
        "log-loss beyond the dense model's, ln(ppl / dense ppl)",
        lazy("gpmetric.evaluation.perplexity:DenseLoss"),
        absolute=lazy("gpmetric.evaluation.perplexity:mean_loss"),
    ),
}
open_table("objective", OBJECTIVES, Objective, lazy("gpmetric.evaluation.trial:check_objective"), makers=("reference",))
