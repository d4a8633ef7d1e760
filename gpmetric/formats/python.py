"""A formula as one Python file that needs torch only and defines `score`, which takes the weight and each operand.

The written file is imported and compared bit by bit with the evaluator before it takes its place.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from gpmetric.codegen.functions import torch_functions
from gpmetric.errors import GpmetricError
from gpmetric.expression.evaluate import evaluate
from gpmetric.formats import Formula
from gpmetric.modules import load_module
from gpmetric.operands import OPERANDS, shape_of

__all__ = ["check_python", "python_text"]

_CASES = [((6, 42), torch.float32), ((5, 123), torch.bfloat16), ((1, 1), torch.float16)]


def python_text(formula: Formula) -> str:
    """Text of the module, ASCII."""
    width = formula.granularity.columns or "linear.in_features"
    return formula.fill("python.jinja", width=width, functions=torch_functions(formula.expression, "score"))


def check_python(formula: Formula, written: Path) -> None:
    """Compares the scores of a written file with those of `evaluate`, bit for bit.

    Raises:
        GpmetricError: they differ.
    """
    try:
        module = load_module(written)
    except Exception as error:  # the function of a plug-in may want more than there is
        raise GpmetricError(f"the exported file does not run: {error!r}; nothing written") from error
    for seed, (shape, dtype) in enumerate(_CASES):
        operands = _random_operands(shape, dtype, seed)
        found, expected = module.score(**operands), evaluate(formula.expression, operands)
        if found.shape != expected.shape or not torch.equal(found.view(torch.int32), expected.view(torch.int32)):
            raise GpmetricError(
                f"the exported function differs from the formula at shape {list(shape)}; nothing written"
            )


def _random_operands(shape: tuple[int, int], dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    """Every operand, with zeros in it, from a fixed seed."""
    generator = torch.Generator().manual_seed(seed)
    operands = {}
    for name, row in OPERANDS.items():
        value = torch.randn(shape_of(name, shape), generator=generator)
        value = value * (torch.rand(value.shape, generator=generator) > 0.1)
        value = value if row.signed else value.abs()
        operands[name] = value.to(dtype) if name == "W" else value
    return operands
