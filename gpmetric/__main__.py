"""`gpmetric`, and `python -m gpmetric`: signals are watched before anything else is imported."""

from __future__ import annotations

import sys
from importlib import import_module

from gpmetric.interrupts import watch_signals

__all__ = ["main"]


def main() -> None:
    """Runs the command line; see `gpmetric.cli.main`."""
    watch_signals()
    try:
        run = import_module("gpmetric.cli").main
    except KeyboardInterrupt:
        print("gpmetric: error: interrupted", file=sys.stderr)
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
