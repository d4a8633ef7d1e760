"""The option of commands whose tables a plug-in may add to; their requests extend it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from gpmetric.options import Option, Request
from gpmetric.plugins import load_plugin

__all__ = ["Extensible"]


@dataclass(frozen=True, kw_only=True)
class Extensible(Request):
    """Plug-ins, which are loaded before anything else is looked at."""

    plugin: Annotated[
        tuple[str, ...],
        Option(
            "Python file with operands, primitives, objectives, updaters, allocators or exporters of your own, or the "
            "name of an installed plug-in; may be repeated.",
            metavar="FILE|NAME", reads=True,
        ),
    ] = ()  # fmt: skip

    @classmethod
    def filled(cls, given: dict[str, Any]) -> dict[str, Any]:
        """The values given; a plug-in among them is loaded.

        Raises:
            InputError: it cannot be.
        """
        for one in given.get("plugin", ()):
            load_plugin(one)
        return super().filled(given)

    def check(self) -> None:
        for one in self.plugin:
            load_plugin(one)
        super().check()
