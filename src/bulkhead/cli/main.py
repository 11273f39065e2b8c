"""The command line's entry: find the command, run it, turn errors into lines and exit codes.

    entry()      the `bulkhead` script: hands over to the native client where there is one
    run_argv()   one command line in this process (the command server's workers call it too)

Exit codes: 0, or the workload's own for run/exec/start -a/wait-like commands; 1 for an error of
most commands; 125 for a wrong flag, and for errors of `run` that are not the program's; 126 and
127 for a program that cannot be executed or is not there; 128+n by signal.
"""

import os
import sys

TYPE_CHECKING = False  # typing and collections.abc would cost more than all the rest here
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from bulkhead.client.connection import Connection


def entry() -> None:
    """Run `sys.argv` and exit; never returns.

    The way there is, in this order: the native client (exec), the command server (one message),
    this process itself.
    """
    from bulkhead.cli.pyclient import hand_over

    code = hand_over(sys.argv)
    if code is None:
        code = run_argv(sys.argv[1:], os.environ)
    _leave(code)


def direct() -> None:
    """Run `sys.argv` in this process and exit: what clients fall back to."""
    from bulkhead.cli.pyclient import start_server

    start_server(sys.argv)
    _leave(run_argv(sys.argv[1:], os.environ))


def _leave(code: int) -> None:
    """End without the interpreter's teardown: everything is closed and flushed by now."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        code = code or 1
    os._exit(code)


def run_argv(
    argv: "Sequence[str]", environ: "Mapping[str, str]", parked: "list[Connection] | None" = None
) -> int:
    """Run one command line (without the program's name); the exit code. Prints errors itself.

    `parked` holds a connection to the engine made in advance; it is given back there if it is as
    good as new.
    """
    from bulkhead.cli.dispatch import dispatch

    return dispatch(argv, environ, parked)


if __name__ == "__main__":
    direct()
