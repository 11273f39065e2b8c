"""`compare`."""

import signal
import sys
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from bulkhead.cli.command import Command, Context
from bulkhead.cli.options import JSON, Option, Parsed, UsageError
from bulkhead.cli.output import table
from bulkhead.errors import Invalid

if TYPE_CHECKING:
    from bulkhead.comparing.model import Comparison


class _Told:
    """Progress: a line that is drawn over on a terminal, a line a step in a pipe."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._last = ""

    def __call__(self, what: str, done: int, total: int) -> None:
        if self._terminal:
            full = round(30 * done / max(total, 1))
            sys.stderr.write(f"\r\x1b[2K[{'=' * full:<30}] {what} {done}/{total}")
            sys.stderr.flush()
        elif what != self._last:
            sys.stderr.write(f"compare: {what}\n")
            sys.stderr.flush()
        self._last = what

    def close(self) -> None:
        """Leave the terminal's line clean."""
        if self._terminal and self._last:
            sys.stderr.write("\r\x1b[2K")
            sys.stderr.flush()


def _shown(comparison: "Comparison") -> str:
    from bulkhead.comparing.plots import number

    names = list(comparison.subjects)
    rows = []
    for metric in comparison.metrics:
        found = [comparison.figure(name, metric.key) for name in names]
        if any(found):
            cells = ["-" if one is None else number(one.value) for one in found]
            rows.append([metric.title, metric.unit, *cells])
    return table(["", "UNIT", *(name.upper() for name in names)], rows)


def _missing(comparison: "Comparison") -> list[str]:
    titles = {metric.key: metric.title for metric in comparison.metrics}
    return [
        f"{one.subject}: {titles.get(one.metric, 'not compared')}: {one.reason}"
        for one in comparison.gaps
    ]


def _write(path: str, data: str | bytes) -> None:
    try:
        if isinstance(data, bytes):
            with open(path, "wb") as binary:
                binary.write(data)
        else:
            with open(path, "w", encoding="utf-8") as text:
                text.write(data)
    except OSError as error:
        raise Invalid(f"{path}: {error.strerror}") from None


def _interrupt(number: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def compare(context: Context, parsed: Parsed) -> None:
    """`bulkhead compare [IMAGE [COMMAND…]]`."""
    from bulkhead.comparing import driver, model, page, plots, prepare
    from bulkhead.comparing.quoted import verdicts

    if parsed["quick"] and "rounds" in parsed:
        raise UsageError("--quick and --rounds exclude each other")
    if parsed["last"]:
        found = model.last(context.home)
    else:
        told = _Told()
        # Ended by a signal, it takes away what it made as after Ctrl-C.
        before = signal.signal(signal.SIGTERM, _interrupt)
        try:
            found = driver.compare(
                context.home,
                image=parsed.args[0] if parsed.args else "",
                command=parsed.args[1:],
                boundaries=parsed["boundaries"] or prepare.DEFAULT,
                peers=parsed["peers"],
                rounds=driver.QUICK_ROUNDS if parsed["quick"] else parsed["rounds"],
                only=parsed["only"],
                count=parsed["instances"],
                tell=told,
            )
        finally:
            signal.signal(signal.SIGTERM, before)
            told.close()
        model.keep(context.home, found)
    if parsed["html"]:
        _write(parsed["html"], page.html(found))
    if parsed["csv"]:
        _write(parsed["csv"], model.as_csv(found))
    if parsed["png"]:
        plots.png(found, parsed["png"])
    if context.json or parsed["json"]:
        sys.stdout.write(model.as_json(found).decode())
        return
    context.out(_shown(found))
    context.out("")
    context.out("COMMONLY QUOTED")
    for one in verdicts(found):
        context.out(f"{one.claim}: {one.verdict} [{one.here}]")
    for line in _missing(found):
        context.err(f"bulkhead: {line}")


COMMANDS = {
    "compare": Command(
        "compare", "Measure what each boundary costs on this host", compare,
        arguments="[IMAGE] [COMMAND] [ARG...]", most=None, interspersed=False, completes="image",
        options=(
            Option("--boundaries", "strings", "Boundaries to compare: container, sandbox, "
                   "microvm, vm", default=[]),
            Option("--csv", "string", "Write the figures as CSV to this file", complete="file"),
            Option("--html", "string", "Write a report that needs nothing else to this file",
                   complete="file"),
            Option("--instances", "uint", "Idle instances to measure memory with"),
            JSON,
            Option("--last", "bool", "Show the last comparison instead of measuring"),
            Option("--only", "strings", "Groups to measure: start, command, memory, image, work, "
                   "network, noise, surface", default=[]),
            Option("--peers", "bool", "Compare with docker, podman, runc, crun, runsc and QEMU, "
                   "where they are installed"),
            Option("--png", "string", "Write the plots to this file (needs matplotlib)",
                   complete="file"),
            Option("--quick", "bool", "As few rounds as make an interval"),
            Option("--rounds", "uint", "Samples of each start", default=11),
        ),
        examples=(
            "bulkhead compare",
            "bulkhead compare --peers --html report.html",
            "bulkhead compare --quick --only start,memory --boundaries container,microvm",
            "bulkhead compare debian:bookworm apt-get --version",
        ),
    ),
}  # fmt: skip
