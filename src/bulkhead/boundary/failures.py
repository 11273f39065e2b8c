"""Failed launches as errors: one wording, whoever interpreted the launch program."""

import errno
import os
import signal as signals
from collections.abc import Sequence

from bulkhead.errors import CommandNotExecutable, CommandNotFound, LaunchFailed

STEP, EXEC, DIED = 1, 2, 3
"""How a launch program failed; `native/holder.h`, `native/frames.h`."""


def launch_failure(
    kind: int, index: int, error: int, name: bytes, steps: Sequence[str], *, no_interpreter: bool
) -> LaunchFailed:
    """The error that stands for a launch program's failure in op `index`.

    `error` is an errno, for DIED a wait status; `name` is argv[0] for EXEC. CommandNotFound and
    CommandNotExecutable have Docker's words, by which people and clients know them.
    """
    step = steps[index] if index < len(steps) else f"step {index}"
    if kind == EXEC:
        return _exec_failure(name, step, error, no_interpreter)
    if kind == DIED:
        how = (
            f"was killed by {_signal_name(error & 127)}"
            if error & 127
            else f"ended with code {error >> 8}"
        )
        return LaunchFailed(f"{step}: the process {how}", step=step, errno=0)
    return LaunchFailed(f"{step}: {os.strerror(error)}", step=step, errno=error)


def _signal_name(number: int) -> str:
    known = number in {int(each) for each in signals.Signals}
    return signals.Signals(number).name if known else f"signal {number}"


def _exec_failure(name: bytes, step: str, error: int, no_interpreter: bool) -> LaunchFailed:
    program = name.decode("utf-8", "replace")
    reason = os.strerror(error).lower()
    if error in (errno.ENOENT, errno.ENOTDIR):
        if no_interpreter:
            message = f"exec {program}: {reason} (the interpreter it names is missing)"
        elif "/" in program:
            message = f'exec: "{program}": stat {program}: {reason}'
        else:
            message = f'exec: "{program}": executable file not found in $PATH'
        return CommandNotFound(message, step=step, errno=error)
    if error == errno.ENOEXEC:
        return CommandNotExecutable(f"exec {program}: {reason}", step=step, errno=error)
    if error in (errno.EACCES, errno.EISDIR, errno.EPERM, errno.ETXTBSY):
        return CommandNotExecutable(f'exec: "{program}": {reason}', step=step, errno=error)
    return LaunchFailed(f'exec: "{program}": {reason}', step=step, errno=error)
