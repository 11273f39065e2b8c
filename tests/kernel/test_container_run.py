"""Containers on this kernel: what a configuration asks for is what the process finds."""

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from bulkhead.boundaries.container_plan import Ground, plan_launch
from bulkhead.boundary.seam import Measured, Pausable, Rootfs, Updatable
from bulkhead.errors import Conflict, Invalid, LaunchFailed, NotFound, Unsupported
from bulkhead.isolation import capabilities
from bulkhead.isolation.seccomp import profile
from bulkhead.linux import mountinfo, mounts, namespaces, overlayfs, procfs
from bulkhead.linux.capabilities import NUMBERS
from bulkhead.oci.runtime import (
    Capabilities,
    CPUAffinity,
    Device,
    Hooks,
    Memory,
    Mount,
    Namespace,
    NetDevice,
    Pids,
    Process,
    Resources,
    Rlimit,
    Root,
    Spec,
    TimeOffset,
    User,
)
from tests.helpers.container_lab import SAFE, Lab, cannot_run, default_spec
from tests.helpers.residue import residue
from tests.helpers.waiting import until

WHY_NOT = cannot_run()
pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=f"no containers here: {WHY_NOT}")


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with Lab(tmp_path_factory.mktemp("run")) as made:
        yield made


def process(spec: Spec) -> Process:
    assert spec.process is not None
    return spec.process


def test_output_and_exit_code(lab: Lab) -> None:
    result = lab.shell("echo out; echo err >&2; exit 3")
    assert (result.code, result.out, result.err) == (3, "out\n", "err\n")


def test_killed_by_a_signal(lab: Lab) -> None:
    running = lab.start(["sleep", "1000"])
    lab.do(running.container.kill(signal.SIGKILL))
    assert running.wait().code == -signal.SIGKILL
    lab.do(running.container.delete())
    with pytest.raises(NotFound):
        lab.do(running.container.kill(signal.SIGTERM))


def test_namespaces_are_new(lab: Lab) -> None:
    running = lab.start(["sleep", "1000"])
    for kind in ("mount", "network", "uts", "pid", "ipc", "cgroup"):
        own = namespaces.identity(running.pid, kind)
        assert own != namespaces.identity("self", kind), kind
        inside = running.start_exec(["sleep", "1000"])
        assert namespaces.identity(inside.pid, kind) == own, kind
        os.kill(inside.pid, signal.SIGKILL)
        inside.wait()
    assert namespaces.identity(running.pid, "user") == namespaces.identity("self", "user")
    running.kill()


def test_namespaces_of_the_host_and_of_another(lab: Lab) -> None:
    first = lab.start(["sleep", "1000"])

    def change(spec: Spec) -> None:
        keep = ("mount", "uts", "cgroup")
        spec.linux.namespaces = [n for n in spec.linux.namespaces if n.type_ in keep]
        spec.linux.namespaces.append(Namespace("network", f"/proc/{first.pid}/ns/net"))
        spec.linux.namespaces.append(Namespace("ipc", f"/proc/{first.pid}/ns/ipc"))

    second = lab.start(["sleep", "1000"], change)
    assert namespaces.identity(second.pid, "network") == namespaces.identity(first.pid, "network")
    assert namespaces.identity(second.pid, "ipc") == namespaces.identity(first.pid, "ipc")
    assert namespaces.identity(second.pid, "pid") == namespaces.identity("self", "pid")
    second.kill()
    first.kill()


def test_pid_namespace_of_another(lab: Lab) -> None:
    first = lab.start(["sleep", "1000"])

    def change(spec: Spec) -> None:
        spec.linux.namespaces = [n for n in spec.linux.namespaces if n.type_ != "pid"]
        spec.linux.namespaces.append(Namespace("pid", f"/proc/{first.pid}/ns/pid"))

    assert lab.shell("ps | grep -c '[s]leep 1000'; echo $$", change).out.split()[0] == "1"
    first.kill()


def test_names(lab: Lab) -> None:
    def change(spec: Spec) -> None:
        spec.hostname, spec.domainname = "web-1", "example.org"

    result = lab.shell("hostname; cat /proc/sys/kernel/domainname", change)
    assert result.out.split() == ["web-1", "example.org"]


@pytest.mark.skipif(
    "time" not in namespaces.supported(), reason="this kernel has no time namespaces"
)
def test_time_namespace(lab: Lab) -> None:
    def change(spec: Spec) -> None:
        spec.linux.namespaces.append(Namespace("time"))
        spec.linux.time_offsets = {"boottime": TimeOffset(1_000_000, 0)}

    host = float(Path("/proc/uptime").read_text().split()[0])
    assert float(lab.shell("cat /proc/uptime", change).out.split()[0]) >= host + 1_000_000


@pytest.mark.skipif("time" in namespaces.supported(), reason="this kernel has time namespaces")
def test_a_namespace_the_kernel_lacks_is_refused(lab: Lab) -> None:
    with pytest.raises(Unsupported, match="no time namespaces: use one built with CONFIG_TIME_NS"):
        lab.run(["true"], lambda spec: spec.linux.namespaces.append(Namespace("time")))


def test_exec_on_one_processor(lab: Lab) -> None:
    cpu = min(os.sched_getaffinity(0))
    running = lab.start(["sleep", "1000"])
    wanted = CPUAffinity(initial=str(cpu), final=f"{cpu}-{cpu}")
    shown = running.exec(
        ["grep", "Cpus_allowed_list", "/proc/self/status"], exec_cpu_affinity=wanted
    )
    assert shown.out.split() == ["Cpus_allowed_list:", str(cpu)]
    with pytest.raises(Invalid, match="not a list of processors"):
        running.exec(["true"], exec_cpu_affinity=CPUAffinity(final="1-0"))
    with pytest.raises(LaunchFailed, match="run on processors 4095: Invalid argument"):
        running.exec(["true"], exec_cpu_affinity=CPUAffinity(final="4095"))
    running.kill()


def test_root_is_an_overlay_that_forgets(lab: Lab) -> None:
    rootfs = lab.rootfs("overlay")
    assert lab.shell("echo x > /new; rm /etc/group; ls /etc", rootfs=rootfs).out == "passwd\n"
    assert (lab.image / "etc/group").exists()
    assert not (lab.image / "new").exists()
    assert rootfs.upper is not None
    assert (Path(rootfs.upper) / "new").read_text() == "x\n"
    # A second start on the same upper layer goes on from there.
    assert lab.shell("cat /new; ls /etc", rootfs=rootfs).out == "x\npasswd\n"


def test_overlay_of_many_layers(lab: Lab, tmp_path: Path) -> None:
    lowers = [str(lab.image)]
    for number in range(100):
        layer = tmp_path / f"a-layer-with-a-long-name-{number:060}"
        layer.mkdir()
        (layer / f"file{number}").write_text(str(number))
        (layer / "same").write_text(str(number))
        lowers.insert(0, str(layer))
    result = lab.shell("cat /file0 /file99 /same", rootfs=lab.rootfs("many", lowers))
    assert result.out == "09999"


@pytest.mark.parametrize("layers", [1, 100])
def test_overlay_where_the_kernel_cannot_append(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layers: int
) -> None:
    """Kernels before 6.8: the same overlay from one page of options."""
    monkeypatch.setattr(overlayfs, "appends_layers", lambda: False)
    lowers = [str(lab.image)]
    for number in range(layers):
        layer = tmp_path / f"a-layer-with-a-long-name-{number:060}"
        layer.mkdir()
        (layer / "same").write_text(str(number))
        lowers.insert(0, str(layer))
    rootfs = lab.rootfs(f"old{layers}", lowers)
    result = lab.shell("cat /same; echo x > /new; grep -c overlay /proc/mounts", rootfs=rootfs)
    assert result.out == f"{layers - 1}1\n"
    assert rootfs.upper is not None
    assert (Path(rootfs.upper) / "new").exists()


def test_root_is_a_directory(lab: Lab, tmp_path: Path) -> None:
    result = lab.shell("echo x > /tmp/from-inside", rootfs=Rootfs(directory=str(lab.image)))
    assert result.code == 0
    assert (lab.image / "tmp/from-inside").read_text() == "x\n"
    (lab.image / "tmp/from-inside").unlink()


def test_read_only_root(lab: Lab) -> None:
    def change(spec: Spec) -> None:
        spec.root = Root("rootfs", True)

    result = lab.shell("touch /x; touch /tmp/x; touch /dev/shm/x && echo shm", change)
    assert result.out == "shm\n"
    assert result.err.count("Read-only") == 2


def test_mount_table(lab: Lab) -> None:
    running = lab.start(["sleep", "1000"])
    found = {m.target: m for m in mountinfo.read(running.pid)}
    assert found["/"].fstype == "overlay"
    assert {"redirect_dir=nofollow"} <= set(found["/"].super_options)
    assert set(SAFE) | {"ro"} <= set(found["/sys"].options)
    assert set(SAFE) | {"rw"} <= set(found["/proc"].options)
    assert set(SAFE) <= set(found["/dev/mqueue"].options)
    assert {"nosuid", "noexec"} <= set(found["/dev/pts"].options)
    assert "nodev" not in found["/dev"].options
    assert "size=65536k" in found["/dev/shm"].super_options
    assert all(not m.propagation for m in found.values())
    # Nothing of the host is left to unmount, and nothing is mounted twice.
    targets = [m.target for m in mountinfo.read(running.pid)]
    assert len(targets) == len(set(targets))
    running.kill()


def test_cgroup_view_is_the_containers_own(lab: Lab) -> None:
    def change(spec: Spec) -> None:
        spec.linux.resources = Resources(memory=Memory(limit=64 << 20), pids=Pids(50))

    script = (
        "cat /sys/fs/cgroup/memory/memory.limit_in_bytes /sys/fs/cgroup/pids/pids.max"
        " || cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/pids.max"
    )
    assert lab.shell(script, change).out.split() == [str(64 << 20), "50"]


def test_bind_mounts(lab: Lab, tmp_path: Path) -> None:
    for name in ("rw", "ro", "flags"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    (tmp_path / "hosts").write_text("127.0.0.1 localhost\n")

    def change(spec: Spec) -> None:
        spec.mounts += [
            Mount("/a/rw", str(tmp_path / "rw"), "bind", ["rbind", "rprivate"]),
            Mount("/a/ro", str(tmp_path / "ro"), "bind", ["rbind", "ro", "rprivate"]),
            Mount("/a/flags", str(tmp_path / "flags"), "bind", ["bind", "nosuid", "noexec"]),
            Mount("/etc/hosts", str(tmp_path / "hosts"), "bind", ["rbind", "rprivate"]),
        ]

    script = "cat /a/*/file /etc/hosts; echo new > /a/rw/new; echo new > /a/ro/new"
    result = lab.shell(f"{script}; grep /a/flags /proc/mounts", change)
    assert result.out.startswith("flagsrorw127.0.0.1 localhost\n")
    assert (tmp_path / "rw/new").read_text() == "new\n"
    assert not (tmp_path / "ro/new").exists()
    assert "nosuid" in result.out
    assert "noexec" in result.out


def test_bind_of_a_missing_source(lab: Lab, tmp_path: Path) -> None:
    def change(spec: Spec) -> None:
        spec.mounts.append(Mount("/x", str(tmp_path / "none"), "bind", ["rbind"]))

    with pytest.raises(Invalid, match="bind source path does not exist"):
        lab.shell("true", change)


def test_recursive_read_only(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    with contextlib.ExitStack() as undo:
        mounts.mount("tmpfs", str(tmp_path / "sub"), "tmpfs")
        undo.callback(mounts.unmount, str(tmp_path / "sub"))

        def change(spec: Spec, option: str = "ro") -> None:
            spec.mounts.append(Mount("/a", str(tmp_path), "bind", ["rbind", option]))

        shallow = lab.shell("touch /a/x; touch /a/sub/x && echo written", change)
        deep = lab.shell("touch /a/x; touch /a/sub/x", lambda spec: change(spec, "rro"))
    assert shallow.out == "written\n"
    assert shallow.err.count("Read-only") == 1
    assert deep.err.count("Read-only") == 2


def test_tmpfs_options(lab: Lab) -> None:
    def change(spec: Spec) -> None:
        spec.mounts += [
            Mount("/run", "tmpfs", "tmpfs", [*SAFE, "mode=700", "size=1m", "uid=1000"]),
            Mount("/run/locked", "tmpfs", "tmpfs", ["ro"]),
        ]

    result = lab.shell("stat -c '%a %u' /run; df -k /run | tail -1; touch /run/locked/x", change)
    assert result.out.startswith("700 1000\n")
    assert " 1024 " in result.out
    assert "Read-only" in result.err


def test_user_groups_umask_directory(lab: Lab) -> None:
    def change(spec: Spec) -> None:
        process(spec).user = User(1000, 1000, umask=0o027, additional_gids=[10, 20])
        process(spec).cwd = "/srv/made/for/it"

    result = lab.shell("id; umask; pwd; stat -c '%u %a' .", change)
    assert result.out.splitlines() == [
        "uid=1000(alice) gid=1000(alice) groups=10(wheel),20",
        "0027",
        "/srv/made/for/it",
        "0 755",
    ]


def test_capabilities(lab: Lab) -> None:
    some = ["CAP_CHOWN", "CAP_NET_RAW"]

    def change(spec: Spec) -> None:
        process(spec).user = User(1000, 1000)
        process(spec).capabilities = Capabilities(some, some, some, some, some)

    result = lab.shell("grep ^Cap /proc/self/status", change)
    assert {line.split()[1] for line in result.out.splitlines()} == {"0000000000002001"}


def test_root_has_dockers_capabilities(lab: Lab) -> None:
    result = lab.shell("grep -e ^CapEff -e ^CapBnd /proc/self/status")
    wanted = 0
    for name in capabilities.select():
        wanted |= 1 << NUMBERS[name]
    assert [int(line.split()[1], 16) for line in result.out.splitlines()] == [wanted, wanted]


@pytest.mark.parametrize("confined", [True, False])
def test_system_call_filter(lab: Lab, confined: bool) -> None:
    def change(spec: Spec) -> None:
        spec.linux.seccomp = profile.default_for(frozenset(capabilities.select()))
        process(spec).no_new_privileges = confined
        process(spec).user = User(1000, 1000)

    result = lab.shell("grep -e ^Seccomp: -e ^NoNew /proc/self/status; unshare -U true", change)
    assert result.out.split() == ["NoNewPrivs:", str(int(confined)), "Seccomp:", "2"]
    assert "Operation not permitted" in result.err


def test_limits(lab: Lab) -> None:
    def change(spec: Spec) -> None:
        process(spec).rlimits = [
            Rlimit("RLIMIT_NOFILE", 20, 30),
            Rlimit("RLIMIT_CORE", 0, 2**64 - 1),
        ]

    result = lab.shell("ulimit -n; ulimit -Hn; ulimit -c; ulimit -Hc", change)
    assert result.out.split() == ["20", "30", "0", "unlimited"]


def test_oom_score(lab: Lab) -> None:
    def change(spec: Spec) -> None:
        process(spec).oom_score_adj = 500

    assert lab.shell("cat /proc/self/oom_score_adj", change).out == "500\n"


def test_sysctls(lab: Lab) -> None:
    def change(spec: Spec) -> None:
        spec.linux.sysctl = {
            "net.ipv4.ip_forward": "1",
            "kernel.msgmax": "4096",
            "net/ipv4/conf/lo/forwarding": "0",
        }

    result = lab.shell("cat /proc/sys/net/ipv4/ip_forward /proc/sys/kernel/msgmax", change)
    assert result.out.split() == ["1", "4096"]
    assert Path("/proc/sys/kernel/msgmax").read_text() != "4096\n"


def test_sysctl_of_the_host_is_refused(lab: Lab) -> None:
    def change(spec: Spec) -> None:
        spec.linux.sysctl = {"kernel.panic": "1"}

    with pytest.raises(Invalid, match="not in a separate kernel namespace"):
        lab.shell("true", change)


def test_devices(lab: Lab) -> None:
    def change(spec: Spec) -> None:
        spec.linux.devices = [
            Device("/dev/my/zero", "c", 1, 5, 0o640, 1000, 10),
            Device("/opt/pipe", "p", file_mode=0o600),
        ]

    script = "stat -c '%F %t:%T %a %u %g' /dev/my/zero; head -c 3 /dev/my/zero | wc -c; ls -l /opt"
    result = lab.shell(script, change)
    assert result.out.startswith("character special file 1:5 640 1000 10\n3\n")
    assert "prw-------" in result.out


def test_standard_devices_and_links(lab: Lab) -> None:
    script = "for n in null zero full random urandom tty; do stat -c '%n %a %F' /dev/$n; done"
    result = lab.shell(f"{script}; for l in fd stdin ptmx; do readlink /dev/$l; done; ls /dev")
    assert result.out.count(" 666 character special file") == 6
    assert "/proc/self/fd\n/proc/self/fd/0\npts/ptmx\n" in result.out
    assert "console" not in result.out


def test_privileged(lab: Lab) -> None:
    everything = list(capabilities.select(privileged=True))

    def change(spec: Spec) -> None:
        process(spec).capabilities = Capabilities(everything, everything, everything)
        spec.linux.masked_paths = []
        spec.linux.readonly_paths = []
        for mount in spec.mounts:
            mount.options = [o for o in mount.options if o != "ro"]

    result = lab.shell("mount -t tmpfs none /tmp && echo mounted; cat /proc/keys | wc -l", change)
    assert result.out.startswith("mounted\n")


def test_exec(lab: Lab) -> None:
    running = lab.start(["sleep", "1000"])
    result = running.exec(
        ["sh", "-c", "echo $A; pwd; id -u; exit 7"],
        env=["PATH=/bin", "A=b c"],
        cwd="/tmp",
        user=User(1000, 1000),
    )
    assert (result.code, result.out) == (7, "b c\n/tmp\n1000\n")
    same = running.exec(["cat", "/proc/self/cgroup"]).out
    assert same == running.exec(["cat", "/proc/1/cgroup"]).out
    inside = running.start_exec(["sleep", "1000"])
    assert inside.pid in running.container.processes()
    running.kill()
    assert inside.wait().code == -signal.SIGKILL
    with pytest.raises(Conflict, match="is not running"):
        running.exec(["true"])


def test_exec_with_its_own_rights(lab: Lab) -> None:
    def change(spec: Spec) -> None:
        spec.linux.seccomp = profile.default_for(frozenset(capabilities.select()))

    running = lab.start(["sleep", "1000"], change)
    result = running.exec(["grep", "-e", "^CapEff", "-e", "^Seccomp:", "/proc/self/status"])
    first = procfs.status(running.pid)
    assert f"CapEff:\t{first['CapEff']}\nSeccomp:\t2\n" == result.out
    running.kill()


def test_exec_into_a_missing_directory(lab: Lab) -> None:
    running = lab.start(["sleep", "1000"])
    with pytest.raises(LaunchFailed, match="/no/such"):
        running.exec(["true"], cwd="/no/such")
    running.kill()


def test_pause_update_measure(lab: Lab) -> None:
    running = lab.start(["sh", "-c", "while :; do sleep 0.01; done"])
    container = running.container
    assert isinstance(container, Pausable)
    assert isinstance(container, Updatable)
    assert isinstance(container, Measured)
    lab.do(container.pause())
    assert container.state().status == "paused"
    with pytest.raises(Conflict, match="is paused"):
        running.exec(["true"])
    lab.do(container.resume())
    assert container.state().status == "running"
    lab.do(container.update(Resources(pids=Pids(77))))
    assert container.stats()["pids_stats"]["limit"] == 77
    assert container.oom_kills() == 0
    running.kill()


def test_a_frozen_container_can_be_killed(lab: Lab) -> None:
    running = lab.start(["sleep", "1000"])
    container = running.container
    assert isinstance(container, Pausable)
    lab.do(container.pause())
    lab.do(container.kill(signal.SIGKILL))
    assert running.wait().code == -signal.SIGKILL
    lab.do(container.delete(force=True))


def test_load_after_a_restart(lab: Lab) -> None:
    running = lab.start(["sleep", "1000"])
    loaded = lab.do(lab.boundary.load(running.container.bundle, running.pid))
    assert loaded.state().status == "running"
    assert loaded.state().pid == running.pid
    stranger = lab.do(lab.boundary.load(running.container.bundle, os.getpid()))
    assert stranger.state().status == "created"
    with pytest.raises(Conflict, match="is running"):
        lab.do(loaded.delete())
    lab.do(loaded.kill(signal.SIGKILL))
    running.wait()
    until(lambda: loaded.state().status == "stopped", "the loaded container is seen to end")
    lab.do(loaded.delete())
    lab.do(running.container.delete())


def test_start_again(lab: Lab) -> None:
    running = lab.start(["true"])
    running.wait()
    lab._exits.pop(running.id)
    lab._launch(running.container, running.id, None)
    assert lab.wait(running.id) == 0
    lab.do(running.container.delete())


@pytest.mark.parametrize(
    ("member", "value"),
    [
        ("hooks", Hooks()),
        ("linux.netDevices", None),
        ("linux.mountLabel", None),
        ("a terminal", None),
    ],
)
def test_what_is_not_supported_is_refused(lab: Lab, member: str, value: Hooks | None) -> None:
    def change(spec: Spec) -> None:
        if member == "hooks":
            spec.hooks = value
        elif member == "linux.netDevices":
            spec.linux.net_devices = {"eth0": NetDevice()}
        elif member == "linux.mountLabel":
            spec.linux.mount_label = "system_u:object_r:container_file_t:s0"

    if member == "a terminal":
        spec = default_spec(["true"])
        spec.mounts = [m for m in spec.mounts if m.destination != "/dev/pts"]
        with pytest.raises(Unsupported, match="a terminal needs"):
            plan_launch(spec, lab.rootfs("refused"), Ground(), terminal=True)
        return
    with pytest.raises(Unsupported, match=member):
        lab.shell("true", change)


def test_failing_step_is_named(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")

    def change(spec: Spec) -> None:
        spec.mounts.append(Mount("/bin", str(tmp_path / "file"), "bind", ["bind"]))

    with pytest.raises(LaunchFailed) as caught:
        lab.shell("true", change)
    assert caught.value.step == "bind a host path on /bin"
    assert caught.value.errno != 0


def test_plan_is_readable(lab: Lab) -> None:
    spec = default_spec(["sh"])
    bundle = lab.create(spec).bundle
    lines = lab.boundary.plan(bundle)
    text = "\n".join(lines)
    for step in ("new pid namespace", "mount overlay on /", "mask /proc/kcore", "pivot the root"):
        assert step in text


def test_nothing_remains(tmp_path: Path) -> None:
    with residue(str(tmp_path), f"bulkhead-lab{os.getpid()}"), Lab(tmp_path) as lab:
        lab.shell("echo hello")
        running = lab.start(["sleep", "1000"])
        running.exec(["true"])
        running.kill()
