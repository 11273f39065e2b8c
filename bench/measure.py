"""Timing commands side by side: one round runs each once, in a rotating order."""

import os
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Series:
    """Samples of one thing, in the unit the case states."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def spread(self) -> float:
        """Median absolute deviation from the median."""
        middle = self.median
        return statistics.median(abs(value - middle) for value in self.values)


def timed(command: Sequence[str], env: Mapping[str, str] | None = None) -> float:
    """Milliseconds from spawn to exit of `command`; RuntimeError if it fails."""
    null = os.open(os.devnull, os.O_RDWR)
    try:
        actions = [(os.POSIX_SPAWN_DUP2, null, number) for number in (0, 1, 2)]
        start = time.perf_counter_ns()
        pid = os.posix_spawnp(command[0], list(command), env or os.environ, file_actions=actions)
        _, status = os.waitpid(pid, 0)
        elapsed = time.perf_counter_ns() - start
    finally:
        os.close(null)
    if status:
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        raise RuntimeError(f"{' '.join(command)}: status {status}: {done.stderr.strip()[-300:]}")
    return elapsed / 1e6


def interleaved(
    actions: Mapping[str, Callable[[], float]], rounds: int, warm: int = 2
) -> dict[str, Series]:
    """`rounds` samples of each action, taken in turn; `warm` further rounds first, dropped."""
    names = list(actions)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(warm + rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            value = actions[name]()
            if turn >= warm:
                samples[name].append(value)
    return {name: Series(tuple(values)) for name, values in samples.items()}


def output(command: Sequence[str], env: Mapping[str, str] | None = None, data: str = "") -> str:
    """What `command` prints; RuntimeError with its last words if it fails."""
    done = subprocess.run(
        command, env=env, input=data, capture_output=True, text=True, check=False, timeout=600
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()[-400:]}")
    return done.stdout


def memory_kib() -> int:
    """Memory of the whole machine in use, in KiB: caches dropped, then MemTotal - MemAvailable."""
    os.sync()
    with open("/proc/sys/vm/drop_caches", "w") as file:
        file.write("3")
    time.sleep(1)
    values = {}
    with open("/proc/meminfo") as file:
        for line in file:
            name, _, rest = line.partition(":")
            values[name] = int(rest.split()[0])
    return (
        values["MemTotal"]
        - values["MemFree"]
        - values["Buffers"]
        - values["Cached"]
        + (values["Shmem"])
    )


def pss_kib(pids: Sequence[int]) -> int:
    """Proportional set size of the processes, in KiB (proc_pid_smaps_rollup(5))."""
    total = 0
    for pid in pids:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            total += next(int(line.split()[1]) for line in file if line.startswith("Pss:"))
    return total
