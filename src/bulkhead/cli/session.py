"""A command attached to a workload: wait for its end while passing on signals and sizes.

The bytes never come through here: the engine's keeper has copies of our standard streams and reads
and writes them itself. What is left is to put the terminal into raw mode and back, forward signals
(--sig-proxy), tell the size of the window, and notice a detach or the end.
"""

import contextlib
import os
import select
import signal
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from bulkhead.cli.options import UsageError
from bulkhead.cli.signals import FORWARDED, SignalPipe
from bulkhead.client.connection import failure, value
from bulkhead.errors import Unavailable

if TYPE_CHECKING:
    from bulkhead.cli.command import Context
    from bulkhead.client.connection import Connection


def detach_keys(text: str) -> str:
    """`text` if it is docker's spelling: letters, or `ctrl-` and one of a–z @ [ \\ ] ^ _.

    UsageError otherwise, before anything is started.
    """
    for key in text.split(","):
        letter = key[5:].lower() if key.lower().startswith("ctrl-") else ""
        plain = len(key) == 1 and key.isascii()
        control = len(letter) == 1 and ("a" <= letter <= "z" or letter in "@[\\]^_")
        if not plain and not control:
            raise UsageError(f"invalid detach keys ({text}): unknown character: '{key}'")
    return text


def require_terminal(tty: bool, stdin: bool) -> None:
    """Refuse -it when standard input is no terminal, in docker's words."""
    if tty and stdin and not os.isatty(0):
        raise Unavailable(
            "the input device is not a TTY; leave out -t, or use a terminal", no_terminal=True
        )


class Session:
    """One attached request on the context's main connection.

    `target` (kind, id) is what resize and kill name; for `workload.run` it is learnt from the first
    item. `tty` says that the workload has a terminal.
    """

    def __init__(
        self,
        context: "Context",
        *,
        tty: bool,
        stdin: bool,
        proxy: bool,
        target: tuple[str, str] | None = None,
    ) -> None:
        self._context = context
        self.tty = tty
        self._stdin = stdin
        self._proxy = proxy and not tty
        self.target = target
        self._waiting: list[int] = []
        self._interrupts = 0
        self._signals: SignalPipe | None = None
        self.watch: list[int] = []
        """Further requests whose failure ends the session (the start of `start -a`)."""
        self.on_item: Callable[[Any], None] = lambda item: None

    @contextlib.contextmanager
    def listening(self) -> Iterator[SignalPipe]:
        """Signals are kept for `run` during the block, also between two of them."""
        if self._signals is not None:
            yield self._signals
            return
        with SignalPipe(FORWARDED) as self._signals:
            try:
                yield self._signals
            finally:
                self._signals = None

    def run(
        self,
        connection: "Connection",
        method: str,
        params: Mapping[str, Any],
        fds: list[int],
        *,
        then: Callable[[], None] | None = None,
    ) -> Any:
        """Send the request (and what `then` sends), see it through; its result."""
        with contextlib.ExitStack() as stack:
            signals = stack.enter_context(self.listening())
            if self.tty and self._stdin and os.isatty(0):
                from bulkhead.cli.terminal import raw

                stack.enter_context(raw(0))
            number = connection.send(method, params, fds)
            if then is not None:
                then()
            return self._loop(connection, signals, number)

    def _loop(self, connection: "Connection", signals: SignalPipe, number: int) -> Any:
        poll = select.poll()
        poll.register(connection.fileno(), select.POLLIN)
        poll.register(signals.fileno(), select.POLLIN)
        while True:
            if not connection.pending():
                ready = poll.poll()
                if any(fd == signals.fileno() for fd, _ in ready):
                    for arrived in signals.read():
                        self._signal(connection, arrived)
                if not any(fd == connection.fileno() for fd, _ in ready):
                    continue
            message = connection.receive()
            if message.id in self.watch and message.error is not None:
                raise failure(message.error)
            if message.id != number:
                continue  # the answer to a kill or resize: the workload may be gone by then
            if message.error is not None:
                raise failure(message.error)
            if message.done:
                return value(message.result)
            self._item(connection, value(message.item))

    def _item(self, connection: "Connection", item: Any) -> None:
        if isinstance(item, dict) and "Id" in item and self.target is None:
            self.target = ("workload", item["Id"])
        if isinstance(item, dict) and "Started" in item:
            for arrived in self._waiting:
                self._forward(connection, arrived)
            self._waiting.clear()
        self.on_item(item)

    def _signal(self, connection: "Connection", arrived: int) -> None:
        if arrived == signal.SIGWINCH:
            if self.tty:
                self.resize(connection)
        elif not self._proxy:
            if arrived in (signal.SIGCONT, signal.SIGALRM):
                return
            raise Stopped(arrived)
        elif self.target is None:
            self._waiting.append(arrived)
            self._count(arrived)
        else:
            self._forward(connection, arrived)
            self._count(arrived)

    def _count(self, arrived: int) -> None:
        """The third request to end is for us, like docker's."""
        if arrived in (signal.SIGINT, signal.SIGTERM):
            self._interrupts += 1
            if self._interrupts >= 3:
                self._context.err(
                    "\ngot 3 SIGTERM/SIGINTs, forcefully exiting; the container goes on"
                )
                raise Stopped(arrived)

    def _forward(self, connection: "Connection", arrived: int) -> None:
        if self.target is not None and self.target[0] == "workload":
            name = signal.Signals(arrived).name
            connection.send("workload.kill", {"id": self.target[1], "signal": name})

    def resize(self, connection: "Connection") -> None:
        """Tell the workload's terminal our window's size."""
        from bulkhead.cli.terminal import size

        rows, columns = size(0)
        if self.target is not None and rows:
            kind, identity = self.target
            connection.send(f"{kind}.resize", {"id": identity, "rows": rows, "columns": columns})


class Stopped(KeyboardInterrupt):
    """A signal ended the command, not the workload; `number` tells which."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def attached_fds(stdin: bool, stdout: bool, stderr: bool) -> list[int]:
    """Our standard streams to lend, in the order the engine expects."""
    return [fd for fd, wanted in ((0, stdin), (1, stdout), (2, stderr)) if wanted]
