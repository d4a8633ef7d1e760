"""`--config FILE.toml`: option values by their long names."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import typer

from gpmetric.errors import InputError

__all__ = ["load_config"]


def load_config(context: typer.Context, path: Path | None) -> Path | None:
    """Makes the file's values the defaults of the command's options; what is typed on the command line wins.

    Args:
        context: of the command, whose options are the accepted keys, written with - or _.
        path: the TOML file; None is no file.

    Raises:
        InputError: the file cannot be read, or a key or the type of its value is not an option's.
    """
    if path is None:
        return None
    where = f"--config {str(path)!r}"
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{where} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # TOMLDecodeError and UnicodeDecodeError are ValueErrors
        raise InputError(f"{where} is not TOML: {error}") from error
    options = [option for option in context.command.params if option.param_type_name == "option"]
    known = {name: option for option in options for name in _long_names(option)}
    first = {_long_names(option)[0] for option in options}
    accepted = ", ".join(sorted(first - {"config", "help"}))
    context.default_map = {}
    for key, value in values.items():
        option = known.get(key.replace("_", "-"))
        if option is None or option.name in ("config", "help"):
            raise InputError(f"{where}: unknown key {key!r}; accepted: {accepted}")
        if option.name in context.default_map:
            raise InputError(f"{where}: {key!r} stands there twice, once with - and once with _")
        context.default_map[str(option.name)] = _as_typed(option, value, f"{where}: {key}")
    return path


def _long_names(option: Any) -> list[str]:
    """What stands behind an option's --, spellings that are not shown last."""
    return [name.removeprefix("--") for name in option.opts if name.startswith("--")]


def _as_typed(option: Any, value: object, where: str) -> bool | str | list[str]:
    """A config value as text, so that it is checked like what is typed; a flag is a boolean."""
    items = value if isinstance(value, list) and option.multiple else [value]
    if getattr(option, "is_flag", False):
        if isinstance(value, bool):
            return value
    elif all(isinstance(item, (str, int, float)) and not isinstance(item, bool) for item in items):
        return [str(item) for item in items] if option.multiple else str(value)
    wanted = "true or false" if getattr(option, "is_flag", False) else "text or a number"
    raise InputError(f"{where} must be {wanted}{' or a list of them' * option.multiple}, but got {value!r}")
