"""A Debian made by `vm bootstrap`: firmware, boot loader, kernel, systemd, cloud-init, network."""

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import vm_disk
from tests.helpers.installation import Installation, installation
from tests.helpers.waiting import until

MISSING = vm_disk.missing()
pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)
BOOT_S = 900.0
USER_DATA = """#cloud-config
password: secret
chpasswd: {expire: false}
write_files:
  - {path: /etc/marker, content: "from the seed"}
runcmd:
  - 'echo "MARK $(cat /etc/marker), $(hostname), $(getent hosts other)" > /dev/ttyS0'
"""


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    folder = tmp_path_factory.mktemp("debian")
    with installation(folder) as made:
        made.load_busybox(folder)
        vm_disk.provide(made)
        yield made


def said(here: Installation, name: str) -> str:
    return here.cli("logs", name).ok().out.replace("\r", "")


def banner(port: int) -> bytes:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 30) as sock:
        sock.settimeout(30)
        return sock.recv(64)
    return b""


def test_it_boots_with_the_seed_applied(here: Installation, tmp_path: Path) -> None:
    data = tmp_path / "user-data"
    data.write_text(USER_DATA)
    here.cli("network", "create", "lan").ok()
    other = ("run", "-d", "--name", "other", "--network", "lan", "busybox", "sleep", "3600")
    here.cli(*other).ok()
    words = ["--image", vm_disk.NAME, "--cpus", "2", "--memory", "768m", "--network", "lan"]
    words += ["-p", "127.0.0.1::22", "--user-data", str(data)]
    here.cli("vm", "create", *words, "--start", "web").ok()
    (port,) = here.cli("port", "web", "22").ok().line.splitlines()
    until(lambda: "web login:" in said(here, "web"), "a login", BOOT_S)
    until(lambda: "MARK" in said(here, "web"), "the seed's command", BOOT_S)
    (mark,) = [line for line in said(here, "web").splitlines() if line.startswith("MARK")]
    assert mark.startswith("MARK from the seed, web, ")
    assert "other" in mark.rpartition(", ")[2]
    number = int(port.rpartition(":")[2])
    until(lambda: banner(number).startswith(b"SSH-2.0"), "ssh through the published port", 120)
    named = here.cli("exec", "other", "nslookup", "web").ok().out
    assert here.cli("vm", "ls", "--format", "{{.Address}}").ok().line in named
    here.cli("vm", "stop", "-t", "600", "web").ok()
    assert here.cli("inspect", "-f", "{{.State.ExitCode}}", "web").ok().line == "0"
    assert "Power down" in said(here, "web")
