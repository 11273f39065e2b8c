"""The cases. Each takes the rig and returns figures by target key; facts are for people."""

import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from bench import cases_api, cases_build, cases_guest, cases_runtime
from bench.measure import interleaved, memory_kib, output, pss_kib, timed
from bench.peers import Docker, Ours, busybox_root, bwrap_command, oci_bundle

IMAGE = "bench-busybox:latest"
DEBIAN = "bench-debian:latest"
SETTLED_S = 5.0
"""After the last command, before the daemons' memory is looked at."""


@dataclass
class Rig:
    """What the cases share."""

    folder: Path
    ours: Ours
    docker: Docker
    registry: str
    rounds: int
    idle_ours: int = 200
    idle_docker: int = 20
    facts: dict[str, str] = field(default_factory=dict)

    def python_env(self) -> dict[str, str]:
        """The environment in which `bulkhead` runs as plain Python."""
        return {**self.ours.env, "BULKHEAD_CLIENT": "python"}


Result = dict[str, float]


def prepare(rig: Rig) -> None:
    """One busybox image for everybody, and bundles for the runtimes."""
    root = busybox_root(rig.folder)
    archive = rig.folder / "busybox.tar"
    subprocess.run(["tar", "-C", str(root), "-cf", str(archive), "."], check=True)
    rig.docker("import", "-c", 'CMD ["/bin/true"]', str(archive), IMAGE)
    saved = rig.folder / "busybox-image.tar"
    rig.docker("save", "-o", str(saved), IMAGE)
    rig.ours("load", "-i", str(saved))
    for runtime in ("runc", "crun"):
        oci_bundle(rig.folder, root, runtime)


def _record(rig: Rig, name: str, text: str) -> None:
    rig.facts[name] = text


def run(rig: Rig) -> Result:
    """`run --rm IMAGE true`, end to end, beside the peers."""
    script = str(Path(sys.executable).parent / "bulkhead")
    crun = ["crun", "run", "-b", str(rig.folder / "bundle-crun")]
    actions: dict[str, Callable[[], float]] = {
        "ours": lambda: timed([rig.ours.program, "run", "--rm", IMAGE, "true"], rig.ours.env),
        "python": lambda: timed([script, "run", "--rm", IMAGE, "true"], rig.python_env()),
        "docker": lambda: timed(rig.docker.command("run", "--rm", IMAGE, "true")),
        "runc": lambda: timed(["runc", "run", "-b", str(rig.folder / "bundle-runc"), "bench"]),
        "crun": lambda: timed([*crun, "bench"]),
        "bwrap": lambda: timed(bwrap_command(rig.folder / "busybox")),
    }
    try:
        actions["crun"]()
    except RuntimeError as error:
        # It refuses some hosts' hierarchies. Without control groups it does less than we do.
        crun[1:1] = ["--cgroup-manager=disabled"]
        _record(rig, "crun", f"without control groups, since with them: {error}")
    series = interleaved(actions, rig.rounds)
    middle = {name: one.median for name, one in series.items()}
    _record(
        rig,
        "start of `true`",
        " · ".join(f"{n} {s.median:.1f}±{s.spread:.1f} ms" for n, s in series.items()),
    )
    return {
        "run.docker": middle["ours"] / middle["docker"],
        "run.crun": middle["ours"] / middle["crun"],
        "run.bwrap": middle["ours"] / middle["bwrap"],
        "run.python.docker": middle["python"] / middle["docker"],
        "run.python.runc": middle["python"] / middle["runc"],
    }


def cycle(rig: Rig) -> Result:
    """Create, start, wait, remove through the SDKs, in turn."""
    import docker as docker_py

    from bulkhead import Client

    peer = docker_py.DockerClient(base_url=f"unix://{rig.docker.socket}")
    home = rig.ours.home
    with Client(root=str(home / "root"), run=str(home / "run")) as client:

        def ours_once() -> float:
            start = time.perf_counter()
            for _ in range(20):
                workload = client.containers.create(IMAGE, ["true"])
                workload.start()
                workload.wait()
                workload.remove()
            return (time.perf_counter() - start) / 20 * 1e3

        def docker_once() -> float:
            start = time.perf_counter()
            container = peer.containers.create(IMAGE, ["true"])
            container.start()
            container.wait()
            container.remove()
            return (time.perf_counter() - start) * 1e3

        series = interleaved({"ours": ours_once, "docker": docker_once}, max(5, rig.rounds // 3))
    peer.close()
    ours_rate, docker_rate = 1e3 / series["ours"].median, 1e3 / series["docker"].median
    _record(rig, "SDK cycles per second", f"ours {ours_rate:.1f} · docker-py {docker_rate:.2f}")
    return {"cycle.docker": ours_rate / docker_rate}


def live(rig: Rig) -> Result:
    """Start cost with 500 live containers against none, and their memory beside docker's."""
    command = [rig.ours.program, "run", "--rm", IMAGE, "true"]
    once: dict[str, Callable[[], float]] = {"ours": lambda: timed(command, rig.ours.env)}
    before = interleaved(once, rig.rounds)["ours"].median
    ids = [rig.ours("run", "-d", IMAGE, "sleep", "3600").strip() for _ in range(500)]
    during = interleaved(once, rig.rounds)["ours"].median
    start = time.monotonic()
    for index in range(0, len(ids), 100):
        rig.ours("rm", "-f", *ids[index : index + 100])
    gone = time.monotonic() - start
    _record(
        rig,
        "500 live",
        f"start {before:.1f} → {during:.1f} ms; all removed in {gone:.1f} s",
    )
    return {"live500": during / before}


def memory(rig: Rig) -> Result:
    """Whole-machine memory per idle container: a slope, caches dropped, everything charged."""

    def slope(count: int, start: Callable[[], str], remove: Callable[[list[str]], None]) -> float:
        ids = [start() for _ in range(count // 4)]
        base = memory_kib()
        ids += [start() for _ in range(count)]
        per = (memory_kib() - base) / count
        remove(ids)
        return per

    ours = slope(
        rig.idle_ours,
        lambda: rig.ours("run", "-d", IMAGE, "sleep", "3600").strip(),
        lambda ids: void(rig.ours("rm", "-f", *ids)),
    )
    theirs = slope(
        rig.idle_docker,
        lambda: rig.docker("run", "-d", IMAGE, "sleep", "3600").strip(),
        lambda ids: void(rig.docker("rm", "-f", *ids)),
    )
    time.sleep(SETTLED_S)
    own, daemons = pss_kib(rig.ours.pids()), pss_kib(rig.docker.pids())
    _record(rig, "memory per idle container", f"ours {ours:.0f} KiB · docker {theirs:.0f} KiB")
    _record(rig, "daemons, PSS", f"ours {own / 1024:.1f} MiB · docker {daemons / 1024:.1f} MiB")
    return {"memory.docker": ours / theirs, "daemons.docker": own / daemons}


def void(value: object) -> None:
    """Drop a value where a callable must return nothing."""
    del value


def images(rig: Rig) -> Result:
    """Load, pull and disk use of one real Debian image."""
    archive = rig.folder / "debian-image.tar"
    rig.ours("image", "bootstrap", "debian:bookworm")
    rig.ours("tag", "debian:bookworm", DEBIAN)
    rig.ours("save", "-o", str(archive), DEBIAN)
    remote = f"{rig.registry}/debian:latest"
    rig.ours("tag", DEBIAN, remote)
    rig.ours("push", remote)
    for name in (remote, DEBIAN, "debian:bookworm"):
        rig.ours("rmi", name)

    def load_ours() -> float:
        elapsed = timed([rig.ours.program, "load", "-i", str(archive)], rig.ours.env)
        rig.ours("rmi", DEBIAN)
        return elapsed

    def load_docker() -> float:
        elapsed = timed(rig.docker.command("load", "-i", str(archive)))
        rig.docker("rmi", DEBIAN)
        return elapsed

    def pull_ours() -> float:
        elapsed = timed([rig.ours.program, "pull", "-q", remote], rig.ours.env)
        rig.ours("rmi", remote)
        return elapsed

    def pull_docker() -> float:
        elapsed = timed(rig.docker.command("pull", "-q", remote))
        rig.docker("rmi", remote)
        return elapsed

    load = interleaved({"ours": load_ours, "docker": load_docker}, 3, warm=1)
    pull = interleaved({"ours": pull_ours, "docker": pull_docker}, 3, warm=1)
    for name, series in (("load", load), ("pull", pull)):
        text = " · ".join(f"{who} {one.median:.0f} ms" for who, one in series.items())
        _record(rig, f"{name} of Debian", text)
    disk = _disk(rig, archive)
    return {
        "load.docker": load["ours"].median / load["docker"].median,
        "pull.docker": pull["ours"].median / pull["docker"].median,
        "disk.docker": disk,
    }


def _usage(folder: Path) -> int:
    return int(output(["du", "-sk", str(folder)]).split()[0])


def _disk(rig: Rig, archive: Path) -> float:
    ours_root, docker_root = rig.ours.home / "root", rig.docker.root / "data"
    before = _usage(ours_root), _usage(docker_root)
    rig.ours("load", "-i", str(archive))
    rig.docker("load", "-i", str(archive))
    ours, theirs = _usage(ours_root) - before[0], _usage(docker_root) - before[1]
    _record(rig, "disk of Debian", f"ours {ours / 1024:.0f} MiB · docker {theirs / 1024:.0f} MiB")
    return ours / theirs


def port(rig: Rig) -> Result:
    """Bulk throughput to a published port against the container's own address."""
    script = "while true; do nc -l -p 5001 -e /bin/busybox dd if=/dev/zero bs=1M count=4096; done"
    identity = rig.ours("run", "-d", "-p", "127.0.0.1:15001:5001", IMAGE, "sh", "-c", script)
    identity = identity.strip()
    shape = "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}"
    address = rig.ours("inspect", "-f", shape, identity).strip()

    def receive(host: str, number: int) -> float:
        deadline = time.monotonic() + 30
        while True:
            try:
                with socket.create_connection((host, number), timeout=10) as connection:
                    return _throughput(connection)
            except ConnectionError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)

    try:
        actions = {
            "direct": lambda: receive(address, 5001),
            "published": lambda: receive("127.0.0.1", 15001),
        }
        series = interleaved(actions, 9, warm=1)
    finally:
        rig.ours("rm", "-f", identity)
    _record(
        rig,
        "throughput",
        " · ".join(f"{name} {one.median / 1e6:.0f} MB/s" for name, one in series.items()),
    )
    return {"port.direct": series["published"].median / series["direct"].median}


def _throughput(connection: socket.socket) -> float:
    buffer = bytearray(1 << 20)
    total, start = 0, time.perf_counter()
    while (size := connection.recv_into(buffer)) > 0:
        total += size
    if total < 1 << 20:
        raise ConnectionResetError("the peer closed at once")
    return total / (time.perf_counter() - start)


SYSCALLS = r"""
#include <fcntl.h>
#include <stdio.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
static double now(void) { struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1e9 + t.tv_nsec; }
int main(void) {
  double best[2] = {1e18, 1e18};
  for (int round = 0; round < 15; round++) {
    double start = now();
    for (int i = 0; i < 100000; i++) syscall(SYS_getppid);
    double took = (now() - start) / 100000; if (took < best[0]) best[0] = took;
    start = now();
    for (int i = 0; i < 20000; i++) close(open("/bin/probe", O_RDONLY | O_CLOEXEC));
    took = (now() - start) / 20000; if (took < best[1]) best[1] = took;
  }
  printf("%f %f\n", best[0], best[1]);
}
"""


def syscalls(rig: Rig) -> Result:
    """Two system calls natively, in our container and in docker's: the same static program."""
    source = rig.folder / "probe.c"
    source.write_text(SYSCALLS)
    root = rig.folder / "probe-root"
    (root / "bin").mkdir(parents=True)
    binary = root / "bin" / "probe"
    subprocess.run(["gcc", "-O2", "-static", "-o", str(binary), str(source)], check=True)
    Path("/bin/probe").unlink(missing_ok=True)
    shutil.copy(binary, "/bin/probe")
    archive = rig.folder / "probe.tar"
    subprocess.run(["tar", "-C", str(root), "-cf", str(archive), "."], check=True)
    rig.docker("import", str(archive), "probe:latest")
    rig.ours("import", str(archive), "probe:latest")
    found: dict[str, tuple[list[float], list[float]]] = {}
    try:
        for _ in range(10):
            for name, text in (
                ("native", output(["/bin/probe"])),
                ("ours", rig.ours("run", "--rm", "probe:latest", "/bin/probe")),
                ("docker", rig.docker("run", "--rm", "probe:latest", "/bin/probe")),
            ):
                first, second = map(float, re.findall(r"[\d.]+", text))
                pair = found.setdefault(name, ([], []))
                pair[0].append(first)
                pair[1].append(second)
    finally:
        Path("/bin/probe").unlink(missing_ok=True)
    best = {name: (min(a), min(b)) for name, (a, b) in found.items()}
    _record(
        rig,
        "ns per getppid, open+close",
        " · ".join(f"{name} {a:.0f}, {b:.0f}" for name, (a, b) in best.items()),
    )
    return {
        "getppid.native": best["ours"][0] / best["native"][0],
        "open.native": best["ours"][1] / best["native"][1],
        "getppid.docker": best["ours"][0] / best["docker"][0],
        "open.docker": best["ours"][1] / best["docker"][1],
    }


def churn(rig: Rig) -> Result:
    """Starts per second with two clients at once: a figure for people, no target."""
    count, threads = 100, []
    start = time.perf_counter()

    def work() -> None:
        for _ in range(count):
            timed([rig.ours.program, "run", "--rm", IMAGE, "true"], rig.ours.env)

    for _ in range(2):
        threads.append(threading.Thread(target=work))
        threads[-1].start()
    for thread in threads:
        thread.join()
    _record(rig, "two clients", f"{2 * count / (time.perf_counter() - start):.0f} runs/s")
    return {}


CASES: dict[str, Callable[[Rig], Result]] = {
    "run": run,
    "cycle": cycle,
    "live": live,
    "memory": memory,
    "images": images,
    "port": port,
    "syscalls": syscalls,
    "churn": churn,
    **cases_api.CASES,
    **cases_build.CASES,
    **cases_guest.CASES,
    **cases_runtime.CASES,
}
