"""Exporter numpy: a formula as a Python function that needs NumPy only.

gpmetric export --plugin examples/plugins/numpy_file.py "abs(W)*sqrt(X)" --format numpy -o score.py
"""

from gpmetric.errors import InputError
from gpmetric.expression.tree import Token, fold
from gpmetric.formats import Format, Formula

FORMS = {
    "neg": "(-{0})",
    "abs": "np.abs({0})",
    "sqr": "np.square({0})",
    "sqrt": "np.sqrt(np.abs({0}))",
    "log": "np.log(np.abs({0}) + 1e-30)",
    "exp": "np.exp(np.minimum({0}, 80.0))",
    "tanh": "np.tanh({0})",
    "rowsum": "np.broadcast_to({0}, W.shape).sum(axis=1, keepdims=True)",
    "colsum": "np.broadcast_to({0}, W.shape).sum(axis=0, keepdims=True)",
    "add": "({0} + {1})",
    "sub": "({0} - {1})",
    "mul": "({0} * {1})",
    "div": "({0} / np.where(np.abs({1}) < 1e-30, 1e-30, {1}))",
    "max": "np.maximum({0}, {1})",
    "min": "np.minimum({0}, {1})",
}


def numpy_text(formula: Formula) -> str:
    """The content of the file."""
    names = ", ".join(formula.expression.operands)
    score = fold(formula.expression.tokens, _written)
    return f'''"""Pruning score {formula.expression}, made by gpmetric {formula.version}; larger means keep."""

import numpy as np


def score({names}):
    """[out, in], of matrices [out, in] and vectors [in]."""
    return np.broadcast_to({score}, W.shape)
'''


def _written(token: Token, arguments: list[str]) -> str:
    if isinstance(token, float) or not arguments:
        return str(token)
    if token not in FORMS:
        raise InputError(f"the exporter numpy has no form for {token}")
    return FORMS[token].format(*arguments)


PLUGIN = {"numpy": Format(numpy_text)}
