"""What executes a guest's instructions here: KVM if it works, else QEMU's translator (TCG)."""

import functools
import os
import subprocess
import sys
from dataclasses import dataclass

_TRY_S = 2.0
"""How long the loop of `linux.kvm` may take; a processor needs some hundredths of it."""


@dataclass(frozen=True, slots=True)
class Acceleration:
    """`name` is kvm or tcg; `reason` says why it is not KVM."""

    name: str
    reason: str = ""


@functools.cache
def acceleration(path: str = "/dev/kvm") -> Acceleration:
    """Found out by running a guest in a process that is killed when it takes too long. Kept."""
    if not os.path.exists(path):
        return Acceleration("tcg", f"{path} does not exist")
    try:
        done = subprocess.run(
            [sys.executable, "-m", "bulkhead.linux.kvm"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_TRY_S,
            check=False,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
    except subprocess.TimeoutExpired:
        return Acceleration("tcg", f"{path}: a guest's instructions take a thousand times too long")
    except OSError as error:
        return Acceleration("tcg", f"{path}: not tried: {error}")
    if done.returncode:
        reason = (done.stdout.strip() or done.stderr.strip() or "the trial failed").splitlines()[-1]
        return Acceleration("tcg", reason)
    return Acceleration("kvm")


def tsc_khz(cpuinfo: str = "/proc/cpuinfo") -> int:
    """The rate of the host's time stamp counter in kHz, as near as it tells.

    A host that is itself virtual reports the counter's rate; others the present frequency of a
    core, so the frequency in the model's name is preferred, which is that of the counter.
    """
    with open(cpuinfo, encoding="utf-8", errors="replace") as file:
        lines = [line.partition(":") for line in file]
    facts = {name.strip(): value.strip() for name, _, value in lines}
    name = facts.get("model name", "")
    if "@" in name and name.endswith("GHz"):
        return int(float(name.rpartition("@")[2].removesuffix("GHz")) * 1_000_000)
    return int(float(facts.get("cpu MHz", "0")) * 1000) or 2_000_000
