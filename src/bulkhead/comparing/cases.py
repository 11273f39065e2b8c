"""How each group of metrics is taken."""

import contextlib
import json
import os
import statistics
import subprocess
import tarfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from bulkhead.comparing import machine, network, surface
from bulkhead.comparing.model import Comparison
from bulkhead.comparing.prepare import Stage
from bulkhead.comparing.samples import Estimate, interleaved, slope
from bulkhead.comparing.spawn import FailedError, elapsed, said, timed
from bulkhead.comparing.subjects import Engine, Running, Subject
from bulkhead.errors import BulkheadError

WORK = {
    "calls": tuple(f"call.{name}" for name in
                   ("getppid", "open", "stat", "pipe", "fault", "fork", "switch")),
    "cpu": ("cpu",),
    "memory": ("copy",),
    "disk": ("disk.write", "disk.read", "disk.fsync"),
}  # fmt: skip
"""The probe's words → the metrics that its answer holds, by their last part."""

_HOG_S = 0.5
_LATER_S = 2
_CALLS_S = 3.0
"""What the calls take, with much to spare."""


@dataclass
class Rig:
    """One comparison under way."""

    stage: Stage
    comparison: Comparison
    rounds: int
    tell: Callable[[str, int, int], None]
    """(what, done, of how many): progress."""
    command: Sequence[str] = ()
    count: int = 0
    """How many instances `memory` is measured with; 0: what fits the kind."""

    @property
    def subjects(self) -> list[Subject]:
        """Those that work."""
        return self.stage.subjects

    def engines(self) -> list[Engine]:
        """Those with a command line like docker's."""
        return [one for one in self.subjects if isinstance(one, Engine)]

    @contextlib.contextmanager
    def trying(self, subject: str, *metrics: str) -> Iterator[None]:
        """What fails in the block is a gap of those metrics, not the end of the comparison."""
        try:
            yield
        except (
            FailedError, BulkheadError, OSError, ValueError, LookupError, TypeError,
            ArithmeticError, tarfile.TarError, subprocess.SubprocessError,
        ) as error:  # fmt: skip
            for metric in metrics:
                self.comparison.miss(subject, metric, str(error) or type(error).__name__)


def check(rig: Rig) -> None:
    """Run the probe once in each subject; those that cannot are left out, with the reason."""
    working = []
    for at, subject in enumerate(rig.subjects):
        rig.tell("trying", at, len(rig.subjects))
        try:
            timed(subject.run("first"), subject.env, console=subject.console)
        except FailedError as error:
            rig.comparison.miss(subject.name, "", str(error))
        else:
            working.append(subject)
            rig.comparison.subjects[subject.name] = subject.kind
    rig.tell("trying", len(rig.subjects), len(rig.subjects))
    rig.stage.subjects[:] = working


def start(rig: Rig) -> None:
    """Start to first instruction, to the end, to ready; cold; stop; exec; churn."""
    _first_and_exit(rig, "start", lambda one: one.run("first"), list(rig.subjects))
    _cold(rig)
    for subject in rig.subjects:
        rig.tell(f"ready, exec, stop: {subject.name}", 0, 1)
        _running(rig, subject)
    for subject in rig.subjects:
        with rig.trying(subject.name, "churn"):
            rig.comparison.add(subject.name, "churn", [_churn(subject) for _ in range(3)])


def _first_and_exit(
    rig: Rig, prefix: str, words: Callable[[Subject], list[str]], subjects: Sequence[Subject]
) -> None:
    ends: dict[str, list[float]] = {one.name: [] for one in subjects}
    failed: set[str] = set()
    total = len(subjects) * (rig.rounds + 1)
    done = 0

    def once(subject: Subject) -> float:
        nonlocal done
        done += 1
        rig.tell(f"{prefix}: run", done, total)
        if subject.name in failed:
            return 0.0
        try:
            first, end = timed(words(subject), subject.env, console=subject.console)
        except FailedError as error:
            failed.add(subject.name)
            for key in ("first", "exit"):
                rig.comparison.miss(subject.name, f"{prefix}.{key}", str(error))
            return 0.0
        ends[subject.name].append(end)
        return first

    actions = {one.name: (lambda one=one: once(one)) for one in subjects}
    for name, values in interleaved(actions, rig.rounds).items():
        if name not in failed:
            rig.comparison.add(name, f"{prefix}.first", values)
            rig.comparison.add(name, f"{prefix}.exit", ends[name][1:])


def _cold(rig: Rig) -> None:
    count = max(3, rig.rounds // 2)
    for at, subject in enumerate(rig.subjects):
        values = []
        with rig.trying(subject.name, "start.cold"):
            for turn in range(count):
                rig.tell("start: cold", at * count + turn, len(rig.subjects) * count)
                machine.drop_caches()
                words = subject.run("first")
                values.append(timed(words, subject.env, console=subject.console)[0])
            rig.comparison.add(subject.name, "start.cold", values)


def _running(rig: Rig, subject: Subject) -> None:
    ready: list[float] = []
    execs: list[float] = []
    stops: list[float] = []
    with rig.trying(subject.name, "start.ready", "exec", "stop"):
        for _ in range(max(6, rig.rounds // 2)):
            begin = time.perf_counter()
            with subject.start("serve", str(network.PORT)) as running:
                if running.address:
                    network.ready(running.address)
                    ready.append((time.perf_counter() - begin) * 1e3)
                with rig.trying(subject.name, *(("exec",) if not execs else ())):
                    execs.append(elapsed(running.exec("first"), subject.env))
                begin = time.perf_counter()
                running.stop()
                stops.append((time.perf_counter() - begin) * 1e3)
        if ready:
            rig.comparison.add(subject.name, "start.ready", ready)
        else:
            rig.comparison.miss(subject.name, "start.ready", "it has no network of its own")
        if execs:
            rig.comparison.add(subject.name, "exec", execs)
        rig.comparison.add(subject.name, "stop", stops)


def _churn(subject: Subject, seconds: float = 2.0) -> float:
    """Runs to the end per second, with two at once."""
    counts = [0, 0]
    failures: list[FailedError] = []
    over = threading.Event()
    begin = time.perf_counter()

    def work(place: int) -> None:
        try:
            while time.perf_counter() - begin < seconds and not over.is_set():
                timed(subject.run("first"), subject.env, console=subject.console)
                counts[place] += 1
        except FailedError as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(place,)) for place in range(2)]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    finally:
        # Ended by a signal: what they use goes only after them.
        over.set()
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]
    return sum(counts) / (time.perf_counter() - begin)


def command(rig: Rig) -> None:
    """The given command, in every engine that takes an image."""
    if rig.command:
        engines: list[Subject] = list(rig.engines())
        _first_and_exit(rig, "command", lambda one: _whole(one, rig.command), engines)


def _whole(subject: Subject, words: Sequence[str]) -> list[str]:
    assert isinstance(subject, Engine)
    # What the image was made into for the probe has the probe as its command: say both.
    return subject.whole(("--entrypoint", words[0]), *words[1:])


def memory(rig: Rig) -> None:
    """Memory of one more; how many fit; whether they still answer."""
    for at, subject in enumerate(rig.subjects):
        rig.tell("memory", at, len(rig.subjects))
        with rig.trying(subject.name, "memory", "density"):
            _memory(rig, subject)
    rig.tell("memory", len(rig.subjects), len(rig.subjects))


def _counts(rig: Rig, subject: Subject) -> list[int]:
    light = subject.name in ("host", "container", "docker", "podman", "runc", "crun")
    top = rig.count or (16 if light else 6)
    return sorted({0, top // 3, 2 * top // 3, top})


def _memory(rig: Rig, subject: Subject) -> None:
    counts = _counts(rig, subject)
    points: list[tuple[float, float]] = []
    answers: dict[int, float] = {}
    with contextlib.ExitStack() as undo:
        started: list[Running] = []
        # The first is not counted: it brings what all share.
        undo.enter_context(subject.start("idle"))
        for count in counts:
            while len(started) < count:
                started.append(undo.enter_context(subject.start("idle")))
            points += [(count, machine.used_mib()) for _ in range(3)]
            if count in (counts[1], counts[-1]):
                with rig.trying(subject.name, "answer.alone", "answer.full"):
                    words = started[0].exec("first")
                    answers[count] = statistics.median(
                        elapsed(words, subject.env) for _ in range(5)
                    )
        free = machine.free_mib()
    found = slope(points)
    rig.comparison.add(subject.name, "memory", found)
    if found.low <= 0:  # a bound of how many fit would be made up
        rig.comparison.miss(subject.name, "density", "the memory of one more was not above noise")
        return
    expected = points[0][1] + counts[-1] * found.value
    actual = statistics.median(value for count, value in points if count == counts[-1])
    room = free + counts[-1] * found.value
    rig.comparison.add(
        subject.name, "density",
        Estimate(room / found.value, room / found.high, room / found.low),
        f"checked with {counts[-1]}: {actual - points[0][1]:.0f} MiB more in use, "
        f"{expected - points[0][1]:.0f} expected",
    )  # fmt: skip
    if len(answers) == 2:
        rig.comparison.add(subject.name, "answer.alone", [answers[counts[1]]])
        rig.comparison.add(subject.name, "answer.full", [answers[counts[-1]]])


def image(rig: Rig) -> None:
    """What the image takes."""
    rig.tell("image", 0, 1)
    for engine in rig.engines():
        with rig.trying(engine.name, "image.disk"):
            words = [*engine.words, "image", "inspect", engine.image]
            told = json.loads(said(words, engine.env))[0]
            size = _stored(told) or told["Size"]
            rig.comparison.add(engine.name, "image.disk", [size / (1 << 20)])
    with rig.trying("image", "image.wire"):
        sent = rig.stage.layers_on_the_wire() / (1 << 20)
        for engine in rig.engines():
            rig.comparison.add(engine.name, "image.wire", [sent], "the same layers for all")
    rig.tell("image", 1, 1)


def _stored(told: dict[str, Any]) -> int:
    """What our own layers take on the disk; 0 for another engine's, which tells it as its size."""
    if told["GraphDriver"]["Name"] != "erofs":
        return 0
    files = told["GraphDriver"]["Data"]["Layers"].split(":")
    return sum(os.stat(path).st_blocks * 512 for path in files)


def work(rig: Rig) -> None:
    """System calls, arithmetic, memory bandwidth, disk."""
    rounds = max(6, rig.rounds // 2)
    for words, metrics in WORK.items():
        subjects = [one for one in rig.subjects if one.lasting or words != "disk"]
        samples: dict[str, list[dict[str, float]]] = {one.name: [] for one in subjects}
        for turn in range(rounds):
            rig.tell(f"work: {words}", turn, rounds)
            for one in subjects[turn % len(subjects) :] + subjects[: turn % len(subjects)]:
                gaps = metrics if turn == 0 else ()
                with rig.trying(one.name, *gaps):
                    samples[one.name].append(_answer(rig, one, words))
        for name, found in samples.items():
            if found:
                for metric in metrics:
                    key = metric.rpartition(".")[2]
                    rig.comparison.add(name, metric, [sample[key] for sample in found])
        rig.tell(f"work: {words}", rounds, rounds)


def _answer(rig: Rig, subject: Subject, words: str) -> dict[str, float]:
    probe = [words]
    if words == "disk":
        probe.append(rig.stage.folder if subject.name == "host" else "/")
    text = said(subject.run(*probe), subject.env)
    return _object(text)


def _object(text: str) -> dict[str, float]:
    """The JSON object in what the probe printed, on a console too."""
    begin, end = text.find("{"), text.rfind("}")
    if begin < 0 or end < begin:
        raise FailedError(f"the probe said {text[-100:]!r}")
    found: dict[str, float] = json.loads(text[begin : end + 1])
    return found


def net(rig: Rig) -> None:
    """Round trips and throughput, from the host to the workload's own address."""
    metrics = ("net.trip", "net.in", "net.out")
    rounds = max(6, rig.rounds // 2)
    for at, subject in enumerate(rig.subjects):
        rig.tell("network", at, len(rig.subjects))
        with (
            rig.trying(subject.name, *metrics),
            subject.start("serve", str(network.PORT)) as running,
        ):
            if not running.address:
                raise FailedError("it has no network of its own")
            address = running.address
            network.ready(address)
            calls = (network.trip_us, network.into_mbps, network.out_mbps)
            for metric, call in zip(metrics, calls, strict=True):
                values = [call(address) for _ in range(rounds + 1)]
                rig.comparison.add(subject.name, metric, values[1:])
    rig.tell("network", len(rig.subjects), len(rig.subjects))


def noise(rig: Rig) -> None:
    """What a neighbour of the same kind does to a workload."""
    for at, subject in enumerate(rig.subjects):
        rig.tell("neighbours", at, len(rig.subjects))
        with rig.trying(subject.name, "noise.cpu"):
            rig.comparison.add(subject.name, "noise.cpu", _beside(rig, subject, "cpu"))
        if subject.lasting:
            with rig.trying(subject.name, "noise.disk"):
                rig.comparison.add(subject.name, "noise.disk", _beside(rig, subject, "disk"))
    rig.tell("neighbours", len(rig.subjects), len(rig.subjects))


def _beside(rig: Rig, subject: Subject, kind: str) -> list[float]:
    """Beside a neighbour ÷ alone, in turn."""
    where = rig.stage.folder if subject.name == "host" else "/"
    count = str(2 * len(os.sched_getaffinity(0))) if kind == "cpu" else "1"

    def measure() -> float:
        probe = ("beat", "1") if kind == "cpu" else ("disk", where)
        found = _object(said(subject.run(*probe), subject.env))
        return found["p99" if kind == "cpu" else "fsync"]

    ratios = []
    for _ in range(6):
        alone = measure()
        with subject.start("hog", kind, where, count):
            time.sleep(_HOG_S)
            ratios.append(measure() / alone)
    return ratios


def reach(rig: Rig) -> None:
    """How much of the host's kernel an instance can reach, and did."""
    for at, subject in enumerate(rig.subjects):
        rig.tell("surface", at, len(rig.subjects))
        with (
            rig.trying(subject.name, "surface.filter", "surface.seen"),
            subject.start("later", str(_LATER_S), str(network.PORT)) as running,
        ):
            with rig.trying(subject.name, "surface.seen"):
                calls = _watched(running)
                listed = " ".join(sorted(calls))
                rig.comparison.add(subject.name, "surface.seen", [float(len(calls))], listed)
            with rig.trying(subject.name, "surface.filter"):
                passed = surface.filtered(running.processes())
                note = f"of {surface.known()}"
                rig.comparison.add(subject.name, "surface.filter", [float(len(passed))], note)
    rig.tell("surface", len(rig.subjects), len(rig.subjects))


def _watched(running: Running) -> set[str]:
    """The calls of an instance that serves, moves data, and makes calls of its own."""
    until = time.monotonic() + _LATER_S + _CALLS_S
    with surface.seen(running.processes()) as calls:
        if running.address:
            network.ready(running.address)
            network.trip_us(running.address)
            network.into_mbps(running.address, 4 << 20)
            network.out_mbps(running.address, 4 << 20)
        time.sleep(max(until - time.monotonic(), 0))
    return calls


CASES: dict[str, Callable[[Rig], None]] = {
    "start": start, "command": command, "memory": memory, "image": image, "work": work,
    "network": net, "noise": noise, "surface": reach,
}  # fmt: skip
"""In the order in which they are run; `calls` are taken with `work`."""
