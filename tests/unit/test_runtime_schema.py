"""config.json: what the specification's schema refuses, we refuse, each with the member's name.

The schema lies beside the checkout and is not part of it. The good configuration has every member
that we know; each bad one differs from it in one place.
"""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT4

from bulkhead.errors import Invalid
from bulkhead.oci import runtime
from bulkhead.runtime.examples import example, features
from bulkhead.runtime.main import Context
from bulkhead.runtime.options import Values

FOLDER = Path(__file__).resolve().parents[3] / "shared/spec/oci-runtime"

HOOK = {"path": "/bin/hook", "args": ["hook"], "env": ["A=b"], "timeout": 3}
MAPS = [{"containerID": 0, "hostID": 1000, "size": 10}]
RATE = [{"major": 8, "minor": 0, "rate": 600}]
FULL: dict[str, Any] = {
    "ociVersion": "1.2.0",
    "root": {"path": "rootfs", "readonly": True},
    "hostname": "host",
    "domainname": "domain",
    "annotations": {"a": "b"},
    "process": {
        "terminal": True,
        "consoleSize": {"height": 25, "width": 80},
        "user": {"uid": 1, "gid": 2, "umask": 18, "additionalGids": [5, 6]},
        "args": ["sh"],
        "env": ["PATH=/bin"],
        "cwd": "/",
        "capabilities": {
            kind: ["CAP_KILL"]
            for kind in ("bounding", "permitted", "inheritable", "effective", "ambient")
        },
        "rlimits": [{"type": "RLIMIT_CORE", "hard": 1024, "soft": 512}],
        "noNewPrivileges": True,
        "apparmorProfile": "profile",
        "selinuxLabel": "label",
        "oomScoreAdj": 100,
        "ioPriority": {"class": "IOPRIO_CLASS_IDLE", "priority": 4},
        "scheduler": {"policy": "SCHED_BATCH", "nice": 1, "flags": ["SCHED_FLAG_RESET_ON_FORK"]},
        "execCPUAffinity": {"initial": "0", "final": "0-1"},
    },
    "mounts": [
        {
            "destination": "/data",
            "type": "bind",
            "source": "/srv",
            "options": ["rbind", "rro"],
            "uidMappings": MAPS,
            "gidMappings": MAPS,
        }
    ],
    "hooks": {
        name: [HOOK]
        for name in (
            "prestart",
            "createRuntime",
            "createContainer",
            "startContainer",
            "poststart",
            "poststop",
        )
    },
    "linux": {
        "namespaces": [
            {"type": "pid"},
            {"type": "network", "path": "/run/netns/x"},
            {"type": "uts"},
            {"type": "user"},
            {"type": "time"},
            {"type": "mount"},
        ],
        "uidMappings": MAPS,
        "gidMappings": MAPS,
        "timeOffsets": {"monotonic": {"secs": 1, "nanosecs": 2}},
        "devices": [
            {
                "path": "/dev/fuse",
                "type": "c",
                "major": 10,
                "minor": 229,
                "fileMode": 438,
                "uid": 0,
                "gid": 0,
            }
        ],
        "cgroupsPath": "/one",
        "resources": {
            "devices": [{"allow": False, "access": "rwm"}],
            "memory": {
                "limit": 1 << 26,
                "reservation": 1 << 25,
                "swap": 1 << 26,
                "swappiness": 0,
                "disableOOMKiller": False,
            },
            "cpu": {"shares": 1024, "quota": 10000, "period": 100000, "cpus": "0", "mems": "0"},
            "pids": {"limit": 100},
            "blockIO": {"weight": 10, "throttleReadBpsDevice": RATE},
            "hugepageLimits": [{"pageSize": "2MB", "limit": 9}],
            "network": {"classID": 1048577, "priorities": [{"name": "eth0", "priority": 500}]},
            "rdma": {"mlx5_1": {"hcaHandles": 3, "hcaObjects": 10}},
            "unified": {"memory.high": "1"},
        },
        "rootfsPropagation": "slave",
        "seccomp": {
            "defaultAction": "SCMP_ACT_ERRNO",
            "defaultErrnoRet": 1,
            "architectures": ["SCMP_ARCH_X86_64"],
            "flags": ["SECCOMP_FILTER_FLAG_LOG"],
            "listenerPath": "/run/agent",
            "listenerMetadata": "of ours",
            "syscalls": [
                {
                    "names": ["mkdir"],
                    "action": "SCMP_ACT_NOTIFY",
                    "args": [{"index": 0, "value": 1, "op": "SCMP_CMP_EQ"}],
                }
            ],
        },
        "sysctl": {"kernel.msgmax": "4096"},
        "maskedPaths": ["/proc/kcore"],
        "readonlyPaths": ["/proc/sys"],
        "mountLabel": "label",
        "personality": {"domain": "LINUX"},
        "intelRdt": {"closID": "x", "schemata": ["L3:0=f"]},
        "memoryPolicy": {"mode": "MPOL_BIND", "nodes": "0", "flags": ["MPOL_F_STATIC_NODES"]},
        "netDevices": {"eth0": {"name": "inner"}},
    },
}

LATER = {
    ("linux", "seccomp", "architectures", 0),
    ("linux", "seccomp", "flags", 0),
    ("linux", "memoryPolicy", "mode"),
    ("linux", "memoryPolicy", "flags", 0),
    ("process", "capabilities"),
    ("process", "scheduler", "flags", 0),
}
"""Places whose words are known to those who use them: refused by `create`, not by the decoder."""


WORSE: tuple[Any, ...] = ("x", -1, 1.5, [], {"x": []})
"""What each value is replaced by. null is what is left out, as other runtimes have it."""


@pytest.fixture(scope="module")
def schema() -> Any:
    if not FOLDER.is_dir():
        pytest.skip("no ../shared/spec/oci-runtime beside the checkout")
    found = {path.name: json.loads(path.read_text()) for path in FOLDER.glob("*.json")}
    registry: Any = Registry().with_resources(
        (name, Resource.from_contents(text, DRAFT4)) for name, text in found.items()
    )

    def make(name: str) -> Any:
        kind = jsonschema.validators.validator_for(found[name])
        return kind({"$ref": name}, registry=registry)

    return make


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value of a configuration."""
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def changed(path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    """The full configuration with another value at `path`."""
    made = copy.deepcopy(FULL)
    at: Any = made
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return made


def test_a_full_configuration_is_good(schema: Any) -> None:
    schema("config-schema.json").validate(FULL)
    spec = runtime.decode(json.dumps(FULL))
    assert json.loads(runtime.encode(runtime.decode(runtime.encode(spec)))) == json.loads(
        runtime.encode(spec)
    )
    schema("config-schema.json").validate(json.loads(runtime.encode(spec)))


def test_our_own_example_is_good(schema: Any) -> None:
    shown = json.loads(json.dumps(example()))
    schema("config-schema.json").validate(shown)
    runtime.decode(json.dumps(shown))


def test_what_the_schema_refuses_is_refused(schema: Any) -> None:
    validator = schema("config-schema.json")
    wrong: list[tuple[Any, ...]] = []
    refused = 0
    for path in places(FULL):
        for value in WORSE:
            made = changed(path, value)
            try:
                runtime.decode(json.dumps(made))
            except Invalid as error:
                assert str(error) and "\n" not in str(error), (path, error)
                refused += 1
                continue
            if any(path[: len(place)] == place for place in LATER) or validator.is_valid(made):
                continue
            wrong.append((path, value))
    assert refused > 500
    assert wrong == []


def test_what_is_no_configuration() -> None:
    for text in ("", "{", "[]", "null", "{}x", '{"ociVersion": "2.0.0"}', '{"ociVersion": 1}'):
        with pytest.raises(Invalid):
            runtime.decode(text)


def test_features_are_the_specifications(schema: Any, capsys: pytest.CaptureFixture[str]) -> None:
    general: Values = {"root": "/nowhere"}
    assert features(Context(general, {}, [])) == 0
    shown = json.loads(capsys.readouterr().out)
    schema("features-schema.json").validate(shown)
    assert "SCMP_ACT_NOTIFY" in shown["linux"]["seccomp"]["actions"]
