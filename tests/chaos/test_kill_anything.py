"""kill -9 for engine, keeper, command server, client and holder in the middle of anything.

After each kill the next commands work and repair what was left half done; at the end nothing
remains. 40 kills at scale 1, from one seed; `make soak` makes ten times as many.
"""

import json
import os
import random
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.culling import aimed
from tests.helpers.fake_registry import FakeRegistry, fake_registry
from tests.helpers.images import BuiltImage, build, busybox_tar, has_busybox, tar_of
from tests.helpers.installation import TIMEOUT_S, Done, Installation, installation
from tests.helpers.residue import residue
from tests.helpers.scale import scaled
from tests.helpers.waiting import until

KILLS = 40
VICTIMS = (
    ("engine",), ("engine",), ("engine", "keeper"), ("keeper",), ("server",), ("client",),
    ("engine", "server"), ("holder",), ("engine", "keeper", "server", "holder", "client"),
)  # fmt: skip
STATES = {"created", "running", "paused", "restarting", "removing", "exited", "dead"}
LATEST_S = 0.12
"""Commands take some 10 ms to 150 ms here; a kill falls somewhere into that."""


@dataclass
class Lab:
    """An installation with an image, and a registry that has another one."""

    here: Installation
    registry: FakeRegistry
    image: BuiltImage

    @property
    def name(self) -> str:
        """The image to pull."""
        return f"{self.registry.host}/r:1"

    def cli(self, *argv: str) -> Done:
        """One command to its end, the short way."""
        return self.here.cli(*argv, native=True, server=True)

    def listed(self) -> list[dict[str, Any]]:
        """All containers."""
        found = self.cli("ps", "-a", "--no-trunc", "--format", "json").ok().out
        return [json.loads(line) for line in found.splitlines()]


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    if os.geteuid() != 0:
        pytest.skip("the container boundary wants root here")
    if not has_busybox():
        pytest.skip("no static busybox here (apt-get install busybox-static)")
    noise = random.Random(0).randbytes(3_000_000)
    with residue(str(tmp_path)), fake_registry() as registry, installation(tmp_path) as here:
        tars = [busybox_tar(), tar_of({"noise": noise})]
        made = build(registry.blobs, tars)
        registry.publish("1", made)
        here.load_busybox(tmp_path)
        yield Lab(here, registry, made)


# Each prepares a state and says which command is to be killed in the middle.
SLEEP = ("busybox", "sleep", "1000")


def _running(lab: Lab, *options: str) -> None:
    lab.cli("run", "-d", "--name", "victim", *options, *SLEEP).ok()


def do_pull(lab: Lab) -> tuple[str, ...]:
    return ("pull", "-q", lab.name)


def do_run(lab: Lab) -> tuple[str, ...]:
    return ("run", "--rm", "--name", "victim", "busybox", "sh", "-c", "echo a; sleep 0.05; echo b")


def do_run_detached(lab: Lab) -> tuple[str, ...]:
    return ("run", "-d", "--name", "victim", "-p", "127.0.0.1::80", "-v", "vol:/v", *SLEEP)


def do_create(lab: Lab) -> tuple[str, ...]:
    return ("create", "--name", "victim", "-v", "/anonymous", *SLEEP)


def do_start(lab: Lab) -> tuple[str, ...]:
    lab.cli("create", "--name", "victim", "--restart", "always", *SLEEP).ok()
    return ("start", "victim")


def do_exec(lab: Lab) -> tuple[str, ...]:
    _running(lab)
    return ("exec", "victim", "sh", "-c", "echo a; sleep 0.05; echo b")


def do_stop(lab: Lab) -> tuple[str, ...]:
    _running(lab)
    return ("stop", "-t", "0", "victim")


def do_restart(lab: Lab) -> tuple[str, ...]:
    _running(lab, "--network", "net")
    return ("restart", "-t", "0", "victim")


def do_remove(lab: Lab) -> tuple[str, ...]:
    _running(lab, "--network", "net", "-v", "/anonymous")
    return ("rm", "-f", "-v", "victim")


def do_commit(lab: Lab) -> tuple[str, ...]:
    _running(lab)
    return ("commit", "victim", "made:1")


def do_remove_image(lab: Lab) -> tuple[str, ...]:
    lab.cli("pull", "-q", lab.name).ok()
    return ("rmi", lab.name)


ACTIONS: tuple[Callable[[Lab], tuple[str, ...]], ...] = (
    do_pull, do_run, do_run_detached, do_create, do_start, do_exec, do_stop, do_restart, do_remove,
    do_commit, do_remove_image,
)  # fmt: skip


def strike(lab: Lab, argv: tuple[str, ...], victims: tuple[str, ...], delay_s: float) -> None:
    """Begin the command, kill while it is at work, and wait for the client to end."""
    parts = [part for part in victims if part != "client"]
    with aimed(lab.here, *parts) as fire:
        process = subprocess.Popen(
            lab.here.command(*argv, native=True),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=lab.here.environment(server=True),
        )
        try:
            threading.Event().wait(delay_s)  # the random moment
            fire()
            if "client" in victims:
                process.kill()
            process.wait(TIMEOUT_S)
        finally:
            process.kill()
            process.wait()


def check(lab: Lab) -> None:
    """Everything that is listed is whole, and new work is done."""
    assert lab.cli("run", "--rm", "busybox", "echo", "ok").ok().out == "ok\n"
    for row in lab.listed():
        name = row["Names"]
        found = lab.cli("inspect", name)
        if found.code:  # a removal that was begun has been finished meanwhile
            assert "No such" in found.err, found
            continue
        state = json.loads(found.out)[0]["State"]
        assert state["Status"] in STATES
        assert state["Running"] == (state["Status"] in {"running", "paused"})
        if state["Running"] and name == "victim":
            _usable(lab)
    images = lab.cli("images", "--format", "{{.Repository}}:{{.Tag}}").ok().out.split()
    for name in {lab.name, "made:1"} & set(images):
        assert lab.cli("run", "--rm", name, "echo", "whole").ok().out == "whole\n"
    assert "busybox:latest" in images


def _usable(lab: Lab) -> None:
    """The victim runs; it may have ended or been removed by now, but may not be stuck."""
    done = lab.cli("exec", "victim", "echo", "in")
    if done.code == 0:
        assert done.out == "in\n"
    else:
        words = ("is not running", "No such container", "is restarting")
        assert any(word in done.err for word in words), done


def clean(lab: Lab) -> None:
    """Remove what the action made; each removal works, however far the action came."""
    names = [row["Names"] for row in lab.listed()]
    if names:
        done = lab.cli("rm", "-f", "-v", *names)
        gone = all("No such container" in line for line in done.err.splitlines())
        assert done.code == 0 or gone, done
    until(lambda: not lab.listed(), "all containers are removed")
    for name in (lab.name, "made:1"):
        done = lab.cli("rmi", name)
        assert done.code == 0 or "No such image" in done.err, done
    assert lab.cli("pull", "-q", lab.name).ok().line == lab.name
    assert lab.cli("image", "inspect", "-f", "{{.Id}}", lab.name).ok().line == lab.image.id
    lab.cli("rmi", lab.name).ok()


def logged(here: Installation) -> str:
    """What our processes last wrote into their logs."""
    found = []
    for path in sorted(here.run.glob("*.log")):
        lines = path.read_text(errors="replace").splitlines()[-15:]
        found.append("\n".join([f"{path.name}:", *(f"  {line}" for line in lines)]))
    return "\n".join(found)


def test_anything_can_be_killed_anywhere(lab: Lab) -> None:
    chance = random.Random(20)
    lab.cli("network", "create", "net").ok()
    count: Counter[str] = Counter()
    begin = time.monotonic()
    for number in range(scaled(KILLS)):
        action = ACTIONS[number % len(ACTIONS)]
        victims = chance.choice(VICTIMS)
        delay_s = chance.random() * LATEST_S
        argv = action(lab)
        story = f"kill {number}: {'+'.join(victims)} {delay_s * 1e3:.0f} ms into {' '.join(argv)}"
        try:
            strike(lab, argv, victims, delay_s)
            check(lab)
            clean(lab)
        except BaseException as error:
            error.add_note(f"{story}\n{logged(lab.here)}")
            raise
        count["+".join(victims)] += 1
    seconds = time.monotonic() - begin
    print(f"{sum(count.values())} kills in {seconds:.0f} s: {dict(count)}")
    lab.cli("network", "rm", "net").ok()
    lab.cli("volume", "prune", "-f").ok()
    lab.cli("volume", "rm", "-f", "vol").ok()
    lab.cli("image", "prune", "-a", "-f").ok()
    _nothing_left(lab)


def _nothing_left(lab: Lab) -> None:
    """No file of a workload, no blob of an image, once all are removed."""
    for folder in (lab.here.root / "workloads", lab.here.run / "workloads"):
        until(lambda folder=folder: _empty(folder), f"{folder} is empty")  # type: ignore[misc]
    assert lab.cli("images", "-aq").ok().out == ""
    for name in ("work", "layers", "blobs/sha256"):
        folder = lab.here.root / "store" / name
        until(lambda folder=folder: _empty(folder), f"{folder} is empty")  # type: ignore[misc]
    assert _empty(lab.here.root / "volumes")


def _empty(folder: Path) -> bool:
    return not folder.exists() or not [n for n in os.listdir(folder) if not n.startswith(".")]
