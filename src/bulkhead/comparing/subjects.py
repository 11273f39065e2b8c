"""What is compared: the bare host, the boundaries, and the peers that are installed.

A subject runs the probe (native/probe.c) to its end, or starts it and leaves it running. Engines
(ours, docker, podman) are driven by their command lines, as their users do.
"""

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from bulkhead.comparing import processes
from bulkhead.comparing.spawn import LIMIT_S, FailedError, said

PROBE = "/bulkhead-probe"
"""Where the probe is in the image."""


class Running(Protocol):
    """A probe that runs."""

    @property
    def address(self) -> str:
        """Where the host reaches it; "" if nowhere."""

    def exec(self, *probe: str) -> list[str]:
        """The command that runs one more probe in it; FailedError where there is no such thing."""

    def processes(self) -> list[int]:
        """The host's processes that it consists of."""

    def stop(self) -> None:
        """What its user does to end it, until it has ended."""


class Subject(Protocol):
    """Something that can run the probe."""

    name: str
    kind: str
    """What it is, with its version."""
    env: Mapping[str, str] | None
    console: bool
    """Whether others write to its output as well."""
    lasting: bool
    """Whether it has a disk (or only memory)."""

    def run(self, *probe: str) -> list[str]:
        """The command that runs the probe to its end and leaves nothing."""

    def start(self, *probe: str) -> contextlib.AbstractContextManager[Running]:
        """The probe left running; gone, with all that it took, at the block's end."""


class Bare:
    """The host itself: no boundary."""

    name, console, lasting = "host", False, True
    env: Mapping[str, str] | None = None

    def __init__(self, probe: str) -> None:
        self._probe = probe
        self.kind = f"no boundary: a process of the host, Linux {os.uname().release}"

    def run(self, *probe: str) -> list[str]:
        """The probe itself."""
        return [self._probe, *probe]

    @contextlib.contextmanager
    def start(self, *probe: str) -> Generator[Running]:
        """A child."""
        process = subprocess.Popen(
            self.run(*probe), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        try:
            yield Child(process, self.run, "127.0.0.1")
        finally:
            process.kill()
            process.wait()


@dataclass
class Child:
    """A process of ours."""

    process: "subprocess.Popen[bytes]"
    more: Callable[..., list[str]] | None = None
    """The command of one more process."""
    address: str = ""

    def exec(self, *probe: str) -> list[str]:
        """On the bare host that is just another process."""
        if self.more is None:
            raise FailedError("nothing can be run in it from outside")
        return self.more(*probe)

    def processes(self) -> list[int]:
        """The child and what descends from it."""
        return processes.descendants(self.process.pid)

    def stop(self) -> None:
        """SIGTERM."""
        self.process.terminate()
        try:
            self.process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            raise FailedError("it still runs after a SIGTERM") from None


@dataclass
class Engine:
    """A command line like docker's."""

    name: str
    kind: str
    words: Sequence[str]
    """The program, with the options that come first."""
    image: str
    options: Sequence[str] = ()
    """Of run, e.g. the boundary."""
    env: Mapping[str, str] | None = None
    console: bool = False
    lasting: bool = True

    def run(self, *probe: str) -> list[str]:
        """`run --rm` of the probe."""
        return self.whole(("--entrypoint", PROBE), *probe)

    def whole(self, more: Sequence[str], *command: str) -> list[str]:
        """`run --rm` with further options, of any command."""
        return [*self.words, "run", "--rm", *self.options, *more, self.image, *command]

    @contextlib.contextmanager
    def start(self, *probe: str) -> Generator[Running]:
        """`run -d`, and `rm -f` in the end."""
        command = ["run", "-d", *self.options, "--entrypoint", PROBE, self.image, *probe]
        identity = said([*self.words, *command], self.env).strip()
        try:
            yield Kept(self, identity)
        finally:
            said([*self.words, "rm", "-f", identity], self.env)


@dataclass
class Kept:
    """A workload of an engine."""

    engine: Engine
    identity: str
    _known: dict[str, str] = field(default_factory=dict)

    def _told(self, template: str) -> str:
        if template not in self._known:
            words = [*self.engine.words, "inspect", "--format", template, self.identity]
            self._known[template] = said(words, self.engine.env).strip()
        return self._known[template]

    @property
    def address(self) -> str:
        """Its address on the default network."""
        return self._told("{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}")

    def exec(self, *probe: str) -> list[str]:
        """`exec`."""
        return [*self.engine.words, "exec", self.identity, PROBE, *probe]

    def processes(self) -> list[int]:
        """All of its control group."""
        return processes.of_group(int(self._told("{{.State.Pid}}")))

    def stop(self) -> None:
        """`stop`."""
        said([*self.engine.words, "stop", self.identity], self.engine.env)


def end(process: "subprocess.Popen[bytes]") -> None:
    """SIGTERM, then SIGKILL, then reaped."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()
