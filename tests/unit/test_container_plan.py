"""A container's launch program, read without running it."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bulkhead.boundaries.container_exec import exec_template
from bulkhead.boundaries.container_plan import Ground, Template, plan_launch
from bulkhead.boundaries.container_process import Filter, candidates
from bulkhead.boundaries.container_template import Templates, shape
from bulkhead.boundary.seam import Rootfs, Stdio
from bulkhead.errors import Invalid, Unsupported
from bulkhead.isolation import mounts, sysctl
from bulkhead.linux import mountinfo
from bulkhead.linux import mounts as kernel
from bulkhead.oci.runtime import (
    Capabilities,
    Linux,
    Mount,
    Namespace,
    Process,
    Root,
    Spec,
    User,
)

KINDS = ("mount", "network", "uts", "pid", "ipc", "cgroup")
GROUND = Ground(cgroup_version=1, views=("memory",), joins=2, available=frozenset({"CAP_CHOWN"}))
ROOTFS = Rootfs(("/layers/b", "/layers/a"), "/w/upper", "/w/work")
FILTER = Filter(b"\x06\0\0\0\0\0\xff\x7f", 0)


def spec_of(**process: object) -> Spec:
    wanted = Process(args=["sh"], env=["PATH=/bin"], capabilities=Capabilities(["CAP_CHOWN"]))
    for name, value in process.items():
        setattr(wanted, name, value)
    return Spec(
        root=Root("rootfs"),
        hostname="box",
        process=wanted,
        mounts=[
            Mount("/proc", "proc", "proc", ["nosuid"]),
            Mount("/dev", "tmpfs", "tmpfs", ["mode=755"]),
            Mount("/dev/pts", "devpts", "devpts", ["newinstance"]),
            Mount("/sys", "sysfs", "sysfs", ["ro"]),
            Mount("/sys/fs/cgroup", "cgroup", "cgroup", ["ro"]),
        ],
        linux=Linux(
            namespaces=[Namespace(kind) for kind in KINDS],  # type: ignore[arg-type]
            masked_paths=["/proc/kcore", "/sys/firmware"],
            readonly_paths=["/proc/sys"],
        ),
    )


def order(template: Template, *steps: str) -> list[int]:
    """Where each step first stands."""
    return [template.compiled.steps.index(step) for step in steps]


def test_order_of_a_launch() -> None:
    template = plan_launch(spec_of(), ROOTFS, GROUND, FILTER)
    found = order(
        template,
        "set standard input",
        "join the control group",
        "new cgroup namespace",
        "make mounts private",
        "mount overlay on /",
        "attach the root",
        "mount proc on /proc",
        "mount cgroup memory on /sys/fs/cgroup/memory",
        "mask /proc/kcore",
        "pivot the root",
        "let go of the host's files",
        "enter the working directory /",
        "close all other descriptors",
        "install the system call filter",
        "set capabilities",
        "execute the program",
    )
    assert found == sorted(found)
    assert template.compiled.steps[-1] == "execute the program"


def test_filter_is_last_with_no_new_privs() -> None:
    template = plan_launch(spec_of(no_new_privileges=True), ROOTFS, GROUND, FILTER)
    found = order(
        template, "set capabilities", "set no_new_privs", "install the system call filter"
    )
    assert found == sorted(found)


def test_ids_change_before_capabilities_and_after_the_bounding_set() -> None:
    template = plan_launch(spec_of(user=User(5, 6)), ROOTFS, GROUND)
    found = order(
        template,
        "drop CAP_SETUID from the bounding set",
        "set the supplementary groups",
        "become group 6",
        "keep capabilities across the change of user",
        "become user 5",
        "reset securebits",
        "set capabilities",
    )
    assert found == sorted(found)


def test_exec_is_undumpable_before_it_enters() -> None:
    process = Process(args=["sh"], env=["PATH=/bin"])
    template = exec_template(
        spec_of(), process, joins=1, terminal=True, filter_=FILTER, oom_score_adj=0
    )
    found = order(
        template,
        "become undumpable",
        "join the control group",
        "enter the container's namespaces",
        "enter the pid namespace",
        "verify the terminal's file system",
        "close all other descriptors",
        "execute the program",
    )
    assert found == sorted(found)


def test_shared_pid_namespace_is_undumpable_too() -> None:
    spec = spec_of()
    spec.linux.namespaces = [n for n in spec.linux.namespaces if n.type_ != "pid"]
    assert "become undumpable" in plan_launch(spec, ROOTFS, GROUND).compiled.steps
    assert "become undumpable" not in plan_launch(spec_of(), ROOTFS, GROUND).compiled.steps


def test_needs_a_mount_namespace() -> None:
    spec = spec_of()
    spec.linux.namespaces = [Namespace("pid")]
    with pytest.raises(Invalid, match="mount namespace"):
        plan_launch(spec, ROOTFS, GROUND)


def test_too_many_layers_for_an_old_kernel() -> None:
    lowers = tuple(f"/layers/{number}" for number in range(1100))
    ground = dataclasses.replace(GROUND, appends_layers=False)
    with pytest.raises(Unsupported, match="layers are more"):
        plan_launch(spec_of(), Rootfs(lowers, "/u", "/w"), ground)


def test_template_serves_two_containers() -> None:
    templates = Templates(None)
    first, second = spec_of(), spec_of(args=["ls", "-l"], env=["PATH=/usr/bin", "A=b"])
    second.hostname = "another"
    other = Rootfs(("/layers/d", "/layers/c"), "/v/upper", "/v/work")
    made = templates.launch(first, ROOTFS, GROUND, terminal=False)
    assert templates.launch(second, other, GROUND, terminal=False) is made
    data = made.fill(second, other, {"memory": "/sys/fs/cgroup/memory/x"}, Stdio())
    for text in (b"/layers/d", b"/v/upper", b"another", b"/usr/bin/ls", b"A=b", b"memory/x"):
        assert text in data
    assert len(made.template.compiled.steps) < 250


@pytest.mark.parametrize(
    "change",
    [
        lambda spec: setattr(spec.process, "cwd", "/tmp"),
        lambda spec: setattr(spec.process, "user", User(1, 1)),
        lambda spec: setattr(spec.process, "no_new_privileges", True),
        lambda spec: setattr(spec, "root", Root("rootfs", True)),
        lambda spec: setattr(spec, "domainname", "x"),
        lambda spec: spec.linux.masked_paths.append("/x"),
        lambda spec: spec.linux.sysctl.update({"net.x": "1"}),
        lambda spec: spec.mounts.append(Mount("/x", "/y", "bind", ["bind"])),
        lambda spec: spec.mounts[0].options.append("ro"),
        lambda spec: spec.linux.namespaces.pop(),
    ],
)
def test_template_is_not_shared_beyond_its_shape(change: object) -> None:
    assert callable(change)
    other = spec_of()
    change(other)
    assert shape(spec_of(), ROOTFS, GROUND, terminal=False) != shape(
        other, ROOTFS, GROUND, terminal=False
    )


def test_candidates() -> None:
    assert candidates(Process(args=["ls"], env=["PATH=/a:/b"])) == ["/a/ls", "/b/ls"]
    assert candidates(Process(args=["./ls"], env=["PATH=/a"])) == ["./ls"]
    assert candidates(Process(args=["ls"], env=["PATH=:/b"])) == ["./ls", "/b/ls"]
    assert "/usr/bin/ls" in candidates(Process(args=["ls"]))


def test_mount_options() -> None:
    parsed = mounts.parse(["rbind", "ro", "nosuid", "rslave", "noatime", "size=1m", "rw"])
    assert parsed.bind
    assert parsed.recursive_bind
    assert parsed.attributes == kernel.ATTR_NOSUID | kernel.ATTR_NOATIME
    assert parsed.clear & kernel.ATTR_RDONLY
    assert (parsed.propagation, parsed.recursive_propagation) == (kernel.MS_SLAVE, True)
    assert parsed.data == ("size=1m",)
    deep = mounts.parse(["rro", "rnosuid"])
    assert deep.recursive_attributes == kernel.ATTR_RDONLY | kernel.ATTR_NOSUID
    assert deep.attributes == 0


@given(st.lists(st.sampled_from(["ro", "rw", "nosuid", "suid", "noatime", "relatime", "x=y"])))
def test_the_last_option_wins(options: list[str]) -> None:
    parsed = mounts.parse(options)
    assert not parsed.attributes & parsed.clear & ~kernel.ATTR_ATIME
    for on, off, bit in (("ro", "rw", kernel.ATTR_RDONLY), ("nosuid", "suid", kernel.ATTR_NOSUID)):
        said = [option for option in options if option in (on, off)]
        assert bool(parsed.attributes & bit) == (bool(said) and said[-1] == on)


def test_sysctl_names() -> None:
    assert sysctl.path("net.ipv4.ip_forward") == "sys/net/ipv4/ip_forward"
    assert sysctl.path("net/ipv4/conf/eth0.1/forwarding") == "sys/net/ipv4/conf/eth0.1/forwarding"
    for name in ("net..x", "net/../kernel/x", "", "/etc/passwd"):
        with pytest.raises(Invalid):
            sysctl.path(name)
    sysctl.check({"net.core.somaxconn": "1"}, {"network"})
    with pytest.raises(Invalid, match="shares the network namespace"):
        sysctl.check({"net.core.somaxconn": "1"}, {"ipc"})


def test_mountinfo() -> None:
    text = (
        "36 35 98:0 /mnt1 /mnt\\0402 rw,noatime master:1 shared:2 - ext3 /dev/root rw,errors=x\n"
        "37 36 0:5 / /x ro - tmpfs none rw\n"
    )
    first, second = mountinfo.parse(text)
    assert (first.target, first.propagation) == ("/mnt 2", ("master:1", "shared:2"))
    assert first.super_options == ("rw", "errors=x")
    assert (second.fstype, second.options) == ("tmpfs", ("ro",))
