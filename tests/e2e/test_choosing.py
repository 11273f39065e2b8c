"""`advise`, `--boundary auto` and `assess` through the command line; a wave that is executed."""

import json
import os
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import portfolio
from tests.helpers.installation import TIMEOUT_S, Installation, installation
from tests.helpers.residue import residue
from tests.helpers.waiting import until


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    if os.geteuid() != 0:
        pytest.skip("the container boundary wants root here")
    folder = tmp_path_factory.mktemp("choosing")
    with residue(str(folder)), installation(folder) as here:
        here.load_busybox(folder)
        yield here


def execute(here: Installation, folder: Path, lines: list[str]) -> None:
    """Have a shell run lines as somebody would type them."""
    program = folder / "bulkhead"
    program.write_text(f'#!/bin/sh\nexec {" ".join(here.command())} "$@"\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    environment = here.environment()
    environment["PATH"] = f"{folder}:{environment['PATH']}"
    done = subprocess.run(
        ["sh", "-e"], input="\n".join(lines), text=True, capture_output=True,
        env=environment, timeout=TIMEOUT_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_first_wave_of_a_portfolio_is_executed(here: Installation, tmp_path: Path) -> None:
    stacks = str(portfolio.write(tmp_path / "stacks"))
    page = tmp_path / "plan.html"
    plan = json.loads(here.cli("assess", stacks, "--json", "--html", str(page)).ok().out)
    assert len(plan["Inventory"]) == 13 and "</html>" in page.read_text()
    first = plan["Waves"][0]
    assert first["Members"] == ["web", "cache", "front"]
    lines = here.cli("assess", stacks, "--wave", "1").ok().out.splitlines()
    assert lines == first["Commands"]

    execute(here, tmp_path, lines)
    names = here.cli("ps", "--format", "{{.Names}}").ok().out.split()
    assert sorted(names) == ["blog-web", "shop-cache", "shop-front-1", "shop-front-2"]

    def healthy() -> bool:
        shown = here.cli("inspect", "--format", "{{.State.Health.Status}}", "blog-web").ok()
        return shown.line == "healthy"

    until(healthy, "the health check that the Compose file has")
    told = here.cli("exec", "blog-web", "wget", "-q", "-O", "-", "http://web/").ok()
    assert told.line == "blog"
    shown = json.loads(here.cli("inspect", "blog-web").ok().out)[0]
    assert (shown["Boundary"], shown["HostConfig"]["Memory"]) == ("container", 32 << 20)
    assert "STAGE=production" in shown["Config"]["Env"]

    back = here.cli("assess", stacks, "--wave", "1", "--undo").ok().out.splitlines()
    assert back == first["Undo"]
    execute(here, tmp_path, back)
    assert here.cli("ps", "-aq").ok().out == ""
    here.cli("network", "rm", "blog_default", "shop_default").ok()


def test_a_docker_host_is_read_over_its_api(here: Installation) -> None:
    host = f"unix://{here.run}/docker.sock"
    here.cli("run", "-d", "--name", "kept", "-v", "data:/data", "busybox", "sleep", "100000").ok()
    try:
        found = json.loads(here.cli("assess", "--docker", host, "--json").ok().out)
        (one,) = found["Inventory"]
        assert (one["Name"], one["Kind"], one["Boundary"]) == ("kept", "container", "container")
        assert one["Facts"]["state"]["Value"] == "volumes"
        (wave,) = found["Waves"]
        assert f"docker -H {host} stop kept" in wave["Commands"]
        assert wave["Undo"][-1] == f"docker -H {host} start kept"
        here.cli("assess", "--docker", "unix:///nowhere.sock").failed(1, "cannot be reached")
    finally:
        here.cli("rm", "-f", "kept").ok()
        here.cli("volume", "rm", "data").ok()


def test_advise_says_why_what_else_what_would_change_it_and_what_to_type(
    here: Installation, tmp_path: Path
) -> None:
    text = here.cli("advise", "--needs", "Customers upload the code.", "busybox").ok().out
    assert text.startswith("microvm for busybox\n")
    for part in (
        "rule untrusted", "Strongest alternative: sandbox", "What would change the answer",
        "nothing was measured on this host yet", "bulkhead run --boundary microvm busybox",
        '"customer upload the code"',
    ):  # fmt: skip
        assert part in text, text
    (data,) = json.loads(here.cli("advise", "--trust", "own", "busybox", "--json").ok().out)
    assert data["Boundary"] == "container" and data["Facts"]["trust"]["Source"] == "--trust"
    assert {"Fact": "os=windows", "Boundary": "vm", "Stated": False} in data["Changes"]
    done = here.cli("advise", "--needs", "HIPAA applies and virtualisation is not allowed.")
    assert done.code == 1 and "The needs contradict each other" in done.out
    here.cli("advise", "--needs", "Lorem ipsum.").failed(125, "no word of it says anything")
    here.cli("advise", "nothing-of-the-kind").failed(1, "neither a file, nor a workload")
    here.cli("advise").failed(1, "--needs TEXT")
    stacks = portfolio.write(tmp_path / "stacks")
    found = json.loads(here.cli("advise", "--json", str(stacks / "agents.yaml")).ok().out)
    assert [one["Boundary"] for one in found] == ["microvm", "sandbox"]
    answers = "4\n\n\n" + "\n" * 30
    (data,) = json.loads(here.cli("advise", "--questions", "--json", stdin=answers).ok().out)
    assert data["Boundary"] == "microvm"
    assert data["Facts"]["trust"] == {"Value": "untrusted", "Source": "answered"}


def test_auto_runs_and_says_why(here: Installation) -> None:
    done = here.cli("run", "--rm", "--boundary", "auto", "busybox", "echo", "ran").ok()
    assert done.line == "ran"
    here.cli("create", "--name", "chosen", "--runtime", "auto", "busybox", "true").ok()
    try:
        shown = here.cli("inspect", "--format", "{{.BoundaryChoice.Boundary}}", "chosen").ok()
        assert shown.line == "container"
        (data,) = json.loads(here.cli("advise", "chosen", "--json").ok().out)
        assert (data["Name"], data["Boundary"]) == ("chosen", "container")
    finally:
        here.cli("rm", "chosen").ok()
    label = "bulkhead.needs=Customers upload the code."
    wrong = here.cli("run", "--boundary", "auto", "--pid", "host", "--label", label, "busybox")
    wrong.failed(125, "contradict each other")
