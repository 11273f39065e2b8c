"""What a create request may say, in Docker's words."""

from collections.abc import Mapping
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bulkhead.engine import body, filters, merge, mountpoints, names, options, security, signals
from bulkhead.engine.attach import detach_keys
from bulkhead.errors import BulkheadError, Invalid, Unsupported
from bulkhead.oci.image import ContainerConfig


def request(host: Mapping[str, object] | None = None, **config: Any) -> body.CreateBody:
    raw = {"Image": "x", **config, "HostConfig": host or {}}
    return msgspec.convert(raw, body.CreateBody)


GIB = 1 << 30


@pytest.mark.parametrize(
    ("host", "words"),
    [
        ({"Memory": 1024}, "Minimum memory limit allowed is 6MB"),
        ({"MemorySwap": GIB}, "You should always set the Memory limit"),
        ({"Memory": GIB, "MemorySwap": GIB // 2}, "Minimum memoryswap limit should be larger"),
        ({"Memory": GIB, "MemorySwappiness": 101}, "valid memory swappiness range is 0-100"),
        ({"Memory": GIB, "MemoryReservation": 2 * GIB}, "less than memory reservation limit"),
        ({"NanoCpus": 10**9, "CpuPeriod": 100000}, "Nano CPUs and CPU Period cannot both be set"),
        ({"NanoCpus": 10**15}, "range of CPUs is from 0.01 to"),
        ({"CpuPeriod": 10}, "CPU cfs period cannot be less than 1ms"),
        ({"CpuQuota": 10}, "CPU cfs quota cannot be less than 1ms"),
        ({"CpusetCpus": "a"}, "Invalid value a for cpuset cpus"),
        ({"CpusetCpus": "8000"}, "Requested CPUs are not available"),
        ({"BlkioWeight": 5}, "Range of blkio weight is from 10 to 1000"),
        ({"RestartPolicy": {"Name": "often"}}, "unknown policy 'often'"),
        ({"RestartPolicy": {"Name": "always", "MaximumRetryCount": 3}}, "only be used with"),
        ({"AutoRemove": True, "RestartPolicy": {"Name": "always"}}, "can't create 'AutoRemove'"),
        ({"PortBindings": {"0/tcp": []}}, "invalid port range"),
        ({"PortBindings": {"x": []}}, "invalid port specification"),
        ({"PortBindings": {"80/abc": []}}, "invalid proto: abc"),
        ({"PortBindings": {"80/tcp": [{"HostPort": "70000"}]}}, "invalid port specification"),
        ({"IpcMode": "other"}, "invalid IPC mode: other"),
        ({"PidMode": "container:"}, "invalid PID mode: container:"),
        ({"UTSMode": "x"}, "invalid UTS mode: x"),
        ({"OomScoreAdj": 2000}, "range for oom score adj is [-1000, 1000]"),
        ({"ShmSize": -1}, "SHM size can not be less than 0"),
        ({"LogConfig": {"Type": "gelf"}}, "no log driver named 'gelf'"),
        ({"LogConfig": {"Config": {"max-sizes": "1"}}}, "unknown log opt 'max-sizes'"),
        ({"LogConfig": {"Config": {"max-file": "0"}}}, "'max-file' cannot be less than 1"),
        ({"Ulimits": [{"Name": "files", "Soft": 1, "Hard": 1}]}, "invalid ulimit type: files"),
        ({"Ulimits": [{"Name": "nofile", "Soft": 9, "Hard": 1}]}, "ulimit soft limit must be"),
        ({"DeviceCgroupRules": ["x"]}, "invalid device cgroup rule"),
        ({"ExtraHosts": ["nope"]}, 'bad format for add-host: "nope"'),
        ({"NetworkMode": "host", "Sysctls": {"net.x": "1"}}, "not allowed in the host network"),
        (
            {"NetworkMode": "container:x", "PublishAllPorts": True},
            "port publishing and the container type network mode",
        ),
        ({"DeviceRequests": [{"Driver": "nvidia"}]}, "could not select device driver"),
        ({"StorageOpt": {"size": "1g"}}, "--storage-opt is not supported"),
    ],
)
def test_mistakes_in_host_options_are_named(host: dict[str, object], words: str) -> None:
    with pytest.raises((Invalid, Unsupported)) as caught:
        options.validate(request(host))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"Env": ["=x"]}, "invalid environment variable"),
        ({"WorkingDir": "here"}, "needs to be an absolute path"),
        ({"Hostname": "a b"}, "invalid hostname format"),
        ({"StopSignal": "SIGNOPE"}, "Invalid signal: SIGNOPE"),
        ({"Healthcheck": {"Test": ["X"]}}, 'Unknown type "X" in Healthcheck'),
        ({"Healthcheck": {"Test": ["CMD"]}}, "Missing command after CMD"),
        ({"Healthcheck": {"Test": ["CMD", "x"], "Interval": 5}}, "cannot be less than 1ms"),
        ({"Cmd": ["a\0b"]}, "NUL byte"),
    ],
)
def test_mistakes_in_the_configuration_are_named(config: dict[str, Any], words: str) -> None:
    with pytest.raises(Invalid) as caught:
        options.validate(request(**config))
    assert words in str(caught.value)


def test_a_plain_request_passes_without_warnings() -> None:
    assert options.validate(request({"Memory": GIB, "NanoCpus": 500_000_000}, Cmd=["true"])) == []


def test_published_ports_with_the_host_network_are_worth_a_warning() -> None:
    host = {"NetworkMode": "host", "PortBindings": {"80/tcp": [{"HostPort": "80"}]}}
    assert options.validate(request(host)) == [
        "Published ports are discarded when using host network mode"
    ]


def test_unknown_members_are_refused_with_their_path() -> None:
    with pytest.raises(msgspec.ValidationError, match=r"HostConfig"):
        msgspec.convert({"Image": "x", "HostConfig": {"Memmory": 1}}, body.CreateBody)


# --- mounts


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("/a", "invalid volume specification"),
        ("/a:b", "mount path must be absolute"),
        ("/a:/", "destination can't be '/'"),
        ("/a:/b:rx", "invalid mode: rx"),
        ("/a:/b:ro,rw", "invalid mode: ro,rw"),
        ("vol/x:/b", "includes invalid characters for a local volume name"),
        ("/a:/b:nocopy", "invalid mode: nocopy"),
        ("a:b:c:d", "invalid volume specification"),
    ],
)
def test_bad_volume_specifications(text: str, words: str) -> None:
    with pytest.raises(Invalid) as caught:
        mountpoints.parse_bind(text)
    assert words in str(caught.value)


def test_binds_and_volumes_are_told_apart() -> None:
    bind = mountpoints.parse_bind("/srv/data/:/data:ro,rslave")
    assert (bind.type_, bind.source, bind.rw, bind.propagation, bind.create) == (
        "bind", "/srv/data", False, "rslave", True,
    )  # fmt: skip
    volume = mountpoints.parse_bind("cache:/var//cache/")
    assert (volume.type_, volume.name, volume.destination) == ("volume", "cache", "/var/cache")


def test_a_missing_source_of_mount_is_named(tmp_path: object) -> None:
    missing = f"{tmp_path}/nothing"
    with pytest.raises(Invalid) as caught:
        mountpoints.parse_mount(body.Mount(type_="bind", source=missing, target="/x"))
    assert str(caught.value) == (
        f'invalid mount config for type "bind": bind source path does not exist: {missing}'
    )


@pytest.mark.parametrize(
    ("mount", "words"),
    [
        ({"Type": "bind", "Target": "/x"}, "field Source must not be empty"),
        ({"Type": "bind", "Source": "/", "Target": ""}, "field Target must not be empty"),
        ({"Type": "tmpfs", "Source": "/a", "Target": "/x"}, "field Source must not be specified"),
        ({"Type": "volume", "Target": "x"}, "mount path must be absolute"),
        ({"Type": "nfs", "Target": "/x"}, 'mount type unknown: "nfs"'),
        (
            {"Type": "volume", "Target": "/x", "VolumeOptions": {"Subpath": "../y"}},
            "subpath must be a relative path",
        ),
    ],
)
def test_bad_mounts(mount: dict[str, object], words: str) -> None:
    with pytest.raises(Invalid) as caught:
        mountpoints.parse_mount(msgspec.convert(mount, body.Mount))
    assert words in str(caught.value)


def test_tmpfs_options_override_the_defaults() -> None:
    point = mountpoints.parse_tmpfs("/run", "exec,size=1m,ro")
    assert set(point.options) == {"nosuid", "nodev", "exec", "size=1m", "ro"}
    assert point.rw is False
    with pytest.raises(Invalid, match="invalid tmpfs option"):
        mountpoints.parse_tmpfs("/run", "sizes=1m")


def test_mounts_are_ordered_and_unique() -> None:
    host = body.HostConfig(binds=["a1:/x/y", "b1:/x"], tmpfs={"/x/y/z": ""})
    points = mountpoints.resolve(host, ["/x", "/w"], lambda name: [])
    assert [p.destination for p in points] == ["/x", "/w", "/x/y", "/x/y/z"]
    assert [p.anonymous for p in points] == [False, True, False, False]
    with pytest.raises(Invalid, match="Duplicate mount point: /x"):
        mountpoints.resolve(body.HostConfig(binds=["a1:/x", "b1:/x/"]), [], lambda name: [])


@given(st.text(max_size=30))
def test_any_volume_text_is_parsed_or_refused(text: str) -> None:
    try:
        point = mountpoints.parse_bind(text)
    except Invalid:
        return
    assert point.destination.startswith("/")
    assert point.destination != "/"
    assert ".." not in point.destination.split("/")


# --- merging


def merged(image: ContainerConfig, **config: Any) -> body.Config:
    return merge.config(request(**config), image)


def test_entrypoint_and_command_follow_dockers_rules() -> None:
    image = ContainerConfig(entrypoint=["/entry"], cmd=["default"])
    assert merge.command(merged(image)) == ["/entry", "default"]
    assert merge.command(merged(image, Cmd=["own"])) == ["/entry", "own"]
    assert merge.command(merged(image, Entrypoint=["/mine"], Cmd=["x"])) == ["/mine", "x"]
    assert merge.command(merged(image, Entrypoint=["/mine"])) == ["/mine"]
    assert merge.command(merged(image, Entrypoint=[""], Cmd=["x"])) == ["x"]
    assert merge.command(merged(image, Cmd="one word")) == ["/entry", "one word"]
    with pytest.raises(Invalid, match="no command specified"):
        merge.command(merged(ContainerConfig()))


def test_the_requests_variables_win_over_the_images() -> None:
    image = ContainerConfig(env=["A=image", "B=image"], labels={"l": "image", "m": "image"})
    config = merged(image, Env=["A=own"], Labels={"l": "own"})
    assert config.env == ["A=own", "B=image"]
    assert config.labels == {"l": "own", "m": "image"}


def test_port_ranges_are_taken_apart() -> None:
    host = body.HostConfig(
        port_bindings={"8000-8002/udp": [body.PortBinding(host_port="9000-9002")]}
    )
    merge.complete_ports(host)
    ports = {
        key: [one.host_port for one in found or ()]
        for key, found in (host.port_bindings or {}).items()
    }
    assert ports == {"8000/udp": ["9000"], "8001/udp": ["9001"], "8002/udp": ["9002"]}
    uneven = body.HostConfig(port_bindings={"1-3": [body.PortBinding(host_port="5-6")]})
    with pytest.raises(Invalid, match="invalid ranges specified"):
        merge.complete_ports(uneven)


def test_host_defaults_are_dockers() -> None:
    host = body.HostConfig(memory=64 << 20)
    merge.host(host, "container")
    assert host.memory_swap == 128 << 20
    assert (host.network_mode, host.ipc_mode, host.shm_size) == ("bridge", "private", 64 << 20)
    assert "/proc/kcore" in (host.masked_paths or [])
    privileged = body.HostConfig(privileged=True)
    merge.host(privileged, "container")
    assert privileged.masked_paths == []


# --- words


@pytest.mark.parametrize(
    ("text", "number"),
    [("TERM", 15), ("SIGKILL", 9), ("15", 15), ("rtmin+3", 37), ("SIGRTMAX", 64)],
)
def test_signals_have_names_and_numbers(text: str, number: int) -> None:
    assert signals.number(text) == number


@pytest.mark.parametrize("text", ["", "0", "65", "NOPE", "RTMIN+99"])
def test_unknown_signals_are_refused(text: str) -> None:
    with pytest.raises(Invalid, match="Invalid signal"):
        signals.number(text)


def test_security_options_are_checked() -> None:
    parsed = security.parse(["no-new-privileges", "seccomp=unconfined", "apparmor=x"])
    assert parsed.no_new_privileges
    assert (parsed.seccomp, parsed.apparmor) == ("unconfined", "x")
    assert security.parse(["no-new-privileges:false"]).no_new_privileges is False
    for wrong in ("nonsense", "what=ever", "seccomp={", "no-new-privileges=maybe"):
        with pytest.raises(Invalid):
            security.parse([wrong])


def test_detach_keys() -> None:
    assert detach_keys("") == b"\x10\x11"
    assert detach_keys("ctrl-a,x,ctrl-[") == b"\x01x\x1b"
    with pytest.raises(Invalid):
        detach_keys("ctrl-pp")


def test_names_are_checked_and_invented() -> None:
    assert names.check("/web-1") == "web-1"
    for wrong in ("", "-x", "a b", "a/b", "é"):
        with pytest.raises(Invalid):
            names.check(wrong)
    assert names.check(names.invent(set())) != ""
    assert len(names.new_id()) == 64


def test_sizes() -> None:
    assert options.size("10m") == 10 << 20
    assert options.size("1.5KiB") == 1536
    with pytest.raises(Invalid):
        options.size("ten")


@pytest.mark.parametrize(
    ("text", "nanoseconds"),
    [
        ("1700000000", 1700000000 * 10**9),
        ("1700000000.25", 1700000000 * 10**9 + 250_000_000),
        ("2023-11-14T22:13:20Z", 1700000000 * 10**9),
        ("2023-11-14T22:13:20.000000007Z", 1700000000 * 10**9 + 7),
        ("2023-11-14T23:13:20+01:00", 1700000000 * 10**9),
    ],
)
def test_moments(text: str, nanoseconds: int) -> None:
    assert filters.moment_ns(text) == nanoseconds


@given(st.text(max_size=20))
def test_any_moment_is_understood_or_refused(text: str) -> None:
    try:
        filters.moment_ns(text)
    except BulkheadError as error:
        assert isinstance(error, Invalid)


def test_filters_are_normalised() -> None:
    allowed = frozenset({"label", "name"})
    assert filters.normalise({"label": {"a": True, "b": False}}, allowed) == {"label": ["a"]}
    assert filters.normalise({"name": ["x"]}, allowed) == {"name": ["x"]}
    with pytest.raises(Invalid, match="invalid filter 'nope'"):
        filters.normalise({"nope": ["x"]}, allowed)
