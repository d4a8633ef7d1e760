"""The process that serves a campaign's page: `python -m gpmetric.reporting FD LEDGER PLUGIN...`, until its input ends.

FD is the number of a listening socket that it was handed; the plug-ins are the campaign's.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
from pathlib import Path

from gpmetric.errors import GpmetricError
from gpmetric.plain import log_plainly
from gpmetric.plugins import load_plugin
from gpmetric.reporting.live import LiveServer, Served


def main(descriptor: str, ledger: str, *plugins: str) -> None:
    """Serves; ends with the process that it belongs to."""
    log_plainly()
    os.nice(10)  # the campaign comes first
    threading.Thread(target=_leave, daemon=True).start()
    try:
        for plugin in plugins:
            load_plugin(plugin)
    except GpmetricError as error:  # a file that is gone or another by now; the page cannot be made then
        logging.getLogger(__name__).warning("--live: %s", error)
    with LiveServer(socket.socket(fileno=int(descriptor)), Served(Path(ledger))) as server:
        server.serve_forever()


def _leave() -> None:
    sys.stdin.buffer.read()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
