"""Docker's own clients against our socket, beside dockerd: the same programs, the same requests."""

import http.client
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from bench.measure import interleaved, timed

if TYPE_CHECKING:
    from bench.cases import Result, Rig

IMAGE = "bench-busybox:latest"
MANY = 500
LINES = 200_000
FIRST_LINE = 10**15


def _ours(rig: "Rig") -> str:
    return f"unix://{rig.ours.home}/run/docker.sock"


def _theirs(rig: "Rig") -> str:
    return f"unix://{rig.docker.socket}"


def _cli(host: str, *arguments: str) -> list[str]:
    return ["docker", "--host", host, *arguments]


def _clients(rig: "Rig") -> tuple[Any, Any]:
    import docker as docker_py

    rig.ours("version")  # starts the engine
    made = [docker_py.DockerClient(base_url=url, timeout=600) for url in (_ours(rig), _theirs(rig))]
    return made[0], made[1]


class _Unix(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=600)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(self._path)


def run(rig: "Rig") -> "Result":
    """`docker run --rm IMAGE true`."""
    ours, theirs = _clients(rig)
    run = ("run", "--rm", IMAGE, "true")
    series = interleaved(
        {
            "ours": lambda: timed(_cli(_ours(rig), *run)),
            "docker": lambda: timed(_cli(_theirs(rig), *run)),
        },
        rig.rounds,
    )
    rig.facts["docker's CLI, `run --rm IMAGE true`"] = " · ".join(
        f"{name} {one.median:.1f}±{one.spread:.1f} ms" for name, one in series.items()
    )
    ours.close()
    theirs.close()
    return {"api.run": series["ours"].median / series["docker"].median}


def cycle(rig: "Rig") -> "Result":
    """docker-py: create, start, wait, remove."""

    def once(client: Any) -> float:
        start = time.perf_counter()
        made = client.api.create_container(IMAGE, ["true"])["Id"]
        client.api.start(made)
        client.api.wait(made)
        client.api.remove_container(made)
        return (time.perf_counter() - start) * 1e3

    ours, theirs = _clients(rig)
    series = interleaved({"ours": lambda: once(ours), "docker": lambda: once(theirs)}, rig.rounds)
    rig.facts["docker-py cycle"] = " · ".join(
        f"{name} {one.median:.1f}±{one.spread:.1f} ms" for name, one in series.items()
    )
    ours.close()
    theirs.close()
    return {"api.cycle": series["docker"].median / series["ours"].median}


def lists(rig: "Rig") -> "Result":
    """`ps -a`, `inspect` and `images` with 500 containers, as requests on an open connection.

    No library is in between: docker-py's own time is several times that of the daemons.
    """
    ours, theirs = _clients(rig)
    ids: dict[str, list[str]] = {}
    clients = {"ours": ours, "docker": theirs}
    for name, client in clients.items():
        ids[name] = [client.api.create_container(IMAGE, ["true"])["Id"] for _ in range(MANY)]
    asks = {
        "ps": "/v1.41/containers/json?all=1",
        "inspect": "/v1.41/containers/{}/json",
        "images": "/v1.41/images/json",
    }
    sockets = {"ours": _ours(rig), "docker": _theirs(rig)}
    raw = {name: _Unix(url.removeprefix("unix://")) for name, url in sockets.items()}
    found: Result = {}
    for what, path in asks.items():

        def measured(name: str, path: str = path) -> float:
            start = time.perf_counter()
            raw[name].request("GET", path.format(ids[name][7]))
            answer = raw[name].getresponse()
            data = answer.read()
            took = (time.perf_counter() - start) * 1e3
            if answer.status != 200:
                raise RuntimeError(f"{path}: {answer.status} {data[:300]!r}")
            return took

        series = interleaved(
            {"ours": lambda: measured("ours"), "docker": lambda: measured("docker")}, rig.rounds
        )
        found[f"api.{what}"] = series["ours"].median / series["docker"].median
        rig.facts[f"{what} with {MANY} containers"] = " · ".join(
            f"{name} {one.median:.2f}±{one.spread:.2f} ms" for name, one in series.items()
        )
    for name, client in clients.items():
        raw[name].close()
        for one in ids[name]:
            client.api.remove_container(one)
        client.close()
    return found


def logs(rig: "Rig") -> "Result":
    """Lines a second through `docker run` of a chatty container; every one must arrive."""
    command = ["busybox", "seq", str(FIRST_LINE), str(FIRST_LINE + LINES - 1)]

    def once(host: str) -> float:
        start = time.perf_counter()
        done = subprocess.run(
            _cli(host, "run", "--rm", IMAGE, *command), stdout=subprocess.PIPE, check=True
        )
        took = time.perf_counter() - start
        lines = done.stdout.count(b"\n")
        if lines != LINES:
            raise RuntimeError(f"{host}: {lines} of {LINES} lines arrived")
        return took

    rig.ours("version")
    series = interleaved(
        {"ours": lambda: once(_ours(rig)), "docker": lambda: once(_theirs(rig))}, 5
    )
    rates = {name: LINES / one.median for name, one in series.items()}
    rig.facts["lines a second"] = " · ".join(f"{n} {rate:.0f}" for n, rate in rates.items())
    return {"api.logs": rates["ours"] / rates["docker"]}


def load(rig: "Rig") -> "Result":
    """`docker load` of a Debian image that is not there, if the case `images` has left one."""
    archive = rig.folder / "debian.tar"
    if not archive.exists():
        archive = rig.folder / "busybox-image.tar"
    rig.ours("version")

    def once(host: str) -> float:
        start = time.perf_counter()
        done = subprocess.run(
            _cli(host, "load", "-i", str(archive)), capture_output=True, check=True, text=True
        )
        took = time.perf_counter() - start
        name = done.stdout.split()[-1]
        if "bench-busybox" not in name:
            subprocess.run(_cli(host, "rmi", "-f", name), capture_output=True, check=True)
        return took

    series = interleaved(
        {"ours": lambda: once(_ours(rig)), "docker": lambda: once(_theirs(rig))}, 5
    )
    rig.facts["docker load"] = f"{archive.name}, {os.path.getsize(archive) >> 20} MiB"
    return {"api.load": series["ours"].median / series["docker"].median}


def attached(rig: "Rig") -> "Result":
    """Runs a second by docker's CLI from four shells at once: a figure for people."""
    count = 10

    def work() -> None:
        for _ in range(count):
            timed(_cli(_ours(rig), "run", "--rm", IMAGE, "true"))

    rig.ours("version")
    threads = [threading.Thread(target=work) for _ in range(4)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rig.facts["four docker CLIs"] = f"{4 * count / (time.perf_counter() - start):.0f} runs/s"
    return {}


CASES: dict[str, Callable[["Rig"], "Result"]] = {
    "api-run": run,
    "api-cycle": cycle,
    "api-lists": lists,
    "api-logs": logs,
    "api-load": load,
    "api-churn": attached,
}
