"""The help: commands by what they are for; of a command, options in groups that all commands share, and examples."""

from __future__ import annotations

import shutil
from typing import Any

from typer.core import TyperCommand, TyperGroup

__all__ = ["COMMAND_GROUPS", "OPTION_GROUPS", "GroupedCommand", "GroupedCommands", "group_of"]

_OWN = "Options"
# What an option is about, by its name; those that stand in no row are what the command does, and come first.
OPTION_GROUPS: dict[str, tuple[str, ...]] = {
    "Model and texts": (
        "model", "calibration", "search", "validation", "test", "text", "text_column", "include", "exclude", "against",
    ),
    "Windows": (
        "preset", "samples", "sampling", "sequence_length", "windows", "search_windows", "shuffle", "bos",
    ),
    "Search": (
        "population", "generations", "evaluations", "tokens", "steps", "operands", "primitives", "start", "forbid",
        "group", "max_nodes", "objective", "calibration_seeds", "init", "lowest", "highest", "levels", "genes",
        "estimator", "draws", "batch", "rate",
    ),
    "Going on, and watching": (
        "ledger", "resume", "fork", "reseed", "on_generation", "track", "live",
    ),
    "Limits and machine": (
        "minutes", "memory", "device", "dtype", "statistics_dtype", "workers", "ray", "worker_gpus", "seed", "cache",
    ),
    "Files": ("csv", "plot", "save_masks", "plugin", "json", "config", "force"),
}  # fmt: skip
# What a command is for, by its name; those that stand in no row come last.
COMMAND_GROUPS: dict[str, tuple[str, ...]] = {
    "Search for metrics": ("discover", "status", "report", "analyse", "ledger"),
    "Measure": ("bench", "evaluate", "catalogue", "reproduce"),
    "Prune a model": ("tune", "prune", "allocate", "slim", "verify", "pack", "unpack"),
    "Take a formula along": ("export", "calibrate"),
    "Know beforehand": ("plan", "layers", "list"),
}
_COLUMN, _NARROW = 30, 14  # letters of the widest spelling that its sentence stands beside; on a narrow terminal
_WIDEST = 100  # letters of a line


def group_of(name: str) -> str:
    """The heading that an option stands under."""
    return next((group for group, names in OPTION_GROUPS.items() if name in names), _OWN)


class GroupedCommands(TyperGroup):
    """A group whose help has the rows of COMMAND_GROUPS, each command with the whole of its first sentence."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Writes the commands, those for one purpose together."""
        formatter.width = _width()
        known = {name for names in COMMAND_GROUPS.values() for name in names}
        rest = tuple(name for name in self.commands if name not in known)
        for heading, names in [*COMMAND_GROUPS.items(), ("More", rest)]:
            found = [(name, _first(self.commands[name].help or "")) for name in names if name in self.commands]
            if found:
                with formatter.section(heading):
                    formatter.write_dl(found)


class GroupedCommand(TyperCommand):
    """A command whose help has the groups of OPTION_GROUPS, and examples at its end."""

    hidden_names: frozenset[str] = frozenset()  # spellings that are accepted and not shown
    examples: tuple[str, ...] = ()

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """What stands behind the command in the first line."""
        return ["[OPTIONS]", *(str(param.metavar) for param in self.params if param.param_type_name == "argument")]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Writes arguments, then the options group by group."""
        formatter.width = _width()
        arguments, rows = [], dict[str, list[tuple[str, str]]]({group: [] for group in (_OWN, *OPTION_GROUPS)})
        params: list[Any] = self.get_params(ctx)
        for param in params:
            if getattr(param, "hidden", False):
                continue
            if param.param_type_name == "argument":
                arguments.append((str(param.metavar), param.help or ""))
            else:
                rows[group_of(str(param.name))].append((self._spelled(param), _told(param)))
        for heading, found in [("Arguments", arguments), *rows.items()]:
            if found:
                with formatter.section(heading):
                    formatter.write_dl(found, col_max=_COLUMN if formatter.width >= 80 else _NARROW)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Writes the examples, a line each."""
        if self.examples:
            with formatter.section("Examples"):
                for line in self.examples:
                    formatter.write(f"{'':>{formatter.current_indent}}{line}\n")

    def _spelled(self, param: Any) -> str:
        shown = sorted(
            (name for name in param.opts if name not in self.hidden_names), key=lambda name: name.startswith("--")
        )
        spelled = " / ".join([", ".join(shown), *param.secondary_opts])
        return spelled if param.is_flag or param.name == "help" else f"{spelled} {param.metavar}"


def _width() -> int:
    return min(shutil.get_terminal_size().columns, _WIDEST)


def _first(told: str) -> str:
    """The first sentence of a command's help."""
    return told.partition("\n\n")[0]


def _told(param: Any) -> str:
    """An option's sentence, and its default where that is a value that one could type."""
    default = param.default
    if param.is_flag and param.secondary_opts and default is not None:
        default = (param.opts if default else param.secondary_opts)[0]
    elif param.is_flag or default in (None, "", ()) or callable(default):
        return param.help or ""
    return f"{param.help} [default: {default}]"
