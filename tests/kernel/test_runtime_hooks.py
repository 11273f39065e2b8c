"""Hooks: each at its moment, in its place, with the state on standard input."""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.residue import residue
from tests.helpers.runtime_rig import Bundle

OUTSIDE = ("prestart", "createRuntime", "poststart", "poststop")


@pytest.fixture(params=["python", "planner"])
def bundle(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Bundle]:
    with residue(str(tmp_path)), ExitStack() as stack:
        made = Bundle(tmp_path, native=request.param == "planner")
        if made.native:
            stack.enter_context(made.planner())
        yield made
        for name in made.call("list", "-q").stdout.split():
            made.call("delete", "--force", name)


def _logging(log: Path, name: str) -> dict[str, Any]:
    script = f'printf "%s " {name} >> {log}; cat >> {log}; printf "\\n" >> {log}'
    return {"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/usr/bin:/bin"]}


def test_hooks_run_in_order_with_the_state(bundle: Bundle, tmp_path: Path) -> None:
    log = tmp_path / "log"

    def hooked(spec: dict[str, Any]) -> None:
        names = ("prestart", "createRuntime", "createContainer", "poststart", "poststop")
        spec["hooks"] = {name: [_logging(log, name)] for name in names}

    bundle.configure("true", change=hooked)
    bundle.call("run", "-b", str(bundle.path), "one")
    lines = [line.partition(" ") for line in log.read_text().splitlines()]
    assert [name for name, _, _ in lines] == [
        "prestart",
        "createRuntime",
        "createContainer",
        "poststart",
        "poststop",
    ]
    states = {name: json.loads(text) for name, _, text in lines}
    assert states["createRuntime"]["status"] == "creating"
    assert states["createRuntime"]["pid"] > 0
    assert states["poststop"]["status"] == "stopped"
    assert all(state["bundle"] == str(bundle.path) for state in states.values())


def test_create_container_is_in_the_namespaces_before_the_pivot(
    bundle: Bundle, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    script = f"hostname > {log}; test -d {bundle.path} && echo host >> {log}"

    def hooked(spec: dict[str, Any]) -> None:
        spec["hostname"] = "the-inside"
        hook = {"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/usr/bin:/bin"]}
        spec["hooks"] = {"createContainer": [hook]}

    bundle.configure("true", change=hooked)
    bundle.call("run", "-b", str(bundle.path), "one")
    assert log.read_text() == "the-inside\nhost\n"


def test_start_container_is_inside_and_confined(bundle: Bundle) -> None:
    script = "echo $$ > /dev/shm/pid; cat /etc/marker; grep CapEff /proc/self/status"

    def hooked(spec: dict[str, Any]) -> None:
        hook = {"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/bin"]}
        spec["hooks"] = {"startContainer": [hook]}
        spec["process"]["capabilities"] = {"bounding": [], "effective": [], "permitted": []}

    bundle.configure("cat", "/dev/shm/pid", change=hooked)
    (bundle.path / "rootfs/bin/grep").symlink_to("busybox")
    done = bundle.call("run", "-b", str(bundle.path), "one")
    assert int(done.stdout) > 1


@pytest.mark.parametrize("name", ["prestart", "createRuntime", "createContainer"])
def test_a_failing_hook_ends_create(bundle: Bundle, name: str) -> None:
    def hooked(spec: dict[str, Any]) -> None:
        hook = {"path": "/bin/sh", "args": ["sh", "-c", "echo why; exit 3"]}
        spec["hooks"] = {name: [hook]}

    bundle.configure("true", change=hooked)
    done = bundle.call("create", "-b", str(bundle.path), "one", code=1)
    assert f"error running {name} hook #0: exit status 3, output: why" in done.stderr
    assert bundle.call("list", "-q").stdout == ""


def test_a_hook_that_hangs_is_ended(bundle: Bundle) -> None:
    def hooked(spec: dict[str, Any]) -> None:
        hook = {"path": "/bin/sleep", "args": ["sleep", "1000"], "timeout": 1}
        spec["hooks"] = {"createRuntime": [hook]}

    bundle.configure("true", change=hooked)
    done = bundle.call("create", "-b", str(bundle.path), "one", code=1)
    assert "timeout of 1 s" in done.stderr


def test_a_failing_poststart_only_warns(bundle: Bundle) -> None:
    def hooked(spec: dict[str, Any]) -> None:
        spec["hooks"] = {"poststart": [{"path": "/bin/false"}]}

    bundle.configure("sh", "-c", "exit 4", change=hooked)
    done = bundle.call("run", "-b", str(bundle.path), "one", code=4)
    assert "level=warning" in done.stderr
    assert "poststart hook #0" in done.stderr
