"""What a command is: words, options, examples and the function that runs it."""

import os
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bulkhead.cli.options import Option, Parsed, Table, UsageError
from bulkhead.home import Home

if TYPE_CHECKING:
    from bulkhead.client.connection import Connection


class Command:
    """One command, e.g. `run` or `network create`.

    `arguments` is the usage after the options, `least` and `most` bound the positional arguments
    (`most` None: no bound). `completes` names what those are: container, image, network, volume
    or file.
    """

    __slots__ = (
        "_table", "arguments", "completes", "examples", "interspersed", "least", "most",
        "options", "run", "summary", "words",
    )  # fmt: skip

    def __init__(
        self,
        words: str,
        summary: str,
        run: "Callable[[Context, Parsed], int | None]",
        *,
        arguments: str = "",
        options: Sequence[Option] = (),
        examples: Sequence[str] = (),
        least: int = 0,
        most: int | None = 0,
        interspersed: bool = True,
        completes: str = "",
    ) -> None:
        self.words = words
        self.summary = summary
        self.run = run
        self.arguments = arguments
        self.options = options
        self.examples = examples
        self.least = least
        self.most = most
        self.interspersed = interspersed
        self.completes = completes
        self._table: Table | None = None

    @property
    def table(self) -> Table:
        """The indexed options, made at first use."""
        if self._table is None:
            self._table = Table(self.options)
        return self._table

    @property
    def usage(self) -> str:
        """`bulkhead run [OPTIONS] IMAGE [COMMAND] [ARG...]`."""
        options = " [OPTIONS]" if self.options else ""
        return f"bulkhead {self.words}{options} {self.arguments}".rstrip()

    def parse(self, argv: Sequence[str]) -> Parsed:
        """Read the command's own part of the command line; UsageError in docker's words."""
        parsed = self.table.parse(argv, interspersed=self.interspersed)
        count = len(parsed.args)
        if count < self.least or (self.most is not None and count > self.most):
            raise UsageError(f"'bulkhead {self.words}' {self._wanted()}", code=1)
        return parsed

    def _wanted(self) -> str:
        least, most = self.least, self.most
        if most == 0:
            return "accepts no arguments"
        if least == most:
            return f"requires {least} argument{'s' if least != 1 else ''}"
        if most is None:
            return f"requires at least {least} argument{'s' if least != 1 else ''}"
        if least == 0:
            return f"accepts at most {most} argument{'s' if most != 1 else ''}"
        return f"requires at least {least} and at most {most} arguments"


class Context:
    """One run of the command line: where the installation is and how to reach it."""

    def __init__(self, home: Home, environ: Mapping[str, str]) -> None:
        self.home = home
        self.environ = environ
        self.debug = False
        self.json = False
        self.config = ""
        """Docker's configuration directory, if --config named one."""
        self.parked: list[Connection] = []
        """A connection made in advance (command server), used by the first request and given back
        by `close` if no request is open on it."""
        self._connections: list[Connection] = []

    def connect(self) -> "Connection":
        """A connection of the caller's own: the parked one if it lives, else a new one."""
        if self.parked:
            parked = self.parked.pop()
            if parked.alive():
                return parked
            parked.close()
        from bulkhead.client.start import connect

        return connect(self.home)

    @property
    def engine(self) -> "Connection":
        """The command's main connection, for one request at a time."""
        if not self._connections:
            self._connections.append(self.connect())
        return self._connections[0]

    def call(
        self, method: str, params: Mapping[str, Any] | None = None, fds: Sequence[int] = ()
    ) -> Any:
        """One request on the main connection; its result."""
        return self.engine.call(method, params, fds)

    def stream(
        self, method: str, params: Mapping[str, Any] | None = None, fds: Sequence[int] = ()
    ) -> Generator[Any, None, Any]:
        """One request on the main connection; its items."""
        return self.engine.stream(method, params, fds)

    def close(self) -> None:
        """Close every connection that was opened; one without open requests becomes parked."""
        while self._connections:
            connection = self._connections.pop()
            if not self.parked and not connection.busy:
                self.parked.append(connection)
            else:
                connection.close()

    def out(self, text: str) -> None:
        """One line on standard output."""
        sys.stdout.write(text + "\n")

    def err(self, text: str) -> None:
        """One line on standard error, after what standard output holds."""
        sys.stdout.flush()
        sys.stderr.write(text + "\n")
        sys.stderr.flush()

    def each(self, names: Sequence[str], act: "Callable[[str], str | None]") -> int:
        """`act` on every name as docker does: echo each success, report each failure, 1 if any."""
        from bulkhead.errors import BulkheadError

        code = 0
        for name in names:
            try:
                told = act(name)
            except BulkheadError as error:
                self.err(f"bulkhead: {error.message}")
                code = 1
            else:
                if told is not None:
                    self.out(told)
        return code

    def confirm(self, warning: str) -> bool:
        """Ask before a prune; True for y or yes. A closed stdin is a no."""
        sys.stdout.write(f"{warning}\nAre you sure you want to continue? [y/N] ")
        sys.stdout.flush()
        return sys.stdin.readline().strip().lower() in ("y", "yes")


def is_terminal(fd: int) -> bool:
    """Whether `fd` is open on a terminal."""
    return os.isatty(fd)
