"""The tables: every command loads, explains itself, and knows docker's flags."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bulkhead.cli.completion import SHELLS, script
from bulkhead.cli.dispatch import load
from bulkhead.cli.help import command_help, overview
from bulkhead.cli.registry import ALIASES, COMMANDS, GROUPS

SOURCE = Path(__file__).resolve().parents[2] / "src"


@pytest.mark.parametrize("words", COMMANDS)
def test_commands(words: str) -> None:
    command = load(words)
    assert command.words == words
    assert command.summary == COMMANDS[words][1]
    assert command.examples
    assert all(example.startswith(("bulkhead ", "docker save", "source ", "pass "))
               for example in command.examples)  # fmt: skip
    names = [option.name for option in command.options]
    shorts = [option.short for option in command.options if option.short]
    assert len(set(names)) == len(names)
    assert len(set(shorts)) == len(shorts)
    text = command_help(words)
    assert text.startswith("Usage:  bulkhead " + words)
    assert "Examples:" in text


def test_aliases() -> None:
    assert set(ALIASES.values()) <= set(COMMANDS)
    assert not set(ALIASES) & set(COMMANDS)
    for words in [*COMMANDS, *ALIASES]:
        group, space, _ = words.partition(" ")
        assert not space or group in GROUPS or group in COMMANDS


def test_overviews() -> None:
    for group in ("", *GROUPS):
        assert "Usage:  bulkhead" in overview(group)


@pytest.mark.parametrize("shell", SHELLS)
def test_completion_knows_every_command_and_flag(shell: str) -> None:
    text = script(shell)
    for words in COMMANDS:
        assert words.rpartition(" ")[2] in text
        for option in load(words).options:
            if not option.hidden:
                assert option.name in text


@pytest.mark.parametrize("shell", SHELLS)
def test_completion_is_valid(shell: str) -> None:
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not installed")
    done = subprocess.run([shell, "-n"], input=script(shell), text=True, capture_output=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_bash_completes(tmp_path: Path) -> None:
    if not shutil.which("bash"):
        pytest.skip("bash is not installed")
    (tmp_path / "c.bash").write_text(script("bash"))
    lines = [
        (["bulkhead", "net"], "network"), (["bulkhead", "network", "cr"], "create"),
        (["bulkhead", "run", "--cap-a"], "--cap-add"),
        (["bulkhead", "run", "--pull", "al"], "always"),
        (["bulkhead", "--root", "/x", "volume", "pr"], "prune"),
    ]  # fmt: skip
    for words, wanted in lines:
        quoted = " ".join(f"'{word}'" for word in words)
        program = (
            f"source {tmp_path}/c.bash; COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; "
            '_bulkhead; echo "${COMPREPLY[@]}"'
        )
        done = subprocess.run(["bash", "-c", program], text=True, capture_output=True)
        assert wanted in done.stdout.split(), (words, done)


# What docker has and we have not, each for a reason.
_LEFT_OUT = {
    "*": {"help"},
    "run": {"cpu-count", "cpu-percent", "io-maxbandwidth", "io-maxiops",  # Windows
            "use-api-socket"},  # experimental
    "create": {"cpu-count", "cpu-percent", "io-maxbandwidth", "io-maxiops", "use-api-socket"},
    "update": {"kernel-memory"},
    "start": {"checkpoint-dir"},
    "images": {"tree"},
    "load": {"platform"}, "save": {"platform"}, "history": {"platform"},
    "rmi": {"platform"}, "push": {"platform"},
    "network create": {"config-from", "config-only", "ingress", "scope"},  # swarm
    "network connect": {"link", "gw-priority"},
    "volume create": {"availability", "group", "limit-bytes", "required-bytes", "scope", "secret",
                      "sharing", "topology-preferred", "topology-required", "type"},  # swarm
    "volume ls": {"cluster"}, "volume update": set(),
}  # fmt: skip
_FLAG = re.compile(r"^ {2,6}(?:-(?P<short>\w), )? *--(?P<long>[\w-]+)(?P<value> [a-z]\S*)?")


_OURS_ALONE = frozenset(
    (
        "image bootstrap", "explain", "doctor", "serve", "completion", "system shutdown", "search",
        "system reservations", "export-workload", "import-workload", "move",
        "kernel add", "kernel ls", "kernel pull", "kernel rm",
        "builder df", "builder export", "builder import", "builder mounts", "registry serve",
        "fork", "restore", "snapshot", "snapshot ls", "snapshot rm", "compare",
        "advise", "assess",
    )
)  # fmt: skip


_OUR_GROUPS = ("vm", "machine")
_DOCKERS = [
    words for words in sorted(COMMANDS.keys() - _OURS_ALONE)
    if words.partition(" ")[0] not in _OUR_GROUPS
]  # fmt: skip


@pytest.mark.parametrize("words", _DOCKERS)
def test_flags_are_dockers(words: str) -> None:
    """Every flag of `docker WORDS --help` is known, with its letter, and takes a value or not."""
    if not shutil.which("docker"):
        pytest.skip("no docker client here to compare with")
    done = subprocess.run(["docker", *words.split(), "--help"], text=True, capture_output=True)
    if done.returncode:
        pytest.skip(f"docker {words} --help: {done.stderr}")
    table = load(words).table
    left_out = _LEFT_OUT["*"] | _LEFT_OUT.get(words, set())
    seen = 0
    for line in done.stdout.splitlines():
        match = _FLAG.match(line)
        if match is None or match["long"] in left_out:
            continue
        seen += 1
        option = table.longs.get(match["long"])
        assert option is not None, f"docker {words} has --{match['long']}"
        assert option.short == (match["short"] or ""), option.long
        assert (option.kind != "bool") == bool(match["value"]), option.long
    assert seen or not table.options


def test_startup_modules() -> None:
    """The start of the script loads no more than this; the client needs nothing else."""
    program = (
        "import sys; before = set(sys.modules); sys.path.insert(0, sys.argv[1]);"
        "import bulkhead.cli.main, bulkhead.cli.pyclient;"
        "print('\\n'.join(sorted(set(sys.modules) - before)))"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program, str(SOURCE)], text=True, capture_output=True
    )
    allowed = {"bulkhead", "bulkhead.cli", "bulkhead.cli.main", "bulkhead.cli.pyclient",
               "__future__"}  # fmt: skip
    assert done.stderr == ""
    assert {name for name in done.stdout.split() if name not in ("os", "stat", "_stat", "posixpath",
            "genericpath", "os.path", "_collections_abc")} <= allowed  # fmt: skip


def test_run_loads_no_engine() -> None:
    """A whole command line in this process never imports the engine, nor heavy modules."""
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]);"
        "from bulkhead.cli.dispatch import dispatch;"
        "dispatch(['--run-root', '/dev/null/x', 'run', 'image'], {});"
        "print('\\n'.join(sorted(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(SOURCE)], text=True, capture_output=True,
        env={"PATH": "/usr/bin"},
    )  # fmt: skip
    loaded = set(done.stdout.split())
    heavy = {"asyncio", "argparse", "subprocess", "ctypes", "urllib3", "logging", "tarfile",
             "sqlite3", "csv", "dataclasses"}  # fmt: skip
    assert "bulkhead.cli.commands.run" in loaded
    assert not {name for name in loaded if name.startswith("bulkhead.engine")}
    assert loaded & heavy <= {"dataclasses"}
