"""Floor 0: every error this project raises, by category.

No HTTP statuses and no exit codes here: each edge (command line, API) maps the categories in one
table of its own. The `category` of a class is what crosses the wire (`rpc.wire`).
"""

from typing import ClassVar


class BulkheadError(Exception):
    """Base of all errors meant for people: one line that says what, where and what to do.

    `details` holds machine-readable context (strings, ints); it crosses the wire unchanged.
    """

    category: ClassVar[str] = "internal"

    def __init__(self, message: str, **details: object) -> None:
        super().__init__(message)
        self.message = message
        self.details = details

    def __str__(self) -> str:
        return self.message


class NotFound(BulkheadError):
    """What was named does not exist."""

    category = "not-found"


class Conflict(BulkheadError):
    """The request contradicts the present state: a taken name, a running workload, a used port."""

    category = "conflict"


class Invalid(BulkheadError):
    """The request itself is wrong."""

    category = "invalid"


class Denied(BulkheadError):
    """The caller, or this process, may not do that."""

    category = "denied"


class Unsupported(BulkheadError):
    """This host, kernel or boundary cannot do that; the message names a remedy if there is one."""

    category = "unsupported"


class Unavailable(BulkheadError):
    """Something needed does not answer now: engine, registry, network."""

    category = "unavailable"


class Internal(BulkheadError):
    """A defect of ours or a failing system call nobody could foresee."""

    category = "internal"


class Corrupt(Internal):
    """Stored or received bytes do not have the digest, size or structure they must have."""

    category = "corrupt"


class LaunchFailed(BulkheadError):
    """A step of a launch failed in the child before the workload's program ran.

    `step` is the plan's name of the step, `errno` the kernel's answer (0 if none).
    """

    category = "launch"

    def __init__(self, message: str, *, step: str = "", errno: int = 0, **details: object) -> None:
        super().__init__(message, step=step, errno=errno, **details)
        self.step = step
        self.errno = errno


class CommandNotFound(LaunchFailed):
    """The program to run does not exist in the image (exit code 127 on the command line)."""

    category = "command-not-found"


class CommandNotExecutable(LaunchFailed):
    """The program to run exists but cannot be executed (exit code 126 on the command line)."""

    category = "command-not-executable"


CATEGORIES: dict[str, type[BulkheadError]] = {
    kind.category: kind
    for kind in (
        NotFound,
        Conflict,
        Invalid,
        Denied,
        Unsupported,
        Unavailable,
        Internal,
        Corrupt,
        LaunchFailed,
        CommandNotFound,
        CommandNotExecutable,
    )
}


def rebuild(category: str, message: str, details: dict[str, object]) -> BulkheadError:
    """The error that crossed the wire as (`category`, `message`, `details`); unknown: Internal."""
    kind = CATEGORIES.get(category, Internal)
    return kind(message, **details)
