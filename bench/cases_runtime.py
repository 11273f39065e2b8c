"""bulkhead-runtime beside runc and crun: on prepared bundles, without any engine."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.measure import interleaved, output, timed

if TYPE_CHECKING:
    from bench.cases import Result, Rig

NATIVE = Path(__file__).parent.parent / "src/bulkhead/_native/bulkhead-runtime"
_WAIT_S = 60


@dataclass(frozen=True)
class Peer:
    """One runtime: its command, its environment, its bundle."""

    command: tuple[str, ...]
    env: dict[str, str]
    bundle: Path

    def words(self, *words: str) -> list[str]:
        return [*self.command, *words]

    def run(self) -> float:
        """`run` of `true`, in milliseconds."""
        return timed(self.words("run", "--bundle", str(self.bundle), "bench"), self.env)

    def cycle(self) -> float:
        """`create`, `start`, `delete` of `true`; the wait for its end between them not counted."""
        create = ("create", "--bundle", str(self.bundle), "bench")
        spent = timed(self.words(*create), self.env) + timed(self.words("start", "bench"), self.env)
        until(lambda: self.state()["status"] == "stopped")
        return spent + timed(self.words("delete", "bench"), self.env)

    def state(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(output(self.words("state", "bench"), self.env))
        return found

    @contextmanager
    def sleeping(self) -> Iterator[None]:
        """A container that runs `sleep`, to execute `true` in."""
        path = self.bundle / "config.json"
        before = path.read_text()
        spec = json.loads(before)
        spec["process"]["args"] = ["/bin/sleep", "3600"]
        path.write_text(json.dumps(spec))
        try:
            timed(self.words("create", "--bundle", str(self.bundle), "bench"), self.env)
            path.write_text(before)
            timed(self.words("start", "bench"), self.env)
            yield
        finally:
            path.write_text(before)
            timed(self.words("delete", "--force", "bench"), self.env)

    def execute(self) -> float:
        """`exec` of `true`."""
        return timed(self.words("exec", "bench", "/bin/true"), self.env)

    def peak_kib(self) -> int:
        """The most memory that the runtime's own process of `create` has used, in KiB."""
        create = self.words("create", "--bundle", str(self.bundle), "bench")
        # A process begins with the peak of who forked it: busybox is small. It takes KiB for pages.
        told = self.bundle / "peak"
        timed(["busybox", "time", "-f", "%M", "-o", str(told), *create], self.env)
        timed(self.words("delete", "--force", "bench"), self.env)
        return int(told.read_text()) * 1024 // os.sysconf("SC_PAGESIZE")


def until(done: Callable[[], bool]) -> None:
    """Wait for something that comes within moments; RuntimeError if not."""
    deadline = time.monotonic() + _WAIT_S
    while not done():
        if time.monotonic() > deadline:
            raise RuntimeError("what was waited for did not come")
        time.sleep(0.001)


def _crun(rig: "Rig", env: dict[str, str]) -> Peer:
    folder = rig.folder / "bundle-crun"
    root = ("--root", str(rig.folder / "crun"))
    peer = Peer(("crun", *root), env, folder)
    try:
        peer.run()
    except RuntimeError as error:
        # It refuses some hosts' hierarchies. Without control groups it does less than we do.
        rig.facts["crun as a runtime"] = f"without control groups, since with them: {error}"
        return Peer(("crun", "--cgroup-manager=disabled", *root), env, folder)
    return peer


@contextmanager
def _peers(rig: "Rig") -> Iterator[dict[str, Peer]]:
    """runc, crun, ours with a planner, ours without."""
    bundle = rig.folder / "bundle-runc"
    env = {**rig.ours.env, "BULKHEAD_RUNTIME_PLANNER_WATCH": "0"}
    roots = {name: rig.folder / f"root-{name}" for name in ("warm", "cold")}
    place = roots["warm"] / ".planner"
    place.mkdir(parents=True, mode=0o700)
    planner = subprocess.Popen([str(NATIVE), "planner", str(place)], env=env)
    try:
        until((place / str(os.stat("/proc/self/ns/mnt").st_ino)).exists)
        yield {
            "runc": Peer(("runc", "--root", str(rig.folder / "runc")), env, bundle),
            "crun": _crun(rig, env),
            "warm": Peer((str(NATIVE), "--root", str(roots["warm"])), env, bundle),
            "cold": Peer(
                (str(NATIVE), "--root", str(roots["cold"])),
                {**env, "BULKHEAD_RUNTIME_PLANNER": "0"},
                bundle,
            ),
        }
    finally:
        planner.send_signal(signal.SIGTERM)
        planner.wait()


def runtime(rig: "Rig") -> "Result":
    """`run`, create+start+delete and `exec` of `true`, and the memory of a set-up."""
    results: Result = {}
    with _peers(rig) as peers:
        kinds: dict[str, Callable[[Peer], float]] = {"run": Peer.run, "cycle": Peer.cycle}
        for kind, measure in kinds.items():
            actions = {name: _bound(measure, peer) for name, peer in peers.items()}
            results |= _ratios(rig, kind, actions)
        results |= _exec(rig, peers)
        peaks = {name: min(peer.peak_kib() for _ in range(3)) for name, peer in peers.items()}
        rig.facts["memory of `create`"] = " · ".join(f"{n} {k} KiB" for n, k in peaks.items())
        results["runtime.memory"] = peaks["warm"] / peaks["runc"]
    return results


def _bound(measure: Callable[[Peer], float], peer: Peer) -> Callable[[], float]:
    return lambda: measure(peer)


def _exec(rig: "Rig", peers: dict[str, Peer]) -> "Result":
    """One container lives at a time where two runtimes share a cgroup path: in turn, not mixed."""
    series = {}
    for name, peer in peers.items():
        with peer.sleeping():
            series[name] = interleaved({name: peer.execute}, rig.rounds)[name]
    rig.facts["runtime exec"] = " · ".join(
        f"{n} {s.median:.1f}±{s.spread:.1f} ms" for n, s in series.items()
    )
    base = series["runc"].median
    return {f"runtime.exec.{kind}": series[kind].median / base for kind in ("warm", "cold")}


def _ratios(rig: "Rig", kind: str, actions: dict[str, Callable[[], float]]) -> "Result":
    series = interleaved(actions, rig.rounds)
    rig.facts[f"runtime {kind}"] = " · ".join(
        f"{n} {s.median:.1f}±{s.spread:.1f} ms" for n, s in series.items()
    )
    base = series["runc"].median
    return {
        **{f"runtime.{kind}.{name}": series[name].median / base for name in ("warm", "cold")},
        f"runtime.{kind}.crun": series["warm"].median / series["crun"].median,
    }


CASES: dict[str, Callable[["Rig"], "Result"]] = {"runtime": runtime}
