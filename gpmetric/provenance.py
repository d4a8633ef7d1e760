"""What every result says of where it came from: the versions of what can change a figure."""

from __future__ import annotations

import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

__all__ = ["gpmetric_version", "versions"]


def gpmetric_version() -> str:
    """The installed version, or `unknown` when run from a copy that was never installed."""
    try:
        return version("gpmetric")
    except PackageNotFoundError:
        return "unknown"


def versions() -> dict[str, str]:
    """Versions of what can change a figure."""
    packages = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "deap", "sympy")
    found = {"gpmetric": gpmetric_version(), "python": platform.python_version()}
    with suppress(PackageNotFoundError):  # it is for Linux
        found["triton"] = version("triton")
    return found | {name: version(name) for name in packages}
