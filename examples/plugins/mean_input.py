"""Operand A: the mean absolute input activation, where X is its root mean square; outliers weigh less.

gpmetric bench --plugin examples/plugins/mean_input.py --metric "abs(W)*A" --metric wanda
"""

from torch import Tensor

from gpmetric.calibration.accumulators import FromInputs
from gpmetric.operands import Operand


def size(activations: Tensor) -> Tensor:
    """What is averaged over the calibration tokens: [tokens, in] -> [tokens, in]."""
    return activations.abs()


def itself(mean: Tensor) -> Tensor:
    """The operand [in] from that mean [in]."""
    return mean


PLUGIN = {
    "A": (
        Operand("A", "in", "mean absolute value of the input activation", "inputs", r"\overline{\lvert X\rvert}"),
        FromInputs(itself, of=size),
    )
}
