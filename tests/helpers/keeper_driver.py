"""Runs the keeper's pump on one pipe, dying by SIGKILL at the N-th line of it if asked to.

    python keeper_driver.py SRC LOG KILL_AT

Descriptors 50 to 53 are a keeper's 3 to 6; 54 is the pipe.

Prints how many lines it has executed. KILL_AT 0 kills nothing.
"""

import os
import signal
import sys
from types import FrameType
from typing import Any

sys.path.insert(0, sys.argv[1])
for number in range(5):
    os.dup2(50 + number, 3 + number)

from bulkhead.keeper import journal, pump  # noqa: E402
from bulkhead.keeper.loop import Loop  # noqa: E402

count = 0
kill_at = int(sys.argv[3])
files = {journal.__file__, pump.__file__}


def on_line(frame: FrameType, event: str, argument: object) -> Any:
    global count
    if frame.f_code.co_filename not in files:
        return None
    if event == "line":
        count += 1
        if count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
    return on_line


def main() -> None:
    options = {"driver": "json-file", "path": sys.argv[2], "max_size": "2000", "max_file": "9"}
    options["roles"] = "o"
    loop, book = Loop(), journal.Journal()
    interrupted = book.phase != journal.IDLE
    workload = pump.Workload(loop, book, b"w", options, {0: 7}, lambda identity, index: None)
    sys.settrace(on_line)
    if interrupted:
        workload.recover()
    workload.exited = True
    workload.begin()
    while not workload.finished:
        loop.run_once()
    sys.settrace(None)
    print(count)


main()
