"""The runtime specification's types: names, validation, agreement with the published schema."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bulkhead.errors import Invalid
from bulkhead.oci import runtime
from bulkhead.oci.runtime import (
    CPU,
    BlockIO,
    Capabilities,
    ConsoleSize,
    Device,
    DeviceCgroup,
    Hook,
    Hooks,
    HugepageLimit,
    IDMapping,
    Linux,
    Memory,
    Mount,
    Namespace,
    Pids,
    Process,
    Resources,
    Rlimit,
    Root,
    Seccomp,
    Spec,
    Syscall,
    SyscallArg,
    ThrottleDevice,
    TimeOffset,
    User,
    WeightDevice,
)

SCHEMAS = Path(__file__).parents[3] / "shared/spec/oci-runtime"


def full() -> Spec:
    """A configuration that uses nearly every member."""
    mapping = [IDMapping(0, 100000, 65536)]
    return Spec(
        root=Root("rootfs", True),
        hostname="box",
        domainname="example.org",
        process=Process(
            cwd="/srv",
            args=["sh"],
            env=["A=b"],
            terminal=True,
            console_size=ConsoleSize(24, 80),
            user=User(1, 2, 0o22, [3, 4]),
            capabilities=Capabilities(["CAP_CHOWN"], ["CAP_CHOWN"]),
            rlimits=[Rlimit("RLIMIT_NOFILE", 1, 2**64 - 1)],
            no_new_privileges=True,
            oom_score_adj=-5,
        ),
        mounts=[Mount("/x", "/y", "bind", ["rbind", "ro"], mapping, mapping)],
        hooks=Hooks(prestart=[Hook("/bin/true", ["true"], timeout=1)]),
        annotations={"a": "b"},
        linux=Linux(
            namespaces=[
                Namespace("user"),
                Namespace("uts"),
                Namespace("time"),
                Namespace("network", "/proc/1/ns/net"),
            ],
            uid_mappings=mapping,
            gid_mappings=mapping,
            devices=[Device("/dev/fuse", "c", 10, 229, 0o666, 0, 0)],
            cgroups_path="/bulkhead/x",
            resources=Resources(
                devices=[DeviceCgroup(False, access="rwm")],
                memory=Memory(limit=1 << 30, swap=-1, disable_oom_killer=True, kernel_tcp=1),
                cpu=CPU(shares=512, quota=-1, cpus="0-1"),
                pids=Pids(10),
                block_io=BlockIO(
                    weight=10,
                    weight_device=[WeightDevice(8, 0, 10)],
                    throttle_read_iops_device=[ThrottleDevice(8, 0, 5)],
                ),
                hugepage_limits=[HugepageLimit("2MB", 1)],
                unified={"memory.high": "1"},
            ),
            seccomp=Seccomp(
                "SCMP_ACT_ERRNO",
                architectures=["SCMP_ARCH_X86_64"],
                syscalls=[
                    Syscall(["read"], "SCMP_ACT_ALLOW", args=[SyscallArg(0, 1, "SCMP_CMP_EQ")])
                ],
            ),
            sysctl={"net.ipv4.ip_forward": "1"},
            masked_paths=["/proc/kcore"],
            readonly_paths=["/proc/sys"],
            rootfs_propagation="slave",
            time_offsets={"boottime": TimeOffset(1, 2)},
        ),
    )


def test_survives_writing_and_reading() -> None:
    assert runtime.decode(runtime.encode(full())) == full()


def test_names_are_exact() -> None:
    written = json.loads(runtime.encode(full()))
    assert written["process"]["user"]["additionalGids"] == [3, 4]
    assert written["linux"]["uidMappings"][0] == {
        "containerID": 0,
        "hostID": 100000,
        "size": 65536,
    }
    resources = written["linux"]["resources"]
    assert resources["blockIO"]["throttleReadIOPSDevice"] == [{"major": 8, "minor": 0, "rate": 5}]
    assert resources["memory"]["disableOOMKiller"] is True
    assert resources["memory"]["kernelTCP"] == 1
    assert resources["hugepageLimits"] == [{"pageSize": "2MB", "limit": 1}]


def test_defaults_are_not_written() -> None:
    assert json.loads(runtime.encode(Spec())) == {"ociVersion": runtime.VERSION, "linux": {}}


def _schema_properties(schema: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The schema with every "$ref" to another file replaced by what it refers to."""

    def resolve(node: Any, base: Path) -> Any:
        if isinstance(node, list):
            return [resolve(entry, base) for entry in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            name, _, pointer = node["$ref"].partition("#")
            file = folder / name if name else base
            target: Any = json.loads(file.read_text())
            for part in pointer.strip("/").split("/"):
                target = target[part]
            rest = {key: value for key, value in node.items() if key != "$ref"}
            return {**resolve(rest, base), **resolve(target, file)}
        return {key: resolve(value, base) for key, value in node.items()}

    resolved: dict[str, Any] = resolve(schema, folder / "config-schema.json")
    return resolved


@pytest.mark.skipif(not SCHEMAS.is_dir(), reason=f"no schemas at {SCHEMAS}")
def test_agrees_with_the_published_schema() -> None:
    schema = json.loads((SCHEMAS / "config-schema.json").read_text())
    del schema["properties"]["windows"], schema["properties"]["solaris"], schema["properties"]["vm"]
    del schema["properties"]["zos"], schema["properties"]["freebsd"]
    resolved = _schema_properties(schema, SCHEMAS)
    written = json.loads(runtime.encode(full()))
    jsonschema.Draft4Validator(resolved).validate(written)
    _known(resolved, written, "$")


def _known(schema: dict[str, Any], value: Any, where: str) -> None:
    """Every member that we write has a name in the schema (it allows unknown ones silently)."""
    if isinstance(value, list):
        for entry in value:
            _known(schema.get("items", {}), entry, where)
    elif isinstance(value, dict) and "properties" in schema:
        for name, member in value.items():
            assert name in schema["properties"], f"{where}.{name} is not in the specification"
            _known(schema["properties"][name], member, f"{where}.{name}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "config.json is not JSON"),
        ('{"process": {"user": {"uid": "x"}}}', "$.process.user.uid"),
        ('{"process": {"user": {"uid": -1}}}', "$.process.user.uid"),
        ('{"linux": {"namespaces": [{"type": "moon"}]}}', "$.linux.namespaces"),
        ('{"ociVersion": "2.0.0"}', "ociVersion '2.0.0' is not supported"),
        ('{"process": {"args": []}}', "process.args is empty"),
        ('{"process": {"args": ["x"], "cwd": "tmp"}}', "not an absolute path"),
        ('{"process": {"args": ["a\\u0000b"]}}', "NUL"),
        ('{"process": {"args": ["x"], "env": ["NOTHING"]}}', "not NAME=VALUE"),
        ('{"process": {"args": ["x"], "oomScoreAdj": 2000}}', "-1000..1000"),
        ('{"hostname": "x"}', "needs a uts namespace"),
        ('{"mounts": [{"destination": "x"}]}', "mounts[0].destination"),
        ('{"linux": {"namespaces": [{"type": "pid"}, {"type": "pid"}]}}', "pid twice"),
        ('{"linux": {"maskedPaths": ["proc"]}}', "not absolute"),
        ('{"linux": {"sysctl": {"net/../kernel": "1"}}}', "not a setting's name"),
        (
            '{"linux": {"uidMappings": [{"containerID": 0, "hostID": 0, "size": 1}]}}',
            "need a user namespace",
        ),
    ],
)
def test_what_is_wrong_is_named(text: str, message: str) -> None:
    with pytest.raises(Invalid) as caught:
        runtime.decode(text)
    assert message in caught.value.message
    assert "\n" not in caught.value.message


def test_unknown_members_are_ignored() -> None:
    assert runtime.decode('{"moon": 1, "linux": {"sun": {}}}') == Spec()


@pytest.mark.parametrize(
    "mappings",
    [
        [IDMapping(0, 0, 10), IDMapping(5, 100, 10)],
        [IDMapping(0, 0, 10), IDMapping(10, 5, 10)],
        [IDMapping(0, 0, 0)],
        [IDMapping(2**32 - 1, 0, 2)],
    ],
)
def test_id_mappings_that_make_no_sense(mappings: list[IDMapping]) -> None:
    spec = Spec(linux=Linux(namespaces=[Namespace("user")], uid_mappings=mappings))
    with pytest.raises(Invalid):
        runtime.validate(spec)


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_any_bytes_are_decoded_or_refused(data: bytes) -> None:
    try:
        runtime.decode(data)
    except Invalid as error:
        assert "\n" not in error.message
