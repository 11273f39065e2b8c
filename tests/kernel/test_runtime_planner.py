"""The planner behind the native client: whose container it is, whom it serves, when it ends."""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.residue import residue
from tests.helpers.runtime_rig import Bundle
from tests.helpers.waiting import until


@pytest.fixture
def bundle(tmp_path: Path) -> Iterator[Bundle]:
    with residue(str(tmp_path)):
        made = Bundle(tmp_path, native=True)
        yield made
        made.native = False
        for name in made.call("list", "-q").stdout.split():
            made.call("delete", "--force", name)


def parent(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[1])


def served(bundle: Bundle) -> bool:
    """Whether a command is a planner's: the client then never becomes an interpreter."""
    words = ["env", "BULKHEAD_PYTHON=/bin/false", *bundle.command("state", "nobody")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    return "does not exist" in done.stderr


def test_the_container_is_the_callers(bundle: Bundle) -> None:
    """As runc's: a foreground client is its parent, and its exit code the program's."""
    bundle.configure("sh", "-c", "sleep 1000; exit 1")
    with bundle.planner():
        assert served(bundle)
        words = bundle.command("run", "--bundle", str(bundle.path), "one")
        with subprocess.Popen(words, stdin=subprocess.DEVNULL) as client:
            until(lambda: bundle.call("list", "-q").stdout == "one\n", "the container")
            until(lambda: bundle.status("one") == "running", "its start")
            assert parent(bundle.pid("one")) == client.pid
            assert Path(f"/proc/{client.pid}/exe").exists()
            assert b"python" not in Path(f"/proc/{client.pid}/cmdline").read_bytes()
            bundle.call("kill", "one", "KILL")
            assert client.wait(120) == 128 + signal.SIGKILL
        assert bundle.call("list", "-q").stdout == ""


def test_a_client_that_is_less_is_not_served(bundle: Bundle) -> None:
    with bundle.planner():
        assert served(bundle)
        words = ["env", "BULKHEAD_PYTHON=/bin/false", *bundle.command("state", "nobody")]
        for less in (["unshare", "--net"], ["setpriv", "--no-new-privs"], ["unshare", "--mount"]):
            done = subprocess.run([*less, *words], capture_output=True, text=True, timeout=120)
            assert (done.returncode, done.stderr) == (1, ""), less


def test_a_directory_of_others_is_not_trusted(bundle: Bundle) -> None:
    with bundle.planner():
        (bundle.state / ".planner").chmod(0o755)
        assert not served(bundle)
        (bundle.state / ".planner").chmod(0o700)
        assert served(bundle)


def test_the_first_command_leaves_a_planner(bundle: Bundle) -> None:
    """Without one a command runs by itself; the planner ends with its directory."""
    bundle.configure("sh", "-c", "echo out; exit 3")
    os.environ["BULKHEAD_RUNTIME_PLANNER_WATCH"] = "0"
    try:
        assert bundle.call("run", "-b", str(bundle.path), "one", code=3).stdout == "out\n"
    finally:
        del os.environ["BULKHEAD_RUNTIME_PLANNER_WATCH"]
    folder = bundle.state / ".planner"
    socket = folder / str(os.stat("/proc/self/ns/mnt").st_ino)
    until(socket.exists, "the planner")
    assert served(bundle)
    assert bundle.call("run", "-b", str(bundle.path), "one", code=3).stdout == "out\n"
    socket.unlink()
    until(lambda: not _planners(folder), "its end")


def _planners(folder: Path) -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        try:
            text = (entry / "cmdline").read_bytes()
        except OSError:
            continue
        if f"planner\0{folder}\0".encode() in text:
            found.append(entry.name)
    return found


def test_a_worker_that_is_killed(bundle: Bundle) -> None:
    """Its command is run by the client itself, and others by the next worker."""
    bundle.configure("true")
    with bundle.planner() as pid:
        assert served(bundle)
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            os.kill(int(child), signal.SIGKILL)
        bundle.call("run", "-b", str(bundle.path), "one")
        until(lambda: served(bundle), "another worker")


def test_memory_for_a_static_program_only(bundle: Bundle) -> None:
    """Nothing of the runtime is charged to the container's limit."""

    def limited(spec: dict[str, object]) -> None:
        linux = spec["linux"]
        assert isinstance(linux, dict)
        linux["resources"]["memory"] = {"limit": 8 << 20}

    bundle.configure("echo", "hello", change=limited)
    with bundle.planner():
        assert bundle.call("run", "-b", str(bundle.path), "one").stdout == "hello\n"
    bundle.native = False
    assert bundle.call("run", "-b", str(bundle.path), "one").stdout == "hello\n"


def test_a_container_that_runs_the_runtime(bundle: Bundle) -> None:
    """A script can have as its interpreter what its process was before: the client's file.

    Its mount is read-only for that process and all that look at it (CVE-2019-5736).
    """
    evil = bundle.path / "rootfs/bin/evil"
    evil.write_text("#!/proc/self/exe spec\n")
    evil.chmod(0o755)
    bundle.configure("evil")
    with bundle.planner():
        done = bundle.call("run", "-b", str(bundle.path), "one", code=1)
    assert "bulkhead-runtime: cannot run python3" in done.stderr  # inside
    bundle.configure("/proc/self/exe")
    with bundle.planner():
        done = bundle.call("run", "-b", str(bundle.path), "one", code=1)
    assert "no such file" in done.stderr
