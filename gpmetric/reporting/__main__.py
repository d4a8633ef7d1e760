"""The process that serves a campaign's page: `python -m gpmetric.reporting FD LEDGER`, until its standard input ends.

FD is the number of a listening socket that it was handed.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
from pathlib import Path

from gpmetric.plain import log_plainly
from gpmetric.reporting.live import LiveServer, Served


def main(descriptor: str, ledger: str) -> None:
    """Serves; ends with the process that it belongs to."""
    log_plainly()
    os.nice(10)  # the campaign comes first
    threading.Thread(target=_leave, daemon=True).start()
    with LiveServer(socket.socket(fileno=int(descriptor)), Served(Path(ledger))) as server:
        server.serve_forever()


def _leave() -> None:
    sys.stdin.buffer.read()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
