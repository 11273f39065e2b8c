"""A Debian made by `vm bootstrap`: firmware, boot loader, kernel, systemd, cloud-init, network; and
the engine inside. One boot serves all tests, which go in order.
"""

import contextlib
import re
import socket
from collections.abc import Iterator

import pytest

from tests.helpers import vm_disk
from tests.helpers.installation import Installation, installation
from tests.helpers.waiting import until

MISSING = vm_disk.missing()
pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)
BOOT_S = 900.0
NAME = "web"
USER_DATA = """#cloud-config
password: secret
chpasswd: {expire: false}
write_files:
  - {path: /etc/marker, content: "from the seed"}
runcmd:
  - 'echo "MARK $(cat /etc/marker), $(hostname), $(getent hosts other)" > /dev/ttyS0'
"""
BLACKOUT = "does not answer (yet)"


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    folder = tmp_path_factory.mktemp("debian")
    with installation(folder) as made:
        made.load_busybox(folder)
        vm_disk.provide(made)
        yield made


@pytest.fixture(scope="module")
def machine(here: Installation, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A machine that has begun to boot, beside a container on its network."""
    data = tmp_path_factory.mktemp("seed") / "user-data"
    data.write_text(USER_DATA)
    here.cli("network", "create", "lan").ok()
    other = ("run", "-d", "--name", "other", "--network", "lan", "busybox", "sleep", "3600")
    here.cli(*other).ok()
    words = ["--image", vm_disk.NAME, "--cpus", "2", "--memory", "1g", "--network", "lan"]
    words += ["-p", "127.0.0.1::22", "--user-data", str(data)]
    here.cli("machine", "create", *words, "--start", NAME).ok()
    return NAME


def said(here: Installation) -> str:
    return here.cli("logs", NAME).ok().out.replace("\r", "")


def at_a_login(here: Installation) -> bool:
    """Whether it asks who one is; messages of the system's may come in between."""
    return re.search(rf"{NAME} login:|login: |GNU/Linux \d+ {NAME} ttyS0", said(here)) is not None


def banner(port: int) -> bytes:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 30) as sock:
        sock.settimeout(30)
        return sock.recv(64)
    return b""


def ready(here: Installation) -> bool:
    """Whether the engine inside answers."""
    done = here.cli("machine", "run", NAME, "version")
    assert done.code == 0 or BLACKOUT in done.err, done.err
    return done.code == 0


def test_it_boots_with_the_seed_applied(here: Installation, machine: str) -> None:
    (port,) = here.cli("port", machine, "22").ok().line.splitlines()
    until(lambda: "MARK" in said(here), "the seed's command", BOOT_S)
    until(lambda: at_a_login(here), f"a login: {said(here)[-2000:]}", BOOT_S)
    (mark,) = [line for line in said(here).splitlines() if line.startswith("MARK")]
    assert mark.startswith(f"MARK from the seed, {machine}, ")
    assert "other" in mark.rpartition(", ")[2]
    number = int(port.rpartition(":")[2])
    until(lambda: banner(number).startswith(b"SSH-2.0"), "ssh through the published port", 120)
    named = here.cli("exec", "other", "nslookup", machine).ok().out
    assert here.cli("vm", "ls", "--format", "{{.Address}}").ok().line in named


def test_containers_run_inside(here: Installation, machine: str) -> None:
    until(lambda: ready(here), "the engine inside", BOOT_S)
    script = "cat; uname -r; exit 7"
    words = ("run", "--rm", "-i", "--boundary", f"vm:{machine}", "busybox", "sh", "-c", script)
    done = here.cli(*words, stdin="through the link\n")
    assert done.code == 7, done.err
    text, release = done.out.splitlines()
    assert text == "through the link"
    assert release.endswith("-cloud-amd64")


def test_a_port_leads_through_the_machine(here: Installation, machine: str) -> None:
    until(lambda: ready(here), "the engine inside", BOOT_S)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    script = "while true; do echo inside | nc -l -p 80; done"
    words = ("-d", "--name", "c1", "--boundary", f"vm:{machine}", "-p", f"{port}:80")
    here.cli("run", *words, "busybox", "sh", "-c", script).ok()
    until(lambda: banner(port) == b"inside\n", "an answer from the container inside", 120)
    listed = here.cli("ps", "--all-machines", "--format", "{{.Names}}").ok().out.split()
    assert listed[listed.index(machine) + 1] == f"{machine}/c1"
    here.cli("machine", "run", machine, "rm", "-f", "c1").ok()


def test_the_power_button(here: Installation, machine: str) -> None:
    until(lambda: at_a_login(here), "a login", BOOT_S)
    here.cli("vm", "stop", "-t", "600", machine).ok()
    assert here.cli("inspect", "-f", "{{.State.ExitCode}}", machine).ok().line == "0"
    assert "Power down" in said(here)
    here.cli("machine", "run", machine, "ps").failed(1, "not running")
