"""bulkhead-runtime: what a process gets beside its streams; rare members of a configuration."""

import array
import errno
import fcntl
import json
import os
import socket
import struct
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from bulkhead.linux import mounts
from tests.helpers.residue import residue
from tests.helpers.runtime_rig import Bundle, Change, console


@pytest.fixture
def bundle(tmp_path: Path) -> Iterator[Bundle]:
    with residue(str(tmp_path)):
        made = Bundle(tmp_path)
        yield made
        for name in made.call("list", "-q").stdout.split():
            made.call("delete", "--force", name)


def test_descriptors_keep_their_numbers(bundle: Bundle, tmp_path: Path) -> None:
    bundle.native = True  # which hands such a command to Python
    for name in ("three", "four"):
        (tmp_path / name).write_text(name)
    bundle.configure("sh", "-c", "cat <&3 <&4; ls /proc/self/fd")
    opened = f'exec 3<{tmp_path}/three 4<{tmp_path}/four; exec "$@"'
    with bundle.planner():
        run = bundle.command("run", "--preserve-fds", "2", "-b", str(bundle.path), "one")
        done = subprocess.run(["sh", "-c", opened, "sh", *run], capture_output=True, text=True)
        assert done.stdout == "four0\n1\n2\n3\n4\n5\n", done.stderr
        bundle.configure("sleep", "1000")
        bundle.create("one")
        bundle.call("start", "one")
        execute = bundle.command("exec", "--preserve-fds", "1", "one", "sh", "-c", "cat <&3")
        done = subprocess.run(["sh", "-c", opened, "sh", *execute], capture_output=True, text=True)
        assert done.stdout == "three", done.stderr
        shut = bundle.command("exec", "--preserve-fds", "9", "one", "true")
        done = subprocess.run(shut, capture_output=True, text=True)
        assert "is not open" in done.stderr
        bundle.call("delete", "--force", "one")
    bundle.native = False  # nor leaves another planner behind


def test_a_pidfd_of_the_first_process(bundle: Bundle, tmp_path: Path) -> None:
    bundle.configure("sleep", "1000")
    path = tmp_path / "pidfd"
    with console(path) as receive:
        bundle.create("one", "--pidfd-socket", str(path))
        fd = receive()
    try:
        lines = dict(
            line.split(":\t") for line in Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines()
        )
        assert int(lines["Pid"]) == bundle.pid("one")
    finally:
        os.close(fd)


def test_a_root_that_cannot_be_pivoted(bundle: Bundle) -> None:
    bundle.configure("sh", "-c", "cat /etc/marker; ls -d /etc/marker /..")
    done = bundle.call("run", "--no-pivot", "--no-new-keyring", "-b", str(bundle.path), "one")
    assert done.stdout == "of the root/..\n/etc/marker\n"


RECEIVE = 0xC0502100
SEND = 0xC0182101
"""SECCOMP_IOCTL_NOTIF_RECV, _SEND of linux/seccomp.h: 80 and 24 bytes."""


def test_a_listener_is_asked(bundle: Bundle, tmp_path: Path) -> None:
    """The agent answers for mkdir(2); what comes with its descriptor is the specification's."""
    path = tmp_path / "agent"

    def listened(spec: dict[str, Any]) -> None:
        spec["annotations"] = {"a": "b"}
        rule = {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_NOTIFY"}
        spec["linux"]["seccomp"] = {
            "defaultAction": "SCMP_ACT_ALLOW",
            "listenerPath": str(path),
            "listenerMetadata": "of ours",
            "syscalls": [rule],
        }

    bundle.configure("sh", "-c", "mkdir /dev/shm/x; sleep 1000", change=listened)
    (bundle.path / "rootfs/bin/mkdir").symlink_to("busybox")
    with socket.socket(socket.AF_UNIX) as agent:
        agent.bind(str(path))
        agent.listen()
        agent.settimeout(120)
        bundle.create("one")
        bundle.call("start", "one")
        state = _answer(agent)
        assert (state["metadata"], state["fds"]) == ("of ours", ["seccompFd"])
        assert state["pid"] == state["state"]["pid"] == bundle.pid("one")
        assert state["state"]["annotations"] == {"a": "b"}
        words = bundle.command("exec", "one", "mkdir", "/dev/shm/y")
        with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as running:
            again = _answer(agent)
            assert again["pid"] != again["state"]["pid"] == state["pid"]
            assert "Argument list too long" in running.communicate(timeout=120)[1]
        assert "Argument list too long" in bundle.output("one") + (tmp_path / "said").read_text()


def _answer(agent: socket.socket) -> Any:
    """Take one listener, and refuse the call it is asked about with E2BIG; the state with it."""
    client, _ = agent.accept()
    with client:
        data, fds, _, _ = socket.recv_fds(client, 65536, 1)
    asked = array.array("B", bytes(80))
    fcntl.ioctl(fds[0], RECEIVE, asked)
    identity = struct.unpack_from("=Q", asked)[0]
    fcntl.ioctl(fds[0], SEND, struct.pack("=QqiI", identity, 0, -errno.E2BIG, 0))
    os.close(fds[0])
    return json.loads(data)


@pytest.mark.parametrize(
    ("seccomp", "words"),
    [
        ({"defaultAction": "SCMP_ACT_NOTIFY"}, "is for single calls only"),
        (
            {
                "defaultAction": "SCMP_ACT_ALLOW",
                "syscalls": [{"names": ["mkdir"], "action": "SCMP_ACT_NOTIFY"}],
            },
            "needs listenerPath",
        ),
        ({"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/nowhere"}, "No such file"),
    ],
)
def test_a_listener_that_cannot_be(bundle: Bundle, seccomp: dict[str, Any], words: str) -> None:
    def wrong(spec: dict[str, Any]) -> None:
        spec["linux"]["seccomp"] = seccomp

    bundle.configure("true", change=wrong)
    assert words in bundle.call("create", "-b", str(bundle.path), "one", code=1).stderr
    assert bundle.call("list", "-q").stdout == ""


def _linux(**members: Any) -> Change:
    return lambda spec: spec["linux"].update(members)


def _process(**members: Any) -> Change:
    return lambda spec: spec["process"].update(members)


def _offsets(spec: dict[str, Any]) -> None:
    spec["linux"]["namespaces"].append({"type": "time"})
    spec["linux"]["timeOffsets"] = {"boottime": {"secs": 10**9}}


STAT = "cut -d ' ' -f {} /proc/self/stat"
RUN: dict[str, tuple[Change, str, str]] = {
    "personality": (_linux(personality={"domain": "LINUX32"}), "uname -m", "i686"),
    "timeOffsets": (_offsets, "cut -c 1-2 /proc/uptime", "10"),
    "scheduler": (_process(scheduler={"policy": "SCHED_BATCH", "nice": 7}), STAT.format(41), "3"),
    "ioPriority": (
        _process(ioPriority={"class": "IOPRIO_CLASS_BE", "priority": 6}), "ionice -p $$",
        "best-effort: prio 6",
    ),
    "rlimits": (
        _process(rlimits=[{"type": "RLIMIT_CORE", "soft": 512, "hard": 1024}]), "ulimit -c", "1",
    ),
    "umask": (_process(user={"uid": 0, "gid": 0, "umask": 0o27}), "umask", "0027"),
    "additionalGids": (
        _process(user={"uid": 5, "gid": 6, "additionalGids": [7, 8]}), "id -G", "6 7 8",
    ),
    "domainname": (
        lambda spec: spec.update(domainname="the.domain"), "cat /proc/sys/kernel/domainname",
        "the.domain",
    ),
    "sysctl": (
        _linux(sysctl={"kernel.msgmax": "4096"}), "cat /proc/sys/kernel/msgmax", "4096",
    ),
    "maskedPaths": (_linux(maskedPaths=["/etc/marker"]), "wc -c < /etc/marker", "0"),
    "readonlyPaths": (_linux(readonlyPaths=["/dev/shm"]), "touch /dev/shm/x || echo no", "no"),
    "rootfsPropagation": (
        _linux(rootfsPropagation="shared"),
        "grep -c ' / [a-z,]* shared:' /proc/self/mountinfo", "1",
    ),
    "devices": (
        _linux(devices=[{"path": "/dev/nothing", "type": "c", "major": 1, "minor": 3}]),
        "cat /dev/nothing && stat -c %t:%T /dev/nothing", "1:3",
    ),
}  # fmt: skip
"""Members of a configuration: what to set, a command, what it prints at last."""


@pytest.mark.parametrize("name", RUN)
def test_a_member_has_its_effect(bundle: Bundle, name: str) -> None:
    change, command, expected = RUN[name]
    for applet in ("uname", "cut", "ionice", "touch", "grep"):
        (bundle.path / "rootfs/bin" / applet).symlink_to("busybox")

    def changed(spec: dict[str, Any]) -> None:
        spec["root"]["readonly"] = False
        change(spec)

    bundle.configure("sh", "-c", command, change=changed)
    if name == "personality" and os.uname().machine != "x86_64":
        pytest.skip("another machine's name")
    done = bundle.call("run", "-b", str(bundle.path), "one")
    assert expected in done.stdout.splitlines()[-1], done


def test_the_memory_policy(bundle: Bundle) -> None:
    bundle.configure(
        "sh", "-c", "head -n 1 /proc/self/numa_maps",
        change=_linux(memoryPolicy={"mode": "MPOL_PREFERRED", "nodes": "0"}),
    )  # fmt: skip
    done = bundle.call("run", "-b", str(bundle.path), "one", code=None)
    if done.returncode:  # a kernel without NUMA says so
        assert not Path("/proc/self/numa_maps").exists()
        assert "set the memory policy to MPOL_PREFERRED: Function not implemented" in done.stderr
    else:
        assert "prefer:0" in done.stdout
    for policy in ({"mode": "MPOL_NONE"}, {"mode": "MPOL_BIND", "nodes": "x"}):
        bundle.configure("true", change=_linux(memoryPolicy=policy))
        done = bundle.call("run", "-b", str(bundle.path), "one", code=1)
        assert "linux.memoryPolicy" in done.stderr


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_linux(intelRdt={"closID": "x"}), "linux.intelRdt is not supported"),
        (_linux(netDevices={"eth0": {}}), "linux.netDevices is not supported"),
        (_linux(mountLabel="system_u"), "linux.mountLabel is not supported"),
        (_linux(personality={"domain": "LINUX", "flags": ["X"]}), "personality.flags are not"),
    ],
)
def test_what_is_not_done_is_refused(bundle: Bundle, change: Change, words: str) -> None:
    bundle.configure("true", change=change)
    assert words in bundle.call("create", "-b", str(bundle.path), "one", code=1).stderr
    assert bundle.call("list", "-q").stdout == ""


def test_a_mount_with_id_maps_of_its_own(bundle: Bundle, tmp_path: Path) -> None:
    folder = tmp_path / "shown"
    folder.mkdir()
    (folder / "file").write_text("x")
    os.chown(folder / "file", 1000, 1001)
    try:
        with mounts.clone_tree(str(folder)):
            pass
    except OSError as error:
        pytest.skip(f"open_tree(2): {error}")

    def mapped(spec: dict[str, Any]) -> None:
        one = {"size": 1, "hostID": 0}
        spec["mounts"].append(
            {
                "destination": "/shown", "type": "bind", "source": str(folder),
                "options": ["bind", "idmap"],
                "uidMappings": [one | {"containerID": 1000}],
                "gidMappings": [one | {"containerID": 1001}],
            }
        )  # fmt: skip
        spec["root"]["readonly"] = False

    bundle.configure("stat", "-c", "%u:%g", "/shown/file", change=mapped)
    assert bundle.call("run", "-b", str(bundle.path), "one").stdout == "0:0\n"


def test_recursive_options_reach_what_is_below(bundle: Bundle, tmp_path: Path) -> None:
    outer = tmp_path / "outer"
    (outer / "inner").mkdir(parents=True)

    def bound(option: str) -> Change:
        def change(spec: dict[str, Any]) -> None:
            spec["root"]["readonly"] = False
            spec["mounts"].append(
                {
                    "destination": "/outer", "type": "bind", "source": str(outer),
                    "options": ["rbind", option],
                }
            )  # fmt: skip

        return change

    with ExitStack() as stack:
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(outer / "inner")], check=True)
        stack.callback(subprocess.run, ["umount", str(outer / "inner")], check=True)
        script = "echo x > /outer/inner/x && echo written; echo x > /outer/x || echo refused"
        for option, said in (("ro", "written\nrefused\n"), ("rro", "refused\n")):
            bundle.configure("sh", "-c", script, change=bound(option))
            assert bundle.call("run", "-b", str(bundle.path), "one").stdout == said
