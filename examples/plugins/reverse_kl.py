"""Objective reverse-kl: KL(pruned || dense), which asks that the pruned model says nothing that the dense one does not.

gpmetric allocate --plugin examples/plugins/reverse_kl.py --objective reverse-kl --sparsity 0.6
"""

from torch import Tensor

from gpmetric.evaluation.objectives import Objective


class Reverse:
    """The dense model's log-probabilities of some predictions, [predictions, vocabulary]."""

    def __init__(self, logits: Tensor, labels: Tensor) -> None:
        self.predictions = len(labels)
        self._dense = logits.log_softmax(dim=-1)
        self.bytes = self._dense.numel() * self._dense.element_size()

    def excess(self, logits: Tensor) -> Tensor:
        """The divergence, summed over predictions, in nats."""
        pruned = logits.log_softmax(dim=-1)
        return (pruned.exp() * (pruned - self._dense)).sum()


PLUGIN = {"reverse-kl": Objective("divergence KL(pruned || dense) of the predictions", Reverse)}
