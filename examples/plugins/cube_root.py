"""Primitive cbrt: the cube root, which keeps the sign.

gpmetric bench --plugin examples/plugins/cube_root.py --metric "abs(W)*cbrt(X)"
"""

import math

from torch import Tensor

from gpmetric.expression.primitives import Latex, Primitive


def torch_cbrt(x: Tensor) -> Tensor:
    """Exports copy this text, so it uses tensor methods, `torch` and nothing else."""
    return x.abs().pow(1 / 3).copysign(x)


PLUGIN = {
    "cbrt": Primitive(
        "cbrt",
        1,
        torch_cbrt,
        scalar=lambda x: math.copysign(abs(x) ** (1 / 3), x),
        triton="op_div({0}, op_pow({0}, tl.full({0}.shape, 0.6666666666666666, tl.float32)))",
        latex=Latex(r"\sqrt[3]{#1}"),
        sign="all",
        parity="odd",
        monotonicity=("increasing",),
    )
}
