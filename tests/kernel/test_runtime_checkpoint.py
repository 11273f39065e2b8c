"""checkpoint and restore of bulkhead-runtime: what a container was doing goes on in another one."""

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import criu
from tests.helpers.residue import residue
from tests.helpers.runtime_rig import Bundle, console
from tests.helpers.waiting import until

pytestmark = pytest.mark.skipif(bool(criu.missing()), reason=criu.missing())
COUNT = "i=0; while true; do i=$((i+1)); echo $i; sleep 0.05; done"


@pytest.fixture
def bundle(tmp_path: Path) -> Iterator[Bundle]:
    with residue(tmp_path.name):
        made = Bundle(tmp_path)
        busybox = made.path / "rootfs/bin/busybox"
        for name in ("touch", "nc", "ip"):
            (busybox.parent / name).symlink_to("busybox")
        yield made
        for name in ("one", "two"):
            made.call("delete", "--force", name)


def images(bundle: Bundle) -> str:
    return str(bundle.folder / "images")


def save(bundle: Bundle, *words: str, code: int = 0) -> "subprocess.CompletedProcess[str]":
    command = ("--criu", criu.program(), "checkpoint", "--image-path", images(bundle))
    return bundle.call(*command, *words, "one", code=code)


def restored(bundle: Bundle, *words: str) -> "subprocess.Popen[bytes]":
    """`restore`, that stays as its parent, with pipes for its streams."""
    command = bundle.command("--criu", criu.program(), "restore", "--bundle", str(bundle.path))
    return subprocess.Popen(
        [*command, "--image-path", images(bundle), *words, "two"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def started(bundle: Bundle) -> "subprocess.Popen[bytes]":
    """`run` with pipes for its streams."""
    return subprocess.Popen(
        bundle.command("run", "--bundle", str(bundle.path), "one"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def numbers(process: "subprocess.Popen[bytes]", count: int) -> list[int]:
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(count)]
    if not all(lines):
        raise AssertionError(process.communicate(timeout=120)[1].decode())
    return [int(line) for line in lines]


def end(bundle: Bundle, name: str, process: "subprocess.Popen[bytes]") -> int:
    bundle.call("kill", name, "KILL")
    process.communicate(timeout=120)
    return process.returncode


def facts(pid: int) -> dict[str, str]:
    """What confines a process."""
    wanted = ("CapEff", "CapBnd", "NoNewPrivs", "Seccomp", "Uid")
    text = Path(f"/proc/{pid}/status").read_text()
    found = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    mounts = Path(f"/proc/{pid}/mountinfo").read_text().splitlines()
    shown = sorted(" ".join(line.split()[4:6]) for line in mounts)
    return {name: found[name] for name in wanted} | {"mounts": "\n".join(shown)}


def test_what_was_counted_goes_on(bundle: Bundle) -> None:
    def change(spec: dict[str, Any]) -> None:
        spec["linux"]["seccomp"] = {
            "defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [{"names": ["mkdir"], "action": "SCMP_ACT_ERRNO"}],
        }
        spec["linux"]["resources"]["memory"] = {"limit": 64 << 20}

    bundle.configure("sh", "-c", COUNT, change=change)
    first = started(bundle)
    before = numbers(first, 5)
    was = facts(bundle.pid("one"))
    save(bundle)
    rest, _ = first.communicate(timeout=120)
    before += [int(line) for line in rest.split()]
    bundle.call("state", "one", code=1)
    assert before == list(range(1, len(before) + 1))

    second = restored(bundle)
    assert numbers(second, 3) == [before[-1] + n for n in (1, 2, 3)]
    assert facts(bundle.pid("two")) == was
    refused = bundle.call("exec", "two", "touch", "/x", code=1)
    assert "Read-only file system" in refused.stderr
    cgroups = Path(f"/proc/{bundle.pid('two')}/cgroup").read_text()
    assert f"/bulkhead-{bundle.folder.name}-" in cgroups
    assert end(bundle, "two", second) == 128 + 9


def test_it_goes_on_where_it_is(bundle: Bundle) -> None:
    bundle.configure("sh", "-c", COUNT)
    first = started(bundle)
    numbers(first, 3)
    save(bundle, "--leave-running")
    assert bundle.status("one") == "running"
    numbers(first, 3)
    assert end(bundle, "one", first) == 128 + 9


def test_connections_are_kept_if_asked(bundle: Bundle) -> None:
    """Both ends are in the container; what is sent on comes from a process that was saved."""
    with socket.socket() as sock:
        try:
            sock.getsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED)
        except OSError as error:
            pytest.skip(f"CRIU asks TCP sockets what this kernel does not tell: {error}")
    listens = 'case "$(cat /proc/net/tcp /proc/net/tcp6)" in *:0063\\ *) true;; *) false;; esac'
    script = "sleep 9999 | nc -l -p 99 & "
    script += f"until {listens}; do sleep 0.1; done; ({COUNT}) | nc 127.0.0.1 99"

    def change(spec: dict[str, Any]) -> None:
        for kind in ("bounding", "effective", "permitted"):
            spec["process"]["capabilities"][kind].append("CAP_NET_ADMIN")

    bundle.configure("sh", "-c", f"ip link set lo up; {script}", change=change)
    first = started(bundle)
    numbers(first, 3)
    assert "tcp" in save(bundle, code=1).stderr.lower()
    assert bundle.status("one") == "running"
    save(bundle, "--tcp-established")
    first.communicate(timeout=120)
    second = restored(bundle, "--tcp-established")
    got = numbers(second, 3)
    assert got == list(range(got[0], got[0] + 3))
    assert got[0] > 1
    assert end(bundle, "two", second) == 128 + 9


def test_a_terminal_is_handed_out_anew(bundle: Bundle, tmp_path: Path) -> None:
    def change(spec: dict[str, Any]) -> None:
        spec["process"]["terminal"] = True

    bundle.configure("sh", "-c", "while read line; do echo said $line; done", change=change)

    def says(master: int, text: str) -> None:
        os.write(master, f"{text}\n".encode())
        seen = b""
        deadline = time.monotonic() + 60
        while f"said {text}\r\n".encode() not in seen:
            assert time.monotonic() < deadline, seen
            seen += os.read(master, 4096)

    with console(tmp_path / "a.sock") as receive:
        bundle.detached(
            "run", "--detach", "--bundle", str(bundle.path),
            "--console-socket", str(tmp_path / "a.sock"), "one",
        )  # fmt: skip
        master = receive()
    says(master, "first")
    save(bundle, "--shell-job")
    os.close(master)
    with console(tmp_path / "b.sock") as receive:
        bundle.detached(
            "--criu", criu.program(), "restore", "--detach", "--bundle", str(bundle.path),
            "--image-path", images(bundle), "--console-socket", str(tmp_path / "b.sock"),
            "--shell-job", "two",
        )  # fmt: skip
        master = receive()
    says(master, "second")
    bundle.call("kill", "two", "KILL")
    until(lambda: bundle.status("two") == "stopped", "its end")
    os.close(master)


def test_what_cannot_be(bundle: Bundle) -> None:
    bundle.configure("sh", "-c", COUNT)
    bundle.create("one")
    assert "running or paused" in save(bundle, code=1).stderr
    assert "page-server" in save(bundle, "--page-server", "x:1", code=1).stderr
    bundle.call("delete", "--force", "one")
    empty = ("restore", "--image-path", str(bundle.folder), "--bundle", str(bundle.path), "two")
    assert "no checkpoint" in bundle.call(*empty, code=1).stderr
    assert bundle.call("list", "--quiet").stdout == ""
    nothing = bundle.call("--criu", "/nothing", "restore", "--help")
    assert "--image-path" in nothing.stdout
