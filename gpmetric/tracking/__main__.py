"""The process of one tracker: `python -m gpmetric.tracking TRACKER NAME`, with a record on each line of its input.

It answers with one line if the tracker fails, and is silent otherwise: what libraries print is not shown.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import traceback
from queue import SimpleQueue
from typing import IO, Any

from gpmetric.plain import plain
from gpmetric.tracking.table import TRACKERS, split_tracker

_LONGEST = 120  # seconds that a tracker may still take when there is nothing more to come


def main(text: str, name: str) -> int:
    """Takes every record; exit status 1 where the tracker fails."""
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # which are for the command
    answers = os.fdopen(os.dup(1), "w")  # of no library, and of no process that one starts
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    try:
        _track(text, name, sys.stdin)
    except Exception as error:
        told = traceback.format_exception_only(error)[-1].strip()
        print(plain(told.splitlines()[0][:300]), file=answers, flush=True)
        os._exit(1)  # whatever the library still waits for
    return 0


def _track(text: str, name: str, records: IO[str]) -> None:
    kind, place = split_tracker(text)
    tracker = TRACKERS[kind].make(place, name)
    waiting: SimpleQueue[list[Any]] = SimpleQueue()
    threading.Thread(target=_read, args=(records, waiting), daemon=True).start()
    while True:
        what, *content = waiting.get()
        if what == "finish":
            tracker.finish(*content)
            return
        (tracker.start if what == "start" else tracker.log)(*content)


def _read(records: IO[str], waiting: SimpleQueue[list[Any]]) -> None:
    """Passes records on, whatever the tracker hangs in; when the last one is there, it must come to an end."""
    last: list[Any] = []
    for line in records:
        last = json.loads(line)
        waiting.put(last)
    if last[:1] != ["finish"]:  # the command was killed
        waiting.put(["finish", None])
    time.sleep(_LONGEST)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
