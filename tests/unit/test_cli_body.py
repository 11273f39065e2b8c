"""From run's flags to the request body."""

from pathlib import Path
from typing import Any

import pytest

from bulkhead.cli.body import create_body
from bulkhead.cli.commands.run import COMMANDS
from bulkhead.errors import BulkheadError, Unsupported


def body(*argv: str, environ: dict[str, str] | None = None) -> dict[str, Any]:
    """The body of `run ARGV image`."""
    return create_body(COMMANDS["run"].parse([*argv, "image"]), environ or {})


def host(*argv: str) -> dict[str, Any]:
    found: dict[str, Any] = body(*argv)["HostConfig"]
    return found


def test_plain() -> None:
    parsed = COMMANDS["run"].parse(["--rm", "image", "cmd", "--rm", "-x"])
    assert create_body(parsed, {}) == {
        "Image": "image",
        "Cmd": ["cmd", "--rm", "-x"],
        "HostConfig": {"AutoRemove": True},
    }


def test_environment(tmp_path: Path) -> None:
    file = tmp_path / "env"
    file.write_text("# comment\nA=1\n\n  B=two words \nHOME\nMISSING\n")
    found = body("--env-file", str(file), "-e", "C=3", "-e", "USER", "-e", "NOPE",
                 environ={"HOME": "/h", "USER": "u"})  # fmt: skip
    assert found["Env"] == ["A=1", "B=two words ", "HOME=/h", "C=3", "USER=u"]


def test_limits() -> None:
    assert host("-m", "64m", "--cpus", "0.5", "--pids-limit", "50", "--memory-swap", "-1",
                "--cpuset-cpus", "0-1", "--shm-size", "1g", "-c", "512") == {
        "Memory": 64 << 20, "NanoCpus": 500_000_000, "PidsLimit": 50, "MemorySwap": -1,
        "CpusetCpus": "0-1", "ShmSize": 1 << 30, "CpuShares": 512,
    }  # fmt: skip


def test_ports() -> None:
    found = body("-p", "8080:80", "-p", "127.0.0.1:53:53/udp", "-p", "443", "-p", "[::1]:90:90",
                 "-p", "100-101:200-201", "--expose", "7-8")  # fmt: skip
    assert found["HostConfig"]["PortBindings"] == {
        "80/tcp": [{"HostIp": "", "HostPort": "8080"}],
        "53/udp": [{"HostIp": "127.0.0.1", "HostPort": "53"}],
        "443/tcp": [{"HostIp": "", "HostPort": ""}],
        "90/tcp": [{"HostIp": "::1", "HostPort": "90"}],
        "200/tcp": [{"HostIp": "", "HostPort": "100"}],
        "201/tcp": [{"HostIp": "", "HostPort": "101"}],
    }
    assert set(found["ExposedPorts"]) == {
        "80/tcp", "53/udp", "443/tcp", "90/tcp", "200/tcp", "201/tcp", "7/tcp", "8/tcp",
    }  # fmt: skip


def test_one_port_from_a_host_range() -> None:
    assert host("-p", "8000-8010:80")["PortBindings"] == {
        "80/tcp": [{"HostIp": "", "HostPort": "8000-8010"}]
    }


def test_volumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = body("-v", "./data:/data:ro", "-v", "named:/n", "-v", "/anonymous", "-v", "/a:/b")
    assert found["HostConfig"]["Binds"] == [f"{tmp_path}/data:/data:ro", "named:/n", "/a:/b"]
    assert found["Volumes"] == {"/anonymous": {}}


def test_mounts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = host(
        "--mount", "type=bind,src=.,dst=/x,readonly,bind-propagation=rslave",
        "--mount", "source=v,target=/v,volume-nocopy,volume-label=a=b",
        "--mount", "type=tmpfs,target=/t,tmpfs-size=1m,tmpfs-mode=1700",
    )  # fmt: skip
    assert found["Mounts"] == [
        {"Type": "bind", "Source": str(tmp_path), "Target": "/x", "ReadOnly": True,
         "BindOptions": {"Propagation": "rslave"}},
        {"Type": "volume", "Source": "v", "Target": "/v",
         "VolumeOptions": {"NoCopy": True, "Labels": {"a": "b"}}},
        {"Type": "tmpfs", "Target": "/t", "TmpfsOptions": {"SizeBytes": 1 << 20, "Mode": 0o1700}},
    ]  # fmt: skip


def test_networks() -> None:
    found = body("--network", "back", "--network", "name=front,alias=f,ip=10.0.0.9",
                 "--network-alias", "b", "--ip", "10.1.0.5",
                 "--mac-address", "02:00:00:00:00:01")  # fmt: skip
    assert found["HostConfig"]["NetworkMode"] == "back"
    assert found["NetworkingConfig"]["EndpointsConfig"] == {
        "back": {"IPAMConfig": {"IPv4Address": "10.1.0.5"}, "Aliases": ["b"],
                 "MacAddress": "02:00:00:00:00:01"},
        "front": {"Aliases": ["f"], "IPAMConfig": {"IPv4Address": "10.0.0.9"}},
    }  # fmt: skip


def test_one_plain_network_needs_no_endpoints() -> None:
    found = body("--net", "host")
    assert found["HostConfig"] == {"NetworkMode": "host"}
    assert "NetworkingConfig" not in found


def test_health() -> None:
    assert body("--health-cmd", "curl -f x", "--health-interval", "5s", "--health-retries", "2")[
        "Healthcheck"
    ] == {"Test": ["CMD-SHELL", "curl -f x"], "Interval": 5 * 10**9, "Retries": 2}
    assert body("--health-cmd", "http://:80/ok")["Healthcheck"]["Test"] == ["HTTP", "http://:80/ok"]
    assert body("--health-cmd", "tcp://:5432")["Healthcheck"]["Test"] == ["TCP", "5432"]
    assert body("--no-healthcheck")["Healthcheck"] == {"Test": ["NONE"]}


def test_the_rest(tmp_path: Path) -> None:
    profile = tmp_path / "seccomp.json"
    profile.write_text('{"defaultAction": "SCMP_ACT_ALLOW"}')
    assert host(
        "--security-opt", f"seccomp={profile}", "--security-opt", "no-new-privileges",
        "--ulimit", "nofile=10:20", "--ulimit", "core=-1", "--restart", "on-failure:3",
        "--device", "/dev/fuse", "--device", "/dev/a:/dev/b:r", "--add-host", "db:10.0.0.1",
        "--add-host", "v6:[::1]", "--tmpfs", "/t:size=1m", "--device-read-bps", "/dev/sda:1mb",
        "--log-driver", "json-file", "--log-opt", "max-size=1m", "--sysctl", "a.b=1", "--init",
        "--read-only", "--cap-add", "NET_ADMIN", "--cap-drop", "ALL", "--dns-option", "ndots:1",
    ) == {
        "SecurityOpt": ['seccomp={"defaultAction":"SCMP_ACT_ALLOW"}', "no-new-privileges"],
        "Ulimits": [{"Name": "nofile", "Soft": 10, "Hard": 20},
                    {"Name": "core", "Soft": -1, "Hard": -1}],
        "RestartPolicy": {"Name": "on-failure", "MaximumRetryCount": 3},
        "Devices": [
            {"PathOnHost": "/dev/fuse", "PathInContainer": "/dev/fuse",
             "CgroupPermissions": "rwm"},
            {"PathOnHost": "/dev/a", "PathInContainer": "/dev/b", "CgroupPermissions": "r"}],
        "ExtraHosts": ["db:10.0.0.1", "v6:::1"], "Tmpfs": {"/t": "size=1m"},
        "BlkioDeviceReadBps": [{"Path": "/dev/sda", "Rate": 1 << 20}],
        "LogConfig": {"Type": "json-file", "Config": {"max-size": "1m"}},
        "Sysctls": {"a.b": "1"}, "Init": True, "ReadonlyRootfs": True, "CapAdd": ["NET_ADMIN"],
        "CapDrop": ["ALL"], "DnsOptions": ["ndots:1"],
    }  # fmt: skip


def test_entrypoint() -> None:
    assert body("--entrypoint", "/bin/sh")["Entrypoint"] == ["/bin/sh"]
    assert body("--entrypoint", "")["Entrypoint"] == [""]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["-v", "a:b:c:d"], "invalid volume specification"),
        (["-v", "a:relative"], "must be absolute"),
        (["-v", "a:/b:zz"], "invalid mode: zz"),
        (["--mount", "type=bind,dst=/x"], "source is required"),
        (["--mount", "src=x"], "target is required"),
        (["--mount", "type=nfs,dst=/x"], "mount type unknown: 'nfs'"),
        (["--mount", "dst=/x,what=1"], "unknown option"),
        (["-p", "80:x"], "invalid containerPort"),
        (["-p", "70000:80"], "invalid port range"),
        (["-p", "80/foo"], "invalid proto: foo"),
        (["-p", "1.2.3:80:80"], "invalid IP address"),
        (["-p", "1-2:1-3"], "invalid ranges"),
        (["--ulimit", "nofile"], "invalid ulimit argument"),
        (["--ulimit", "nofile=20:10"], "less than or equal to hard limit"),
        (["--restart", "sometimes"], "unknown policy"),
        (["--restart", "always:3"], "maximum retry count"),
        (["--add-host", "db"], "bad format for add-host"),
        (["--device-read-bps", "sda:1"], "the format is <device-path>"),
        (["--env-file", "/nonexistent"], "no such file or directory"),
        (["--security-opt", "seccomp=/nonexistent"], "no such file or directory"),
        (["--network", "a", "--network", "a"], "specified multiple times"),
        (["--network", "alias=x"], "network name is missing"),
        (["--no-healthcheck", "--health-cmd", "x"], "conflicts"),
        (["-e", "=x"], "invalid environment variable"),
    ],
)
def test_refused(argv: list[str], message: str) -> None:
    with pytest.raises(BulkheadError) as caught:
        body(*argv)
    assert message in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("argv", [["--link", "a"], ["--gpus", "all"], ["--isolation", "hyperv"]])
def test_unsupported(argv: list[str]) -> None:
    with pytest.raises(Unsupported):
        body(*argv)
