"""bulkhead-runtime: a container's life by runc's command line, without any engine."""

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.residue import residue
from tests.helpers.runtime_rig import Bundle, console, read_to_end
from tests.helpers.waiting import until


@pytest.fixture(params=["python", "planner"])
def bundle(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Bundle]:
    with residue(str(tmp_path)), ExitStack() as stack:
        made = Bundle(tmp_path, native=request.param == "planner")
        if made.native:
            stack.enter_context(made.planner())
        yield made
        for name in made.call("list", "-q").stdout.split():
            made.call("delete", "--force", name)


def test_run_is_the_programs_own(bundle: Bundle) -> None:
    bundle.configure("sh", "-c", "cat; echo err >&2; exit 7")
    done = bundle.call("run", "--bundle", str(bundle.path), "one", code=7, stdin="hello")
    assert (done.stdout, done.stderr) == ("hello", "err\n")
    assert bundle.call("list", "-q").stdout == ""


def test_a_signal_is_an_exit_code(bundle: Bundle) -> None:
    bundle.configure("sh", "-c", "kill -TERM $$; sleep 100", change=_without_pid)
    bundle.call("run", "-b", str(bundle.path), "one", code=143)


def _without_pid(spec: dict[str, Any]) -> None:
    """Process 1 of a namespace would ignore the signal."""
    kept = [one for one in spec["linux"]["namespaces"] if one["type"] != "pid"]
    spec["linux"]["namespaces"] = kept
    spec["linux"]["maskedPaths"], spec["linux"]["readonlyPaths"] = [], []


def test_create_waits_for_start(bundle: Bundle, tmp_path: Path) -> None:
    bundle.configure("sh", "-c", "echo started; exec sleep 1000")
    pid_file = tmp_path / "pid"
    bundle.create("one", "--pid-file", str(pid_file))
    assert bundle.status("one") == "created"
    assert int(pid_file.read_text()) == bundle.pid("one")
    assert bundle.output("one") == ""
    bundle.call("start", "one")
    until(lambda: bundle.output("one") == "started\n", "its output")
    assert bundle.status("one") == "running"
    again = bundle.call("start", "one", code=1)
    assert "already running" in again.stderr
    refused = bundle.call("delete", "one", code=1)
    assert "is not stopped: running" in refused.stderr
    bundle.call("kill", "one", "KILL")
    until(lambda: bundle.status("one") == "stopped", "its end")
    assert "not running" in bundle.call("kill", "one", code=1).stderr
    bundle.call("delete", "one")
    assert "does not exist" in bundle.call("state", "one", code=1).stderr


def test_a_created_container_can_be_deleted(bundle: Bundle) -> None:
    bundle.configure("sleep", "1000")
    bundle.create("one")
    bundle.call("delete", "one")
    assert bundle.call("list", "-q").stdout == ""


def test_an_id_is_taken_once(bundle: Bundle) -> None:
    bundle.configure("sleep", "1000")
    bundle.create("one")
    done = bundle.call("create", "-b", str(bundle.path), "one", code=1)
    assert "already exists" in done.stderr
    assert bundle.status("one") == "created"
    for name in ("a/b", "..", "", "a b"):
        assert "invalid container ID" in bundle.call("create", name, code=1).stderr


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("nowhere", 'exec: "nowhere": executable file not found in $PATH'),
        ("/bin/nowhere", 'exec: "/bin/nowhere": stat /bin/nowhere: no such file or directory'),
        ("/etc/marker", 'exec: "/etc/marker": permission denied'),
        ("/etc", 'exec: "/etc": permission denied'),
    ],
)
def test_a_missing_program_is_found_at_create(bundle: Bundle, program: str, words: str) -> None:
    bundle.configure(program)
    log = bundle.folder / "log.json"
    done = bundle.call(
        "--log", str(log), "--log-format", "json", "create", "-b", str(bundle.path), "one", code=1
    )
    assert words in done.stderr
    line = json.loads(log.read_text().splitlines()[-1])
    assert (line["level"], line["msg"]) == ("error", words)
    assert bundle.call("list", "-q").stdout == ""


def test_exec_joins_and_reports(bundle: Bundle) -> None:
    bundle.configure("sleep", "1000")
    bundle.create("one")
    bundle.call("start", "one")
    done = bundle.call("exec", "one", "sh", "-c", "cat; id -u; exit 5", code=5, stdin="in\n")
    assert done.stdout == "in\n0\n"
    assert bundle.call("exec", "--user", "12:34", "one", "id", "-g").stdout == "34\n"
    assert bundle.call("exec", "--env", "A=b", "one", "sh", "-c", "echo $A").stdout == "b\n"
    assert bundle.call("exec", "--cwd", "/etc", "one", "ls").stdout == "marker\n"
    inside = bundle.call("exec", "one", "cat", "/proc/self/cgroup").stdout
    assert inside == bundle.call("exec", "one", "cat", "/proc/1/cgroup").stdout
    assert "not found" in bundle.call("exec", "one", "nowhere", code=1).stderr


def test_no_descriptor_leads_out(bundle: Bundle) -> None:
    bundle.configure("sh", "-c", "ls /proc/self/fd; sleep 1000")
    bundle.create("one")
    bundle.call("start", "one")
    until(lambda: bundle.output("one").split() == ["0", "1", "2", "3"], "ls and its directory")
    inside = bundle.call("exec", "one", "ls", "/proc/self/fd").stdout
    assert inside.split() == ["0", "1", "2", "3"]


def test_exec_takes_a_process_file_and_detaches(bundle: Bundle, tmp_path: Path) -> None:
    bundle.configure("sleep", "1000")
    bundle.create("one")
    bundle.call("start", "one")
    process = {"args": ["sleep", "2000"], "cwd": "/", "env": ["PATH=/bin"], "user": {"uid": 7}}
    file, pid_file = tmp_path / "process.json", tmp_path / "exec.pid"
    file.write_text(json.dumps(process))
    bundle.detached("exec", "-d", "--process", str(file), "--pid-file", str(pid_file), "one")
    pid = int(pid_file.read_text())
    assert b"sleep\x002000" in Path(f"/proc/{pid}/cmdline").read_bytes()
    assert pid in json.loads(bundle.call("ps", "--format", "json", "one").stdout)
    if subprocess.run(["ps"], capture_output=True, check=False).returncode == 0:  # it can be there
        assert str(pid) in bundle.call("ps", "one").stdout


def test_a_terminal_goes_to_the_console_socket(bundle: Bundle, tmp_path: Path) -> None:
    def terminal(spec: dict[str, Any]) -> None:
        spec["process"]["terminal"] = True
        spec["process"]["consoleSize"] = {"height": 11, "width": 22}

    bundle.configure("sh", "-c", "test -t 0 && echo a terminal", change=terminal)
    path = tmp_path / "console"
    with console(path) as receive:
        bundle.create("one", "--console-socket", str(path))
        master = receive()
    try:
        bundle.call("start", "one")
        assert b"a terminal" in read_to_end(master)
    finally:
        os.close(master)


def test_limits_hold_and_change(bundle: Bundle) -> None:
    def limited(spec: dict[str, Any]) -> None:
        spec["linux"]["resources"]["memory"] = {"limit": 64 << 20}
        spec["linux"]["resources"]["pids"] = {"limit": 20}

    bundle.configure("sleep", "1000", change=limited)
    bundle.create("one")
    bundle.call("start", "one")
    shown = json.loads(bundle.call("events", "--stats", "one").stdout)
    assert shown["data"]["memory"]["usage"]["limit"] == 64 << 20
    bundle.call("update", "--memory", "32m", "one")
    bundle.call("update", "-r", "-", "one", stdin='{"pids": {"limit": 1}}')
    shown = json.loads(bundle.call("events", "--stats", "one").stdout)
    assert shown["data"]["memory"]["usage"]["limit"] == 32 << 20
    forks = bundle.call("exec", "one", "sh", "-c", "true | true", code=None)
    assert forks.returncode != 0


def test_paused_containers_do_not_run(bundle: Bundle) -> None:
    bundle.configure("sleep", "1000")
    bundle.create("one")
    bundle.call("start", "one")
    bundle.call("pause", "one")
    assert bundle.status("one") == "paused"
    assert "paused" in bundle.call("exec", "one", "true", code=1).stderr
    bundle.call("resume", "one")
    bundle.call("exec", "one", "true")
    bundle.call("pause", "one")
    bundle.call("kill", "one", "9")
    until(lambda: bundle.status("one") == "stopped", "its end")


def test_user_namespaces_have_the_bundles_owners(bundle: Bundle) -> None:
    def mapped(spec: dict[str, Any]) -> None:
        spec["linux"]["namespaces"].append({"type": "user"})
        mapping = [{"containerID": 0, "hostID": 100000, "size": 1000}]
        spec["linux"]["uidMappings"] = spec["linux"]["gidMappings"] = mapping

    for folder, _, files in os.walk(bundle.path / "rootfs"):
        for name in [".", *files]:
            os.chown(os.path.join(folder, name), 100000, 100000, follow_symlinks=False)
    for outer in (bundle.folder, bundle.path):
        outer.chmod(0o755)
    bundle.configure("sh", "-c", "cat /proc/self/uid_map; stat -c %u /etc/marker", change=mapped)
    done = bundle.call("run", "-b", str(bundle.path), "one")
    assert done.stdout.split() == ["0", "100000", "1000", "0"]


def test_tmpcopyup_begins_with_what_is_there(bundle: Bundle) -> None:
    def copied(spec: dict[str, Any]) -> None:
        options = ["tmpcopyup", "nosuid"]
        spec["mounts"].append({"destination": "/etc", "type": "tmpfs", "options": options})

    bundle.configure("sh", "-c", "cat /etc/marker; echo new > /etc/marker", change=copied)
    assert bundle.call("run", "-b", str(bundle.path), "one").stdout == "of the root"
    assert (bundle.path / "rootfs/etc/marker").read_text() == "of the root"


def test_a_killed_create_is_removed_by_delete(bundle: Bundle) -> None:
    bundle.configure("sleep", "1000")
    words = bundle.command("create", "--bundle", str(bundle.path), "one")
    with subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as child:
        until(lambda: (bundle.state / "one/start.fifo").exists(), "its fifo")
        child.send_signal(signal.SIGKILL)
    bundle.call("delete", "--force", "one")
    assert bundle.call("list", "-q").stdout == ""
