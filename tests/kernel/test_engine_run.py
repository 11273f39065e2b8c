"""The engine with real containers: running, output, exit codes, options, errors."""

import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bulkhead.errors import BulkheadError, CommandNotExecutable, CommandNotFound
from tests.helpers import engine_rig as rigs
from tests.helpers.engine_rig import IMAGE, Rig
from tests.helpers.residue import residue
from tests.helpers.waiting import until


def _usable() -> str:
    if shutil.which("busybox") is None:
        return "busybox-static is not installed"
    try:
        pid = os.fork()
        if pid == 0:
            from bulkhead.linux import namespaces

            try:
                namespaces.unshare(namespaces.NEWNS)
            except OSError:
                os._exit(1)
            os._exit(0)
        if os.waitpid(pid, 0)[1]:
            return "mount namespaces are not permitted here"
    except OSError as error:
        return str(error)
    return ""


REASON = _usable()
pytestmark = pytest.mark.skipif(bool(REASON), reason=REASON or "usable")


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    directory = tmp_path_factory.mktemp("engine")
    with residue(str(directory)), rigs.engine(directory) as made:
        rigs.load_busybox(made)
        yield made


def test_output_and_exit_code_come_back(rig: Rig) -> None:
    done = rigs.run(rig, ["sh", "-c", "echo out; echo err >&2; exit 7"])
    assert (done.code, done.out, done.err) == (7, b"out\n", b"err\n")
    assert rig.call("workload.list", all=True) == []


def test_a_signal_gives_128_plus_its_number(rig: Rig) -> None:
    # The first process of a PID namespace ignores what it has no handler for; KILL from inside
    # its own namespace too. So a child of it.
    assert rigs.run(rig, ["sh", "-c", "sh -c 'kill -TERM $$'; exit $?"]).code == 143


def test_standard_input_reaches_the_workload_and_ends(rig: Rig) -> None:
    done = rigs.run(rig, ["cat"], stdin=b"line one\nline two\n")
    assert (done.code, done.out) == (0, b"line one\nline two\n")


def test_much_output_arrives_whole(rig: Rig) -> None:
    done = rigs.run(rig, ["sh", "-c", "seq 1 200000"])
    assert done.out == b"".join(b"%d\n" % n for n in range(1, 200001))


@pytest.mark.parametrize(
    ("command", "kind", "code"),
    [
        (["/nope"], CommandNotFound, 127),
        (["nope"], CommandNotFound, 127),
        (["/etc"], CommandNotExecutable, 126),
    ],
)
def test_what_cannot_be_run_is_named_and_leaves_nothing(
    rig: Rig, command: list[str], kind: type[BulkheadError], code: int
) -> None:
    with pytest.raises(kind) as caught:
        rigs.run(rig, command)
    assert command[0] in str(caught.value)
    assert caught.value.details["exit_code"] == code
    assert rig.call("workload.list", all=True) == []


@pytest.mark.parametrize(
    ("body", "category", "words"),
    [
        ({"Image": "nope:1"}, "not-found", "No such image: nope:1"),
        ({"Image": IMAGE, "User": "bob"}, "invalid", "unable to find user bob"),
        ({"Image": IMAGE, "Foo": 1}, "invalid", "Foo"),
        (
            {"Image": IMAGE, "HostConfig": {"NetworkMode": "nowhere"}},
            "not-found",
            "network nowhere not found",
        ),
        (
            {"Image": IMAGE, "HostConfig": {"NetworkMode": "container:none"}},
            "not-found",
            "No such container: none",
        ),
        (
            {
                "Image": IMAGE,
                "HostConfig": {"Mounts": [{"Type": "bind", "Source": "/no/x", "Target": "/x"}]},
            },
            "invalid",
            "bind source path does not exist: /no/x",
        ),
        (
            {"Image": IMAGE, "HostConfig": {"Devices": [{"PathOnHost": "/dev/nope"}]}},
            "invalid",
            'adding custom device "/dev/nope"',
        ),
        (
            {"Image": IMAGE, "HostConfig": {"CapAdd": ["NOPE"]}},
            "invalid",
            "CAP_NOPE",
        ),
    ],
)
def test_mistakes_are_one_clear_line_and_leave_nothing(
    rig: Rig, body: dict[str, Any], category: str, words: str
) -> None:
    host = {"AutoRemove": True, **body.get("HostConfig", {})}
    with pytest.raises(BulkheadError) as caught:
        rig.call("workload.run", body={**body, "HostConfig": host})
    assert caught.value.category == category
    assert words in caught.value.message
    assert "\n" not in caught.value.message
    assert rig.call("workload.list", all=True) == []


def test_a_name_is_taken_once(rig: Rig) -> None:
    identity = rigs.start(rig, "taken", "sleep 1000")
    with pytest.raises(BulkheadError) as caught:
        rigs.run(rig, ["true"], name="taken")
    assert f'"/taken" is already in use by container "{identity}"' in caught.value.message
    rig.call("workload.remove", id="taken", force=True)
    assert rigs.run(rig, ["true"], name="taken").code == 0
    assert rigs.run(rig, ["true"], name="taken").code == 0


def test_an_occupied_port_is_named(rig: Rig) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ports = {"80/tcp": [{"HostIp": "127.0.0.1", "HostPort": str(port)}]}
        with pytest.raises(BulkheadError) as caught:
            rigs.run(rig, ["true"], PortBindings=ports)
        assert str(port) in caught.value.message
    assert rig.call("workload.list", all=True) == []


def test_environment_user_directory_and_name(rig: Rig) -> None:
    config = {
        "Env": ["A=1"], "User": "1000:1001", "WorkingDir": "/made/up", "Hostname": "box",
    }  # fmt: skip
    done = rigs.run(
        rig, ["sh", "-c", "echo $A $PATH; id -u; id -g; pwd; hostname; cat /etc/hostname"],
        config=config,
    )  # fmt: skip
    assert done.out.decode().split("\n") == [
        "1 /bin:/usr/bin", "1000", "1001", "/made/up", "box", "box", "",
    ]  # fmt: skip


def test_limits_hold(rig: Rig) -> None:
    script = "for i in $(seq 40); do sleep 100 & done 2>&1; wait"
    done = rigs.run(rig, ["sh", "-c", script], PidsLimit=10)
    assert b"can't fork" in done.out + done.err


def test_a_kill_for_want_of_memory_is_explained(rig: Rig) -> None:
    script = "x=a; while true; do x=$x$x; done"
    done = rigs.run(rig, ["sh", "-c", script], Memory=16 << 20, MemorySwap=16 << 20)
    assert done.code == 137
    assert "out of memory: the kernel killed" in done.result["Error"]
    assert "16 MiB" in done.result["Error"]


def test_tmpfs_read_only_root_and_binds(rig: Rig, tmp_path: Path) -> None:
    (tmp_path / "given").write_text("from outside")
    script = (
        "cat /host/given; echo back >/host/back; touch /x 2>/dev/null && echo WRITABLE; "
        "touch /scratch/y && echo scratch; touch /ro/z 2>/dev/null || echo read-only"
    )
    done = rigs.run(
        rig, ["sh", "-c", script], ReadonlyRootfs=True,
        Binds=[f"{tmp_path}:/host", f"{tmp_path}:/ro:ro"], Tmpfs={"/scratch": "size=1m"},
    )  # fmt: skip
    assert done.out == b"from outsidescratch\nread-only\n"
    assert (tmp_path / "back").read_text() == "back\n"


def test_a_missing_source_of_a_v_flag_is_made(rig: Rig, tmp_path: Path) -> None:
    assert rigs.run(rig, ["ls", "/x"], Binds=[f"{tmp_path}/new/dir:/x"]).code == 0
    assert (tmp_path / "new/dir").is_dir()


def test_init_reaps_and_forwards(rig: Rig) -> None:
    done = rigs.run(rig, ["sh", "-c", "echo $PPID; exit 5"], Init=True)
    assert (done.code, done.out) == (5, b"1\n")


def test_volumes_are_filled_once_and_kept(rig: Rig) -> None:
    first = rigs.run(
        rig, ["sh", "-c", "ls /etc | head -1; echo own >/etc/own"], Binds=["vol1:/etc"]
    )
    assert first.out != b""
    second = rigs.run(rig, ["cat", "/data/own"], Binds=["vol1:/data"])
    assert second.out == b"own\n"
    empty = rigs.run(rig, ["ls", "/etc"], Binds=["vol2:/etc:nocopy"])
    assert b"own" not in empty.out
    for name in ("vol1", "vol2"):
        rig.call("volume.remove", name=name)
    assert rig.call("volume.list")["Volumes"] == []


def test_anonymous_volumes_go_with_rm(rig: Rig) -> None:
    assert rigs.run(rig, ["touch", "/anon/x"], config={"Volumes": {"/anon": {}}}).code == 0
    until(lambda: rig.call("volume.list")["Volumes"] == [], "the anonymous volume is gone")


def test_a_tmpfs_volume_is_mounted_for_its_users(rig: Rig) -> None:
    rig.call(
        "volume.create", Name="ram",
        DriverOpts={"type": "tmpfs", "device": "tmpfs", "o": "size=1m"},
    )  # fmt: skip
    done = rigs.run(rig, ["sh", "-c", "grep ' /ram ' /proc/mounts"], Binds=["ram:/ram"])
    assert b"tmpfs" in done.out
    assert b"size=1024k" in done.out
    rig.call("volume.remove", name="ram")


def test_a_workload_joins_anothers_network_and_shared_memory(rig: Rig) -> None:
    rigs.start(rig, "donor", "echo given >/dev/shm/x; sleep 1000", IpcMode="shareable")
    until(lambda: rigs.execute(rig, "donor", ["cat", "/dev/shm/x"])[0] == 0, "the file is there")
    done = rigs.run(
        rig, ["sh", "-c", "cat /dev/shm/x; ip -o addr"],
        IpcMode="container:donor", NetworkMode="container:donor",
    )  # fmt: skip
    assert done.out.startswith(b"given\n")
    address = rig.call("workload.inspect", id="donor")["NetworkSettings"]["IPAddress"]
    assert address.encode() in done.out
    with pytest.raises(BulkheadError, match="non-shareable IPC"):
        rigs.start(rig, "lonely", "sleep 1000")
        rigs.run(rig, ["true"], IpcMode="container:lonely")
    for name in ("donor", "lonely"):
        rig.call("workload.remove", id=name, force=True)


def test_a_dry_run_says_the_steps(rig: Rig) -> None:
    steps = rig.call("workload.plan", body={"Image": IMAGE, "Cmd": ["true"]})["steps"]
    assert any("pivot" in step for step in steps)
    assert rig.call("workload.list", all=True) == []
