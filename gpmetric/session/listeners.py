"""Several listeners told by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from gpmetric.session.session import Listener

__all__ = ["all_of"]

Kind = TypeVar("Kind", bound=Listener)


def all_of(kind: type[Kind], listeners: Sequence[Kind]) -> Kind:
    """A listener of a kind that tells each of these, in order, whatever it is told."""

    def passing(name: str) -> Callable[..., None]:
        def tell(*arguments: Any) -> None:
            for one in listeners:
                getattr(one, name)(*arguments)

        return tell

    told = kind()
    for name in dir(kind):
        if not name.startswith("_"):
            setattr(told, name, passing(name))
    return told
