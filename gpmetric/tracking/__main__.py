"""The process of one tracker: `python -m gpmetric.tracking TRACKER NAME`, with a record on each line of its input.

It answers with one line if the tracker fails, and is silent otherwise: what libraries print is not shown.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from typing import IO

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
    has_ended = False
    for line in records:
        what, *content = json.loads(line)
        has_ended = what == "finish"
        if has_ended:
            signal.alarm(_LONGEST)
        getattr(tracker, {"start": "start", "log": "log", "finish": "finish"}[what])(*content)
    if not has_ended:  # the command was killed
        signal.alarm(_LONGEST)
        tracker.finish(None)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
