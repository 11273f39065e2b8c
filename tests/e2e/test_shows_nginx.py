"""nginx on Debian, made from packages: served, named, killed around, limited, removed."""

import contextlib
import json
import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.culling import kill
from tests.helpers.images import has_busybox
from tests.helpers.installation import Done, Installation, installation
from tests.helpers.nginx import NGINX, nginx_archive
from tests.helpers.residue import residue
from tests.helpers.waiting import until

SERVE = "ln -sf /dev/stdout /var/log/nginx/access.log; exec nginx -g 'daemon off;'"
COUNT = "i=0; while [ ! -e /flag/end ]; do i=$((i+1)); echo $i; %s done; exit %d"
ASK = """
i=0; while [ ! -e /flag/end ]; do
  i=$((i+1))
  if wget -q -O /dev/null "http://web/?asked=$i"; then echo ok; else echo no $i; fi
done
"""
LIMITS = ("--memory", "64m", "--cpus", "0.5", "--pids-limit", "50")


class Site(Installation):
    """An installation whose commands go the short way: native client and command server."""

    def __call__(self, *argv: str) -> Done:
        return self.cli(*argv, native=True, server=True)

    def inspect(self, name: str) -> dict[str, Any]:
        """What `inspect` says of one container."""
        found: dict[str, Any] = json.loads(self("inspect", name).ok().out)[0]
        return found

    def pid(self, name: str) -> int:
        """The first process of a container, as the host counts."""
        return int(self.inspect(name)["State"]["Pid"])

    def remove(self, *names: str) -> None:
        """`rm -f`, and nothing of them may be listed any more."""
        self("rm", "-f", "-v", *names).ok()
        assert not set(self("ps", "-a", "--format", "{{.Names}}").out.split()) & set(names)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    if os.geteuid() != 0:
        pytest.skip("the container boundary wants root here")
    if not has_busybox():
        pytest.skip("no static busybox here (apt-get install busybox-static)")
    archive = nginx_archive()
    folder = tmp_path_factory.mktemp("shows")
    with residue(str(folder)), installation(folder) as plain:
        here = Site(plain.root, plain.run)
        here.load_busybox(folder)
        here("load", "-i", str(archive)).ok()
        yield here


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def publish(site: Site, *argv: str) -> int:
    """`run -d` with port 80 published at one that is free; which."""
    for _ in range(20):
        port = free_port()
        done = site("run", "-d", "-p", f"{port}:80", *argv)
        if done.code == 0:
            return port
        assert "in use" in done.err, done
        site("rm", "-f", argv[argv.index("--name") + 1])
    raise AssertionError("no free port")


def get(port: int, path: str, host: str = "127.0.0.1") -> bytes:
    """The body of a page on this host; an error if it does not come."""
    with urllib.request.urlopen(f"http://{host}:{port}{path}", timeout=60) as answer:
        body: bytes = answer.read()
        return body


def curl(port: int, path: str) -> str:
    command = ["curl", "-sS", "--max-time", "60", f"http://127.0.0.1:{port}{path}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


KILLS: list[list[tuple[str, ...]]] = [
    [("engine",)],
    [("keeper",)],
    [("engine",), ("keeper",)],
    [("keeper",), ("engine",)],
    [("engine", "keeper")],
    [("keeper", "engine", "server")],
    [("engine", "keeper"), ("keeper",), ("engine", "keeper")],
]
"""In this order; what is in one tuple dies at once."""


def test_nginx_outlives_engine_and_keeper(site: Site, tmp_path: Path) -> None:
    flag = ("-v", f"{tmp_path}:/flag:ro")
    site("network", "create", "shows").ok()
    with contextlib.ExitStack() as undo:
        undo.callback(site, "network", "rm", "shows")
        common = ("--network", "shows", *flag, "--log-opt", "max-size=-1")
        port = publish(site, "--name", "web", *common, *LIMITS, NGINX, "sh", "-c", SERVE)
        names = ["web", "writer", "term", "asker"]
        undo.callback(site, "rm", "-f", *names)
        # At ::1 a helper relays, which is handed the port a moment later.
        until(lambda: _answers(port) and _answers(port, "[::1]"), "nginx answers")
        writer = ("--name", "writer", "--cpus", "0.1", *common)
        site("run", "-d", *writer, "busybox", "sh", "-c", COUNT % ("", 43)).ok()
        tty = COUNT % ("sleep 0.005;", 42)
        site("run", "-dit", "--name", "term", *common, "busybox", "sh", "-c", tty).ok()
        site("run", "-d", "--name", "asker", *common, "busybox", "sh", "-c", ASK).ok()
        assert "Welcome to nginx" in curl(port, "/?n=0")
        pids = {name: site.pid(name) for name in names}
        number = 0
        for number, kills in enumerate(KILLS, 1):
            _round(site, number, kills, port, tmp_path)
            assert {name: site.pid(name) for name in names} == pids
        _progress(site, "writer")
        _progress(site, "term")
        # With the resolver dead names are unknown for a moment, but only then.
        asked = site("logs", "asker").ok().out.split("\n")[:-1]
        assert set(asked) == {"ok"}, [line for line in asked if line != "ok"][:10]
        assert kill(site, "resolver", "engine", "keeper") >= 2
        until(lambda: site("exec", "asker", "wget", "-qO-", "http://web/").code == 0, "named again")
        (tmp_path / "end").touch()
        assert site("wait", "writer", "term").ok().out.split() == ["43", "42"]
        for name in ("writer", "term"):
            count = _complete(site, name)
            print(f"{name}: {count} lines, none lost")
        site("stop", "-s", "QUIT", "web").ok()
        assert site.inspect("web")["State"]["ExitCode"] == 0
        log = site("logs", "web").ok().out
        for n in range(number + 1):
            assert log.count(f"/?n={n} ") == 1
        site.remove(*names)


def _answers(port: int, host: str = "127.0.0.1") -> bool:
    with contextlib.suppress(OSError):
        return b"nginx" in get(port, "/", host)
    return False


def _round(site: Site, number: int, kills: list[tuple[str, ...]], port: int, flag: Path) -> None:
    """Kill, and look what goes on without, and with what comes after."""
    wait = (
        f"echo here; while [ ! -e /flag/{number} ]; do sleep 0.01; done; echo gone; exit {number}"
    )
    name = f"ends-{number}"
    argv = ("--name", name, "-v", f"{flag}:/flag:ro", "busybox", "sh", "-c", wait)
    site("run", "-d", *argv).ok()
    pid = site.pid(name)
    for parts in kills:
        kill(site, *parts)
    # Nothing has been asked of the engine yet: traffic needs none of it.
    assert b"Welcome to nginx" in get(port, f"/?n={number}")
    assert b"Welcome to nginx" in get(port, "/", "[::1]")
    (flag / str(number)).touch()
    until(lambda: not _lives(pid), f"{name} ends")
    assert site("wait", name).ok().line == str(number)
    assert site("logs", name).ok().out == "here\ngone\n"
    new = ("run", "--rm", "--network", "shows", "busybox", "wget", "-qO-", "http://web/")
    assert "Welcome to nginx" in site(*new).ok().out
    assert site("exec", "web", "cat", "/etc/debian_version").ok().out.startswith("12")
    site("rm", name).ok()


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def _progress(site: Site, name: str) -> None:
    before = int(site("logs", "--tail", "1", name).ok().line)
    until(lambda: int(site("logs", "--tail", "1", name).ok().line) > before, f"{name} goes on")


def _complete(site: Site, name: str) -> int:
    lines = site("logs", name).ok().out.split("\n")
    assert lines.pop() == ""
    for expected, line in enumerate(lines, 1):
        assert int(line) == expected, f"{name}: line {expected} is {line!r}"
    return len(lines)


# --- limits


def group_file(pid: int, controller: str, v1: str, v2: str) -> str:
    """The text of a control group file of process `pid`, on whichever hierarchy has it."""
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            return (_mounted(controller) / path.lstrip("/") / v1).read_text().strip()
        if not controllers:
            unified = _mounted("") / path.lstrip("/") / v2
            if unified.exists():
                return unified.read_text().strip()
    raise AssertionError(f"no {controller} for process {pid}")


def _mounted(controller: str) -> Path:
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        after = fields[fields.index("-") + 1 :]
        if after[0] == "cgroup2" and not controller:
            return Path(fields[4])
        if after[0] == "cgroup" and controller and controller in after[2].split(","):
            return Path(fields[4])
    raise AssertionError(f"{controller or 'cgroup2'} is not mounted")


def cpu_seconds(pid: int) -> float:
    """Processor time of the container that process `pid` is in."""
    text = group_file(pid, "cpuacct", "cpuacct.usage", "cpu.stat")
    if text.startswith("usage_usec"):
        return int(text.split()[1]) / 1e6
    return int(text) / 1e9


def test_limits_are_in_the_kernel(site: Site) -> None:
    site("run", "-d", "--name", "limited", *LIMITS, NGINX, "sh", "-c", SERVE).ok()
    try:
        pid = site.pid("limited")
        assert group_file(pid, "memory", "memory.limit_in_bytes", "memory.max") == str(64 << 20)
        assert group_file(pid, "pids", "pids.max", "pids.max") == "50"
        quota = group_file(pid, "cpu", "cpu.cfs_quota_us", "cpu.max").split()[0]
        period = group_file(pid, "cpu", "cpu.cfs_period_us", "cpu.max").split()[-1]
        assert int(quota) / int(period) == 0.5
    finally:
        site.remove("limited")


def test_a_hog_is_killed_and_explained(site: Site) -> None:
    hog = ("sh", "-c", "echo begun; exec tail /dev/zero")
    done = site("run", "--name", "hog", *LIMITS, NGINX, *hog)
    try:
        assert (done.code, done.out) == (137, "begun\n")
        state = site.inspect("hog")["State"]
        assert state["OOMKilled"]
        assert "tail" in state["Error"], state
        assert "64" in state["Error"], state
        print(f"memory: {state['Error']}")
    finally:
        site.remove("hog")


def test_half_a_processor_is_half_a_processor(site: Site) -> None:
    spin = "while :; do :; done & while :; do :; done"
    site("run", "-d", "--name", "spin", *LIMITS, NGINX, "sh", "-c", spin).ok()
    try:
        pid = site.pid("spin")
        until(lambda: cpu_seconds(pid) > 0.2, "it spins")
        used, begin = cpu_seconds(pid), time.monotonic()
        until(lambda: cpu_seconds(pid) - used > 2.0, "it has used two seconds", 240)
        used = cpu_seconds(pid) - used
        share = used / (time.monotonic() - begin)
        print(f"cpus: two loops took {share:.3f} of a processor under --cpus 0.5")
        assert 0 < share <= 0.56
    finally:
        site.remove("spin")


def test_a_fork_bomb_stays_small(site: Site) -> None:
    bomb = ("perl", "-e", "fork while 1")
    site("run", "-d", "--name", "bomb", *LIMITS, NGINX, *bomb).ok()
    try:
        pid = site.pid("bomb")
        most = 0

        def bounded() -> bool:
            nonlocal most
            most = max(most, int(group_file(pid, "pids", "pids.current", "pids.current")))
            assert most <= 50
            return not group_file(pid, "pids", "pids.events", "pids.events").endswith("max 0")

        until(bounded, "the limit is met")
        for _ in range(200):
            bounded()
        print(f"pids: at most {most} processes under --pids-limit 50")
    finally:
        site.remove("bomb")
