"""A formula as papers and other programs spell it, in our spelling where its meaning is plain; the rest is left as is.

|W|*||X||_2             abs(W)*X: X is the norm of an input's activations, per token
\\left|W\\right| \\cdot X  abs(W)*X
torch.abs(W)*X          abs(W)*X
W², √X                  W**2, sqrt(X)
"""

from __future__ import annotations

import re

__all__ = ["plain_spelling"]

_LATEX = [
    (r"\\(?:left|right|,|;|!|:|quad|displaystyle)(?![A-Za-z])", " "),
    (r"\\(?:cdot|times|odot|ast)(?![A-Za-z])", "*"),
    (r"\\[lr]?vert(?![A-Za-z])", "|"),
    (r"\\(?:[lr]?Vert(?![A-Za-z])|\|)", "||"),
    (r"\\(?:mathbf|mathrm|mathit|boldsymbol|operatorname|text)\s*\{\s*(\w+)\s*\}", r"\1"),
    (r"\\frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"((\1)/(\2))"),
    (r"\\(sqrt|exp|log|tanh|max|min)(?![A-Za-z])\s*", r"\1"),
    (r"_\s*\{\s*2\s*\}", "_2"),
    (r"\^", "**"),
    (r"\{", "("),
    (r"\}", ")"),
]
_OTHERS = [
    (r"\b(?:torch|np|numpy|math)\s*\.\s*(?=[A-Za-z])", ""),
    ("[·×∗⋅⊙]", "*"),
    ("÷", "/"),
    ("[−–]", "-"),
    ("∣", "|"),
    ("‖", "||"),
    ("²", "**2"),
    ("³", "**3"),
    (r"√\s*([A-Za-z])(?![A-Za-z_0-9(])", r"sqrt(\1)"),
    (r"√\s*(?=\()", "sqrt"),
    (r"\|\|\s*X\s*\|\|(?:\s*_\s*2)?", "X"),
    (r"(?<!\|)\|(?!\|)([^|]+)(?<!\|)\|(?!\|)", r"abs(\1)"),
]


def plain_spelling(text: str) -> str:
    """The formula in our spelling, without spaces and line ends around it; what is not plain stays to be refused."""
    text = text.strip(" \t\r\n")
    if "\\" in text:
        text = re.sub(r"^\$+|\$+$", "", text).strip()
        for pattern, plain in _LATEX:
            text = re.sub(pattern, plain, text)
    for pattern, plain in _OTHERS:
        text = re.sub(pattern, plain, text)
    return text
