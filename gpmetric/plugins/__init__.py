"""Plug-ins: rows for the tables of gpmetric, from a user's file or an installed package, loaded where they are named.

    PLUGIN = {"cbrt": Primitive("cbrt", 1, cube_root)}

A plug-in that is loaded stays so until its process ends: what it adds belongs to every command from then on, and its
digest to what they write.
"""

from gpmetric.plugins.loading import (
    adopt,
    digests_of,
    in_use,
    load_plugin,
    names_of,
    places,
    sources,
)
from gpmetric.plugins.sources import Source, installed
from gpmetric.plugins.tables import open_table

__all__ = [
    "Source", "adopt", "digests_of", "in_use", "installed", "load_plugin", "names_of", "open_table", "places",
    "sources",
]  # fmt: skip
