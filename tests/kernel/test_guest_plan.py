"""A bundle in a guest: the set-up and the container's own plan, run by the guest's init."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from bulkhead.boundaries.guest import plan
from bulkhead.boundaries.guest.frames import Type, failure
from bulkhead.boundaries.guest.plan import Machine, Written
from bulkhead.boundary.seam import Bundle, Nic, Rootfs
from bulkhead.linux.fds import OwnedFd
from bulkhead.oci.runtime import Mount, Rlimit, Spec
from tests.helpers.container_lab import default_spec
from tests.helpers.guest_root import make_layer, vmm, writable_disk
from tests.helpers.monitor_rig import Monitor
from tests.helpers.waiting import DEADLINE_S


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    layer = make_layer(tmp_path)
    with writable_disk(tmp_path) as disk:
        # This host's control groups are not a guest's to arrange.
        yield Machine((layer,), disk, interfaces=("vec0",), cgroups=False)


def bundle(spec: Spec, nics: tuple[Nic, ...] = ()) -> Bundle:
    assert spec.process is not None
    # What a guest's own root may raise, root here may not.
    spec.process.rlimits = [Rlimit("RLIMIT_NOFILE", 1000, 1000)]
    return Bundle("w", spec, Rootfs(), "/nowhere", nics=nics)


def run(folder: Path, wanted: Bundle, machine: Machine) -> tuple[int, str, str]:
    planned = plan.start(wanted, machine, terminal=False)
    with Monitor(folder / "monitor", planned.frames, vmm=vmm(folder)) as monitor:
        frame = monitor.report()
        if frame.type != Type.STARTED:
            raise failure(frame, planned.steps)
        code, out, err = monitor.wait(b"")
        return code, out.decode(), err.decode()


def test_a_workload_is_confined_inside(tmp_path: Path, machine: Machine) -> None:
    script = (
        "hostname; echo $$; ls /; cat /proc/self/status | grep -E 'CapEff|NoNewPrivs'; ulimit -n;"
        "echo x >/written; touch /proc/sys/x 2>/dev/null || echo readonly; exit 9"
    )
    spec = default_spec(["sh", "-c", script])
    code, out, err = run(tmp_path, bundle(spec), machine)
    assert code == 9, err
    lines = out.splitlines()
    assert lines[:2] == ["box", "1"]
    assert "upper" not in lines and "layers" not in lines and "bin" in lines
    assert "CapEff:\t00000000a80425fb" in lines
    assert "1000" in lines and "readonly" in lines


def test_what_was_written_stays_on_the_disk(tmp_path: Path, machine: Machine) -> None:
    out = ""
    for number, script in enumerate(("echo kept >/file", "cat /file")):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "disks").symlink_to(tmp_path / "disks")
        code, out, err = run(folder, bundle(default_spec(["sh", "-c", script])), machine)
        assert (code, err) == (0, "")
    assert out == "kept\n"


def test_the_network_is_set_up(tmp_path: Path, machine: Machine) -> None:
    spec = default_spec(["sh", "-c", "ip -o address; ip route; ip -6 route; ip link show eth0"])
    with OwnedFd(os.open("/dev/null", os.O_RDWR)) as tap:
        nic = Nic(
            "eth0",
            tap,
            "02:11:22:33:44:55",
            ("10.9.0.2/16", "10.9.1.2/24", "fd00:9::2/64"),
            (
                ("169.254.53.53/32", ""),
                ("0.0.0.0/0", "10.9.0.1"),
                ("::/0", "fd00:9::1"),
            ),
            1400,
        )
        code, out, err = run(tmp_path, bundle(spec, (nic,)), machine)
    assert (code, err) == (0, "")
    for text in (
        "inet 127.0.0.1/8",
        "inet 10.9.0.2/16 brd 10.9.255.255",
        "inet 10.9.1.2/24",
        "inet6 fd00:9::2/64",
        "default via 10.9.0.1 dev eth0",
        "default via fd00:9::1 dev eth0",
        "169.254.53.53 dev eth0",
        "mtu 1400",
        "02:11:22:33:44:55",
    ):
        assert text in out, out


def test_the_engines_files_are_written_inside(tmp_path: Path, machine: Machine) -> None:
    (tmp_path / "hosts").write_text("10.0.0.1 there\n")
    spec = default_spec(["sh", "-c", "cat /etc/hosts /extra; echo y >>/etc/hosts"])
    spec.mounts.append(Mount("/etc/hosts", str(tmp_path / "hosts"), "bind", ["rbind", "rprivate"]))
    spec.mounts.append(Mount("/extra", "/nowhere", "bind", ["bind", "ro"]))
    more = Machine(
        machine.layers,
        machine.upper,
        cgroups=False,
        sources={len(spec.mounts) - 1: Written(b"extra\n", 0o600)},
    )
    assert run(tmp_path, bundle(spec), more) == (0, "10.0.0.1 there\nextra\n", "")
    assert (tmp_path / "hosts").read_text() == "10.0.0.1 there\n"


def test_exec_is_inside(tmp_path: Path, machine: Machine) -> None:
    spec = default_spec(["sleep", "1000"])
    wanted = bundle(spec)
    planned = plan.start(wanted, machine, terminal=False)
    process = default_spec(["sh", "-c", "hostname; cat; ps | grep -c sleep; exit 4"]).process
    assert process is not None
    process.rlimits = [Rlimit("RLIMIT_NOFILE", 1000, 1000)]
    joined = plan.exec_(wanted, process, terminal=False, group="")
    with Monitor(tmp_path / "monitor", planned.frames, vmm=vmm(tmp_path)) as monitor:
        assert monitor.report().type == Type.STARTED
        running = monitor.exec(joined.frames)
        out, err = running.communicate(b"in\n", timeout=DEADLINE_S)
        assert (running.returncode, err) == (4, b"")
        assert out.startswith(b"box\nin\n")


def test_a_failed_step_is_named(tmp_path: Path, machine: Machine) -> None:
    broken = Machine(("/dev/null",), machine.upper, cgroups=False)
    planned = plan.start(bundle(default_spec(["true"])), broken, terminal=False)
    with Monitor(tmp_path / "monitor", planned.frames, vmm=vmm(tmp_path)) as monitor:
        frame = monitor.report()
        assert failure(frame, planned.steps).step == "mount erofs /dev/null on /layers/0"
        monitor.process.wait(DEADLINE_S)
        detail = json.loads((tmp_path / "monitor/detail").read_text())
        assert detail["reason"] == "not started"
