"""A formula as a page shows it: as text, in mathematics, as a tree, and in LaTeX to copy."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup

from gpmetric.errors import ExpressionError
from gpmetric.expression import PRIMITIVES, Expression
from gpmetric.expression.tree import Token, arity
from gpmetric.formats.latex import to_latex
from gpmetric.metrics import resolve_metric
from gpmetric.operands import OPERANDS

__all__ = ["FormulaView", "view_formula"]

_NONE = Markup("")
_LARGEST = 120  # nodes of a formula that is drawn
_SIGNS = {"*": "\N{MULTIPLICATION SIGN}", "/": "\N{DIVISION SIGN}", "-": "\N{MINUS SIGN}", "**": "^"}
_ACROSS, _DOWN, _SIZE = 46.0, 54.0, 15.0  # between leaves at least, between levels, and half a node's height
_LETTER, _APART = 8.4, 8.0  # width of one in a node, and between two nodes


@dataclass(frozen=True)
class FormulaView:
    """A formula in every form; those that it does not have are empty.

    Attributes:
        text: as it was given.
        group: where its scores compete.
        nodes: how many it has.
        mathematics: MathML.
        latex: the source of it.
        tree: SVG.
        operands: name, meaning.
    """

    text: str
    group: str = ""
    nodes: int | None = None
    mathematics: Markup = _NONE
    latex: str = ""
    tree: Markup = _NONE
    operands: tuple[tuple[str, str], ...] = ()


def view_formula(text: str) -> FormulaView:
    """Every form of a formula or of a baseline's name; of what cannot be read, and of a large one, its text alone."""
    try:
        metric = resolve_metric(text)
    except ExpressionError:
        return FormulaView(text)
    form = metric.expression
    if len(form) > _LARGEST:
        return FormulaView(text, metric.granularity, len(form))
    from latex2mathml.converter import convert

    latex = to_latex(form)
    operands = tuple((name, OPERANDS[name].meaning) for name in form.operands)
    # of our own source text alone: names of operands and primitives, and numbers
    mathematics = Markup(convert(latex, display="block"))
    return FormulaView(text, metric.granularity, len(form), mathematics, latex, _tree_of(form), operands)


def _tree_of(form: Expression) -> Markup:
    """The tree of a formula as SVG, the root at the top."""
    children = [form.children(index) for index in range(len(form))]
    depth, across, end = [0] * len(form), [0.0] * len(form), 0.0
    room = [max(_ACROSS, _width(token) + _APART) for token in form.tokens]
    for index, below in enumerate(children):  # from the root down, leaves from left to right
        for child in below:
            depth[child] = depth[index] + 1
        if len(below) == 1:  # it stands above the other
            room[below[0]] = max(room[below[0]], room[index])
        if not below:
            across[index], end = end + room[index] / 2, end + room[index]
    for index in reversed(range(len(form))):
        if children[index]:
            across[index] = sum(across[child] for child in children[index]) / len(children[index])
    down = [_DOWN * (level + 0.5) for level in depth]
    parts = [
        Markup('<path d="M{:.0f} {:.0f}L{:.0f} {:.0f}"/>').format(across[index], down[index], across[one], down[one])
        for index, below in enumerate(children)
        for one in below
    ]
    parts += [_node(token, across[index], down[index]) for index, token in enumerate(form.tokens)]
    width, height = max(end, 2 * _ACROSS), _DOWN * (max(depth) + 1)
    inset = (width - end) / 2
    head = Markup(
        '<svg class="tree" viewBox="{:.0f} 0 {:.0f} {:.0f}" width="{:.0f}" height="{:.0f}" role="img" '
        'aria-label="Tree of {}: {} nodes">'
    ).format(-inset, width, height, width, height, form, len(form))
    return head + Markup("").join(parts) + Markup("</svg>")


def _node(token: Token, x: float, y: float) -> Markup:
    label = _label(token)
    kind = "inner" if arity(token) else "number" if isinstance(token, float) else "leaf"
    width = _width(token)
    return Markup(
        '<g class="{}"><rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.0f}" rx="{:.0f}"/>'
        '<text x="{:.0f}" y="{:.0f}">{}</text></g>'
    ).format(kind, x - width / 2, y - _SIZE, width, 2 * _SIZE, _SIZE, x, y + 5, label)


def _width(token: Token) -> float:
    return max(2 * _SIZE, _LETTER * len(_label(token)) + 12)


def _label(token: Token) -> str:
    if isinstance(token, float):
        return f"{token:.4g}".replace("-", "\N{MINUS SIGN}")
    row = PRIMITIVES.get(token)
    return token if row is None else _SIGNS.get(row.infix, row.infix or token)
