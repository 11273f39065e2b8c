"""Commands against an engine that answers what the test says."""

import os
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from bulkhead.cli.main import run_argv
from bulkhead.errors import (
    CommandNotExecutable,
    CommandNotFound,
    Conflict,
    NotFound,
)
from tests.helpers.fake_engine import FakeEngine, Handler

Cli = Callable[..., int]
ID = "f" * 64


@pytest.fixture
def handlers() -> dict[str, Handler]:
    return {}


@pytest.fixture
def engine(tmp_path: Path, handlers: dict[str, Handler]) -> Iterator[FakeEngine]:
    with FakeEngine(str(tmp_path / "engine.sock"), handlers) as engine:
        yield engine


@pytest.fixture
def cli(engine: FakeEngine, tmp_path: Path) -> Cli:
    def call(*argv: str) -> int:
        return run_argv(["--run-root", str(tmp_path), *argv], dict(os.environ))

    return call


def ended(code: int) -> Handler:
    """A workload.run that writes to its stdout and ends with `code`."""

    def handler(params: dict[str, Any], fds: list[int]) -> Generator[dict[str, Any], None, Any]:
        yield {"Id": ID}
        if fds:
            os.write(fds[0], b"from inside\n")
        yield {"Started": True}
        return {"Id": ID, "StatusCode": code, "Reason": "exited"}

    return handler


def failing(error: Exception) -> Handler:
    def handler(params: dict[str, Any], fds: list[int]) -> Any:
        raise error

    return handler


@pytest.mark.parametrize("code", [0, 1, 3, 137])
def test_run_returns_the_code(
    cli: Cli, handlers: dict[str, Handler], engine: FakeEngine, code: int,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    handlers["workload.run"] = ended(code)
    assert cli("run", "--rm", "debian", "true") == code
    assert capfd.readouterr().out == "from inside\n"
    _, params = engine.calls[0]
    assert params["attach"] == [False, True, True]
    assert engine.methods() == ["workload.run"]


def test_run_pulls_a_missing_image(
    cli: Cli, handlers: dict[str, Handler], engine: FakeEngine, capfd: pytest.CaptureFixture[str]
) -> None:
    there: list[bool] = []
    run = ended(0)

    def first_missing(params: dict[str, Any], fds: list[int]) -> Any:
        if not there:
            raise NotFound("No such image: debian:latest")
        return run(params, fds)

    def pull(params: dict[str, Any], fds: list[int]) -> Generator[dict[str, Any], None, Any]:
        there.append(True)
        yield {"status": "Pulling from library/debian", "id": "latest"}
        return {"Id": "sha256:1"}

    handlers.update({"workload.run": first_missing, "image.pull": pull})
    assert cli("run", "debian") == 0
    captured = capfd.readouterr()
    assert captured.err == (
        "Unable to find image 'debian:latest' locally\nlatest: Pulling from library/debian\n"
    )
    assert captured.out == "from inside\n"
    assert engine.methods() == ["workload.run", "image.pull", "workload.run"]


def test_run_never_pulls_if_told(
    cli: Cli, handlers: dict[str, Handler], engine: FakeEngine, capfd: pytest.CaptureFixture[str]
) -> None:
    handlers["workload.run"] = failing(NotFound("No such image: debian:latest"))
    assert cli("run", "--pull", "never", "debian") == 125
    assert engine.methods() == ["workload.run"]
    assert capfd.readouterr().err == "bulkhead: No such image: debian:latest\n"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (Conflict("port is already allocated"), 125),
        (CommandNotFound('exec: "x": executable file not found in $PATH'), 127),
        (CommandNotExecutable('exec: "/etc": permission denied'), 126),
        (NotFound("network x not found"), 125),
    ],
)
def test_run_errors(
    cli: Cli, handlers: dict[str, Handler], error: Exception, code: int,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    handlers["workload.run"] = failing(error)
    assert cli("run", "debian", "x") == code
    assert capfd.readouterr().err == f"bulkhead: {error}\n"


def test_run_detached(
    cli: Cli, handlers: dict[str, Handler], engine: FakeEngine, tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    handlers["workload.run"] = ended(0)
    cidfile = tmp_path / "cid"
    assert cli("run", "-d", "--cidfile", str(cidfile), "--name", "web", "debian") == 0
    assert capfd.readouterr().out == f"{ID}\n"
    assert cidfile.read_text() == ID
    params = engine.calls[0][1]
    assert params["detach"] is True
    assert params["name"] == "web"
    assert cli("run", "-d", "--cidfile", str(cidfile), "debian") == 125
    assert "container ID file found" in capfd.readouterr().err


def test_run_needs_a_terminal_for_it(cli: Cli, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli("run", "-it", "debian") == 1
    assert "the input device is not a TTY" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("argv", "code", "text"),
    [
        (["frobnicate"], 1, "bulkhead: unknown command: bulkhead frobnicate\n"
                            "See 'bulkhead --help'.\n"),
        (["run", "--frob", "x"], 125, "bulkhead: unknown flag: --frob\n"
                                      "See 'bulkhead run --help'.\n"),
        (["run"], 1, "bulkhead: 'bulkhead run' requires at least 1 argument\n"
                     "See 'bulkhead run --help'.\n"),
        (["network", "frob"], 1, "bulkhead: unknown command: bulkhead network frob\n"
                                 "See 'bulkhead --help'.\n"),
        (["-H", "tcp://x", "ps"], 125, "bulkhead: --host tcp://x: only "
                                       "unix://RUN-ROOT/engine.sock is supported\n"
                                       "See 'bulkhead --help'.\n"),
    ],
)  # fmt: skip
def test_usage_errors(
    cli: Cli, argv: list[str], code: int, text: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli(*argv) == code
    assert capfd.readouterr().err == text


SUMMARY = {
    "Id": ID, "Names": ["/web"], "Image": "nginx", "ImageID": "sha256:" + "a" * 64,
    "Command": "nginx -g 'daemon off;'", "Created": 0, "State": "running",
    "Status": "Up 3 minutes", "Labels": {"a": "1"}, "Mounts": [],
    "Ports": [
        {"PrivatePort": 80, "PublicPort": 8080, "Type": "tcp", "IP": "0.0.0.0"},
        {"PrivatePort": 80, "PublicPort": 8080, "Type": "tcp", "IP": "::"},
        {"PrivatePort": 443, "Type": "tcp"}, {"PrivatePort": 444, "Type": "tcp"},
    ],
    "NetworkSettings": {"Networks": {"bridge": {}}},
}  # fmt: skip


def test_ps(
    cli: Cli, handlers: dict[str, Handler], engine: FakeEngine, capfd: pytest.CaptureFixture[str]
) -> None:
    handlers["workload.list"] = lambda params, fds: [SUMMARY]
    assert cli("ps", "-a", "--filter", "status=running") == 0
    assert engine.calls[0][1] == {
        "all": True, "filters": {"status": ["running"]}, "size": False,
    }  # fmt: skip
    ports = "0.0.0.0:8080->80/tcp, [::]:8080->80/tcp, 443-444/tcp"
    header, line = capfd.readouterr().out.splitlines()
    assert header.split("   ")[0] == "CONTAINER ID"
    cells = [cell.strip() for cell in line.split("   ") if cell.strip()]
    assert cells == [
        "ffffffffffff", "nginx", '"nginx -g \'daemon of…"', "N/A", "Up 3 minutes", ports, "web",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("argv", "shown"),
    [
        (["-q"], "ffffffffffff\n"),
        (["-q", "--no-trunc"], f"{ID}\n"),
        (["--format", "{{.Names}}={{.State}}"], "web=running\n"),
        (["--format", "table {{.Names}}\\t{{.Image}}"], "NAMES     IMAGE\nweb       nginx\n"),
        (["--format", "{{.Labels | upper}}"], "A=1\n"),
    ],
)
def test_ps_formats(
    cli: Cli, handlers: dict[str, Handler], argv: list[str], shown: str,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    handlers["workload.list"] = lambda params, fds: [SUMMARY]
    assert cli("ps", *argv) == 0
    assert capfd.readouterr().out == shown


def test_ps_json(cli: Cli, handlers: dict[str, Handler], capfd: pytest.CaptureFixture[str]) -> None:
    import json

    handlers["workload.list"] = lambda params, fds: [SUMMARY]
    for argv in (["ps", "--format", "json"], ["ps", "--json"], ["--json", "ps"]):
        assert cli(*argv) == 0
        assert json.loads(capfd.readouterr().out)["Names"] == "web"


def test_many_names_go_on_after_a_failure(
    cli: Cli, handlers: dict[str, Handler], capfd: pytest.CaptureFixture[str]
) -> None:
    def stop(params: dict[str, Any], fds: list[int]) -> None:
        if params["id"] == "b":
            raise NotFound("No such container: b")

    handlers["workload.stop"] = stop
    assert cli("stop", "-t", "3", "a", "b", "c") == 1
    captured = capfd.readouterr()
    assert captured.out == "a\nc\n"
    assert captured.err == "bulkhead: No such container: b\n"


def test_inspect_looks_everywhere(
    cli: Cli, handlers: dict[str, Handler], capfd: pytest.CaptureFixture[str]
) -> None:
    missing = failing(NotFound("No such thing"))
    handlers.update({"workload.inspect": missing, "image.inspect": missing,
                     "network.inspect": lambda p, f: {"Name": p["name"], "Id": ID}})  # fmt: skip
    assert cli("inspect", "-f", "{{.Name}} {{json .Id}}", "back") == 0
    assert capfd.readouterr().out == f'back "{ID}"\n'
    assert cli("inspect", "--type", "image", "back") == 1
    handlers["network.inspect"] = missing
    handlers["volume.inspect"] = missing
    assert cli("inspect", "back") == 1
    captured = capfd.readouterr()
    assert "No such object: back" in captured.err


def test_logs_keep_the_streams_apart(
    cli: Cli, handlers: dict[str, Handler], engine: FakeEngine, capfd: pytest.CaptureFixture[str]
) -> None:
    def logs(params: dict[str, Any], fds: list[int]) -> Iterator[list[Any]]:
        yield [1, b"out\n"]
        yield [2, b"err\n"]

    handlers["workload.logs"] = logs
    assert cli("logs", "--tail", "5", "-t", "web") == 0
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("out\n", "err\n")
    assert engine.calls[0][1]["tail"] == 5


def test_exec_code(
    cli: Cli, handlers: dict[str, Handler], engine: FakeEngine, capfd: pytest.CaptureFixture[str]
) -> None:
    def start(params: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        os.write(fds[0], b"inside\n")
        return {"Reason": "exited"}

    handlers.update({
        "exec.create": lambda p, f: {"Id": "e1"}, "exec.start": start,
        "exec.inspect": lambda p, f: {"ExitCode": 7},
    })  # fmt: skip
    assert cli("exec", "-e", "A=b", "-u", "1", "web", "ls", "-l") == 7
    assert capfd.readouterr().out == "inside\n"
    body = engine.calls[0][1]["body"]
    assert body["Cmd"] == ["ls", "-l"]
    assert body["Env"] == ["A=b"]


def test_images(cli: Cli, handlers: dict[str, Handler], capfd: pytest.CaptureFixture[str]) -> None:
    handlers["image.list"] = lambda p, f: [
        {"Id": "sha256:" + "1" * 64, "RepoTags": ["a:1", "r.io:5000/b:2"], "Size": 78_600_000,
         "Created": 0},
        {"Id": "sha256:" + "2" * 64, "RepoTags": [], "RepoDigests": [], "Size": 10, "Created": 0},
    ]  # fmt: skip
    assert cli("images", "--format", "{{.Repository}} {{.Tag}} {{.ID}} {{.Size}}") == 0
    assert capfd.readouterr().out.splitlines() == [
        "a 1 111111111111 78.6MB", "r.io:5000/b 2 111111111111 78.6MB",
        "<none> <none> 222222222222 10B",
    ]  # fmt: skip
    assert cli("images", "-q") == 0
    assert capfd.readouterr().out == "111111111111\n222222222222\n"


def test_login_stores_like_docker(
    cli: Cli, handlers: dict[str, Handler], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    import io
    import json

    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    monkeypatch.setattr("sys.stdin", io.StringIO("secret\n"))
    handlers["image.login"] = lambda p, f: {"Status": "Login Succeeded"}
    assert cli("login", "-u", "ada", "--password-stdin", "r.example:5000") == 0
    config = tmp_path / "docker" / "config.json"
    assert json.loads(config.read_text())["auths"] == {
        "r.example:5000": {"auth": "YWRhOnNlY3JldA=="}
    }
    assert config.stat().st_mode & 0o777 == 0o600

    def pull(params: dict[str, Any], fds: list[int]) -> Any:
        assert params["auth"] == {
            "username": "ada", "password": "secret", "serveraddress": "r.example:5000",
        }  # fmt: skip
        return {"Id": "x"}

    handlers["image.pull"] = pull
    assert cli("pull", "-q", "r.example:5000/a:1") == 0
    assert capfd.readouterr().out.endswith("r.example:5000/a:1\n")
    assert cli("logout", "r.example:5000") == 0
    assert json.loads(config.read_text())["auths"] == {}


def test_an_engine_that_is_gone_is_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").write_text("a file where the directory should be")
    assert run_argv(["--run-root", str(tmp_path / "run"), "ps"], {}) == 1
    assert capfd.readouterr().err.count("\n") == 1


def test_cp_out_and_in(
    cli: Cli, handlers: dict[str, Handler], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import io
    import tarfile

    received: list[bytes] = []

    def stat(params: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        if params["path"] == "/etc":
            return {"name": "etc", "mode": 1 << 31, "size": 0, "mtime": "", "linkTarget": ""}
        if params["path"] == "/etc/f":
            return {"name": "f", "mode": 0o644, "size": 3, "mtime": "", "linkTarget": ""}
        raise NotFound(f"Could not find the file {params['path']}")

    def get(params: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            member = tarfile.TarInfo("f")
            member.size, member.mode = 3, 0o640
            archive.addfile(member, io.BytesIO(b"abc"))
        os.write(fds[0], buffer.getvalue())
        return {"stat": stat(params, [])}

    def put(params: dict[str, Any], fds: list[int]) -> None:
        with open(fds[0], "rb", closefd=False) as file:
            received.append(params["path"].encode() + b"|" + file.read())

    handlers.update({"workload.archive_stat": stat, "workload.archive_get": get,
                     "workload.archive_put": put})  # fmt: skip
    assert cli("cp", "-q", "web:/etc/f", f"{tmp_path}/g") == 0
    assert (tmp_path / "g").read_bytes() == b"abc"
    assert (tmp_path / "g").stat().st_mode & 0o777 == 0o640
    assert cli("cp", "-q", f"{tmp_path}/g", "web:/etc") == 0
    path, _, data = received[0].partition(b"|")
    assert path == b"/etc"
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        assert archive.getnames() == ["g"]
    assert cli("cp", "web:/nope", str(tmp_path)) == 1
    assert cli("cp", "a", "b") == 1
