"""Images in use, registries, events, networks, volumes, the kernel's view: through the CLI."""

import json
import os
import pty
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from bulkhead.cli.completion import script
from tests.helpers.installation import TIMEOUT_S, Installation, installation
from tests.helpers.registry import PASSWORD, USER, registry
from tests.helpers.residue import residue
from tests.helpers.waiting import until


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    if os.geteuid() != 0:
        pytest.skip("the container boundary wants root here")
    folder = tmp_path_factory.mktemp("objects")
    with residue(str(folder)), installation(folder) as here:
        here.load_busybox(folder)
        yield here


def test_push_pull_and_platforms(here: Installation, tmp_path: Path) -> None:
    cli = here.cli
    with registry(tmp_path / "registry", auth="basic") as peer:
        name = f"{peer.host}/some/busybox"
        for tag in ("1", "2"):
            cli("tag", "busybox", f"{name}:{tag}").ok()
        cli("push", f"{name}:1").failed(1)
        login = ("login", "-u", USER, "--password-stdin", peer.host)
        cli(*login, stdin="wrong\n").failed(1)
        assert "Login Succeeded" in cli(*login, stdin=f"{PASSWORD}\n").ok().out
        file = here.run / "docker" / "config.json"
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert peer.host in json.loads(file.read_text())["auths"]
        done = cli("push", "-a", name).ok()
        assert "\x1b" not in done.out + done.err  # plain lines in a pipe
        cli("rmi", f"{name}:1", f"{name}:2").ok()
        assert cli("pull", "-q", f"{name}:1").ok().line == f"{name}:1"
        cli("rmi", f"{name}:1").ok()
        assert cli("pull", "-a", name).ok().out.splitlines()[-1] == name
        tags = cli("images", "--format", "{{.Tag}}", name).ok().out.split()
        assert sorted(tags) == ["1", "2"]
        cli("pull", "-a", f"{name}:1").failed(1, "tag can't be used with --all-tags/-a")
        for policy, code in (("always", 0), ("missing", 0), ("never", 0)):
            assert cli("run", "--rm", "--pull", policy, f"{name}:1", "true").code == code
        other = cli("run", "--rm", "--platform", "linux/s390x", f"{name}:1", "true")
        other.failed(125, "does not match the specified platform")
        shown = progress_on_a_terminal(here, "pull", f"{name}:1")
        assert "Digest: sha256:" in shown
        cli("rmi", f"{name}:1", f"{name}:2").ok()
        cli("run", "--rm", "--pull", "never", f"{name}:1").failed(125, "No such image")
        cli("logout", peer.host).ok()
        assert peer.host not in json.loads(file.read_text()).get("auths", {})
        cli("pull", f"{name}:1").failed(1)
        helped(here, tmp_path, peer.host, f"{name}:1")


def progress_on_a_terminal(here: Installation, *argv: str) -> str:
    """What the command writes on a terminal of its own."""
    master, slave = pty.openpty()
    with subprocess.Popen(
        here.command(*argv), stdin=subprocess.DEVNULL, stdout=slave, stderr=slave,
        env=here.environment(),
    ) as process:  # fmt: skip
        os.close(slave)
        seen = b""
        while True:
            try:
                data = os.read(master, 4096)
            except OSError:  # the last one has closed it
                break
            seen += data
        os.close(master)
        assert process.wait(TIMEOUT_S) == 0, seen
    return seen.decode()


def helped(here: Installation, folder: Path, host: str, image: str) -> None:
    """Credentials from a helper program."""
    (folder / "bin").mkdir()
    program = folder / "bin" / "docker-credential-test"
    answer = json.dumps({"ServerURL": host, "Username": USER, "Secret": PASSWORD})
    program.write_text(f"#!/bin/sh\ncat > /dev/null\necho '{answer}'\n")
    program.chmod(0o755)
    config = folder / "config"
    config.mkdir()
    (config / "config.json").write_text(json.dumps({"credHelpers": {host: "test"}}))
    path = f"{folder}/bin:{os.environ['PATH']}"
    here.cli("--config", str(config), "pull", image, PATH=path).ok()
    here.cli("rmi", image).ok()


def test_an_image_in_use_stays(here: Installation, tmp_path: Path) -> None:
    cli = here.cli
    here.load_busybox(tmp_path, "used:1")
    (tmp_path / "extra").write_text("more")
    cli("create", "--name", "stem", "used:1").ok()
    cli("cp", str(tmp_path / "extra"), "stem:/extra").ok()
    cli("commit", "stem", "used:2").ok()
    cli("rm", "stem").ok()
    cli("create", "--name", "stays", "used:2", "cat", "/extra").ok()
    cli("rmi", "used:2").failed(1, "must force")
    cli("rmi", "-f", "used:2").ok()
    cli("rmi", "used:1").ok()
    cli("image", "prune", "-af").ok()
    assert cli("start", "-a", "stays").ok().out == "more"
    cli("rm", "stays").ok()
    here.load_busybox(tmp_path)  # pruned with the others


def test_import_for_a_platform(here: Installation, tmp_path: Path) -> None:
    cli = here.cli
    cli("create", "--name", "root", "busybox").ok()
    cli("export", "-o", str(tmp_path / "root.tar"), "root").ok()
    cli("rm", "root").ok()
    archive = str(tmp_path / "root.tar")
    cli("import", "--platform", "linux/s390x", "-c", "CMD true", archive, "far:1").ok()
    assert cli("inspect", "-f", "{{.Architecture}}", "far:1").ok().line == "s390x"
    made = cli("create", "--name", "far", "far:1").ok()
    assert "does not match the detected host platform" in made.err
    cli("rm", "far").ok()
    cli("rmi", "far:1").ok()
    cli("import", "http://127.0.0.1:1/x.tar").failed(1)


def test_events_df_and_prune(here: Installation) -> None:
    cli = here.cli
    cli("run", "--name", "seen", "busybox", "true").ok()
    found = cli("events", "--since", "1h", "--until", "0s", "--json", "-f", "container=seen").ok()
    actions = [json.loads(text)["Action"] for text in found.out.splitlines()]
    assert [a for a in actions if a in ("create", "start", "die")] == ["create", "start", "die"]
    kinds = cli("system", "df", "--format", "{{.Type}} {{.TotalCount}}").ok().out.splitlines()
    assert kinds[1] == "Containers 1"
    assert "seen" in cli("system", "df", "-v").ok().out
    assert "Total reclaimed space" in cli("container", "prune", "-f").ok().out
    assert cli("ps", "-aq").ok().out == ""


def test_networks_and_volumes(here: Installation) -> None:
    cli = here.cli
    cli("network", "create", "--internal", "inner").ok()
    cli("volume", "create", "--label", "a=b", "data").ok()
    shell = "echo kept > /v/f; while :; do sleep 1; done"
    cli("run", "-d", "--name", "one", "--network", "inner", "-v", "data:/v", "busybox",
        "sh", "-c", shell).ok()  # fmt: skip
    try:
        listed = cli("network", "inspect", "-f", "{{range .Containers}}{{.Name}}{{end}}", "inner")
        assert listed.ok().line == "one"
        cli("network", "rm", "inner").failed(1)
        cli("volume", "rm", "data").failed(1, "in use")
        cli("network", "disconnect", "inner", "one").ok()
        cli("network", "connect", "--alias", "uno", "inner", "one").ok()
    finally:
        cli("rm", "-f", "one").ok()
    assert cli("run", "--rm", "-v", "data:/v", "busybox", "cat", "/v/f").ok().out == "kept\n"
    cli("network", "prune", "-f").ok()
    assert "inner" not in cli("network", "ls", "--format", "{{.Name}}").ok().out.split()
    assert cli("volume", "ls", "-q", "-f", "label=a=b").ok().line == "data"
    cli("volume", "prune", "-af").ok()
    assert cli("volume", "ls", "-q").ok().out == ""


def test_explain_and_doctor(here: Installation) -> None:
    cli = here.cli
    cli("run", "-d", "--name", "seen", "-m", "64m", "--cgroup-parent", "/bh-parent/deep",
        "busybox", "sleep", "1000").ok()  # fmt: skip
    try:
        found = json.loads(cli("explain", "--json", "seen").ok().out)
        assert found["Seccomp"]["Mode"] == "filter"
        assert "PTRACE_SECCOMP_GET_FILTER" in found["Seccomp"]["Source"]
        assert found["Seccomp"]["Rules"]
        assert "CAP_SYS_ADMIN" not in found["Capabilities"]["CapBnd"]
        assert any("/bh-parent/deep/" in line for line in found["ControlGroups"]["Membership"])
        assert "Namespaces" in cli("explain", "seen").ok().out
        cli("pause", "seen").ok()
        frozen = json.loads(cli("explain", "--json", "seen").ok().out)
        assert frozen["Seccomp"]["Rules"] == found["Seccomp"]["Rules"]
    finally:
        cli("rm", "-f", "seen").ok()
    folders = [Path("/sys/fs/cgroup/bh-parent"), *Path("/sys/fs/cgroup").glob("*/bh-parent")]
    until(lambda: not any(folder.exists() for folder in folders), "the parent group is removed")
    checks = json.loads(cli("doctor", "--json").out)
    assert {check["status"] for check in checks} <= {"ok", "warn", "missing"}


def test_bash_completes_names(here: Installation, tmp_path: Path) -> None:
    (tmp_path / "c.bash").write_text(script("bash"))
    (tmp_path / "bulkhead").write_text('#!/bin/sh\nexec "$BULKHEAD_PYTHON" -m bulkhead "$@"\n')
    (tmp_path / "bulkhead").chmod(0o755)
    here.cli("create", "--name", "completed", "busybox").ok()
    words = "COMP_WORDS=(bulkhead rm comp); COMP_CWORD=2"
    program = f"source {tmp_path}/c.bash; {words}; _bulkhead; echo ${{COMPREPLY[@]}}"
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", program], env=here.environment(PATH=path), capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("completed\n", "")
    here.cli("rm", "completed").ok()
