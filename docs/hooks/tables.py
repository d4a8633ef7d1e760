"""Tables and lists of the documentation, made of the tables of the code: a new row there appears here by itself."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import typer

import gpmetric
from gpmetric.allocation.request import ALLOCATORS, GENES
from gpmetric.cli import app
from gpmetric.command_help import OPTION_GROUPS, group_of
from gpmetric.commands import COMMANDS
from gpmetric.discovered import CATALOGUE
from gpmetric.evaluation.objectives import OBJECTIVES
from gpmetric.expression import PRIMITIVES, parse
from gpmetric.formats.latex import to_latex
from gpmetric.metrics import BASELINES
from gpmetric.operands import OPERANDS
from gpmetric.options import described
from gpmetric.pruning.published import PUBLISHED
from gpmetric.pruning.updaters import FITS, UPDATERS
from gpmetric.session.inputs import PRESETS
from gpmetric.structured.request import BUDGETS, COSTS, ESTIMATORS, FORMATS, REPAIRS, UNIT_KINDS, UNIT_RULES
from gpmetric.targets import GRANULARITIES
from gpmetric.tracking.table import TRACKERS

__all__ = ["TABLES"]

_SOURCES = {
    "weight": "the weight itself",
    "inputs": "the layer's inputs",
    "gram": "the inputs' Gram matrix",
    "region": "gradients of the block's own output",
    "gradients": "gradients of the model's loss",
}
_KINDS = {int: "N", float: "NUMBER", Path: "PATH"}


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def _code(text: object) -> str:
    return f"`{text}`"


def _meanings(table: dict[str, Any]) -> Callable[[], str]:
    """A table of names and what they mean."""
    return lambda: _table(
        ["name", "meaning"], [(_code(name), getattr(row, "meaning", row)) for name, row in table.items()]
    )


def _operands() -> str:
    return _table(
        ["operand", "shape", "meaning", "measured on", "passes over the text"],
        [
            (_code(row.name), f"[{row.axes.replace(',', ', ')}]", row.meaning, _SOURCES[row.source], f"{row.cost:g}")
            for row in OPERANDS.values()
        ],
    )


def _primitives() -> str:
    rows = []
    for row in PRIMITIVES.values():
        names = ("a", "b")[: row.arity]
        template = row.latex.guarded or row.latex.template
        for place, name in enumerate(names):
            template = template.replace(f"#{place + 1}", name)
        if row.infix:
            written = f"a {row.infix} b" if row.arity == 2 else f"{row.infix}a"
        else:
            written = f"{row.name}({', '.join(names)})"
        rows.append((_code(row.name), _code(written), f"${template}$", inspect.getdoc(row.torch) or "as it is"))
    return _table(["name", "written", "mathematics", "what is computed"], rows)


def _baselines() -> str:
    return _table(
        ["metric", "formula", "compared in", "update"],
        [
            (_code(name), _code(re.sub(r"\{(\w+)\}", r"c_\1", row.formula)), row.granularity, row.update or "any")
            for name, row in BASELINES.items()
        ],
    )


def _sources() -> str:
    """Published metrics as mathematics, `c` for the number of a balance."""
    rows = []
    for name, row in BASELINES.items():
        plain = to_latex(parse(re.sub(r"\{\w+\}", "1234.5", row.formula))).replace("1234.5", "c")
        rows.append((_code(name), f"${plain}$", row.source))
    return _table(["metric", "mathematics", "source"], rows)


def _updaters() -> str:
    return _table(
        ["`--update`", "what happens to the weights that stay", "compared in", "reads"],
        [
            (_code(name), row.meaning, row.granularity or "as the target and metric say", ", ".join(row.needs) or "-")
            for name, row in UPDATERS.items()
        ],
    )


def _allocators() -> str:
    return _table(
        ["`--allocator`", "meaning", "measures", "reads besides X"],
        [
            (_code(name), row.meaning, "candidates" if row.search else row.measures, ", ".join(row.needs) or "-")
            for name, row in ALLOCATORS.items()
        ],
    )


def _unit_rules() -> str:
    return _table(
        ["`--start`", "source", "compares units"],
        [
            (_code(name), row.source, "of all sublayers" if row.placing == "global" else "within a sublayer")
            for name, row in UNIT_RULES.items()
        ],
    )


def _catalogue() -> str:
    return _table(
        ["name", "formula", "update", "fit", "found"],
        [(_code(name), _code(row.formula), row.update, row.fit, row.found) for name, row in CATALOGUE.items()],
    )


def _published() -> str:
    return _table(
        ["name", "model", "tokens a window", "figures", "source"],
        [
            (
                _code(name), row.model, row.sequence_length,
                ", ".join(f"{metric} {target}: {figure}" for (metric, target), figure in row.figures.items()),
                row.source,
            )
            for name, row in PUBLISHED.items()
        ],
    )  # fmt: skip


def _trackers() -> str:
    return _table(
        ["`--track`", "behind the colon", "needs"],
        [
            (
                _code(name),
                row.place if row.needs_place else f"{row.place}, or nothing",
                _code(f"gpmetric[{row.library}]"),
            )
            for name, row in TRACKERS.items()
        ],
    )


def _presets() -> str:
    options = list(next(iter(PRESETS.values())))
    return _table(
        ["`--preset`", *(_code(f"--{name.replace('_', '-')}") for name in options)],
        [
            (_code(name), *("the command's own" if row[option] is None else row[option] for option in options))
            for name, row in PRESETS.items()
        ],
    )


def _commands() -> str:
    """Every command with its options, as the command line itself has them."""
    root: Any = typer.main.get_command(app)
    parts = []
    for name, row in COMMANDS.items():
        command = root
        for word in name.split():
            command = command.commands[word]
        parts.append(_command(name, row, command))
    return "\n\n".join(parts)


def _command(name: str, row: Any, command: Any) -> str:
    fields = {field.name: field for field in described(row.request)}
    shown = [one for one in command.params if not getattr(one, "hidden", False) and one.name != "help"]
    arguments = [one for one in shown if one.param_type_name == "argument"]
    groups: dict[str, list[tuple[str, str, str, str]]] = {
        group: [] for group in ("Arguments", "Options", *OPTION_GROUPS)
    }
    for one in shown:
        group = "Arguments" if one in arguments else group_of(one.name)
        groups[group].append(_option(one, fields.get(one.name)))
    usage = " ".join(["gpmetric", name, *(str(one.metavar) for one in arguments), "[OPTIONS]"])
    examples = "\n".join(row.examples)
    told = [f"## {name}", row.help, f"```text\n{usage}\n\n{examples}\n```"]
    for group, options in groups.items():
        if options:
            told += [f"**{group}**", _table(["option", "value", "default", "meaning"], options)]
    return "\n\n".join(told)


def _option(parameter: Any, field: Any) -> tuple[str, str, str, str]:
    named = parameter.param_type_name == "option"
    names = [*parameter.opts, *parameter.secondary_opts] if named else [parameter.metavar]
    kind = ""
    if named and not parameter.is_flag:
        kind = (parameter.metavar or "").replace("|", ", ") or (_KINDS.get(field.kind, "TEXT") if field else "FILE")
    default = field.default if field else parameter.default
    default = ", ".join(map(str, default)) if isinstance(default, tuple) else default
    shown = "" if default is None or default is False or default == "" or named is False else _code(default)
    return ", ".join(map(_code, names)), _code(kind) if kind else "", shown, parameter.help or ""


def _api() -> str:
    """An entry of mkdocstrings for every public name."""
    return "\n\n".join(f"::: gpmetric.{name}" for name in gpmetric.__all__)


TABLES: dict[str, Callable[[], str]] = {
    "allocators": _allocators,
    "api": _api,
    "baselines": _baselines,
    "budgets": _meanings(BUDGETS),
    "catalogue": _catalogue,
    "commands": _commands,
    "costs": _meanings(COSTS),
    "estimators": _meanings(ESTIMATORS),
    "fits": _meanings(FITS),
    "formats": _meanings(FORMATS),
    "genes": _meanings(GENES),
    "granularities": _meanings(GRANULARITIES),
    "objectives": _meanings(OBJECTIVES),
    "operands": _operands,
    "presets": _presets,
    "primitives": _primitives,
    "published": _published,
    "repairs": _meanings(REPAIRS),
    "sources": _sources,
    "trackers": _trackers,
    "unit-kinds": _meanings(UNIT_KINDS),
    "unit-rules": _unit_rules,
    "updaters": _updaters,
}
