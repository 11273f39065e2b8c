"""`python -m bench [CASE…] [--rounds N] [--write]`: measure beside the peers, hold to targets.

Starts a dockerd, a registry and an installation of its own, measures the cases in turn on an
otherwise quiet machine, prints the table, and with --write puts it into docs/benchmarks.md.
"""

import argparse
import contextlib
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

from bench import peers
from bench.cases import CASES, Result, Rig, prepare
from bench.targets import TARGETS

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"
MARK = "<!-- measured below by python -m bench --write -->"


@contextlib.contextmanager
def registry(folder: Path) -> Iterator[str]:
    """Debian's docker-registry on a free loopback port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        number = probe.getsockname()[1]
    config = folder / "registry.yml"
    config.write_text(
        f"version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: "
        f"{folder}/registry}}}}\nhttp: {{addr: 127.0.0.1:{number}}}\n"
    )
    with (folder / "registry.log").open("wb") as log:
        server = subprocess.Popen(["docker-registry", "serve", str(config)], stdout=log, stderr=log)
    try:
        _await_listener(number)
        yield f"127.0.0.1:{number}"
    finally:
        server.terminate()
        server.wait()


def _await_listener(number: int) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            socket.create_connection(("127.0.0.1", number), timeout=5).close()
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            return


def table(results: Result, facts: dict[str, str]) -> str:
    """The results as Markdown."""
    lines = ["| measured | value | target | |", "|---|---|---|---|"]
    for target in TARGETS:
        if target.key in results:
            value = results[target.key]
            sign = "≥" if target.at_least else "≤"
            verdict = "reached" if target.reached(value) else "**missed**"
            lines.append(f"| {target.what} | {value:.3g} | {sign} {target.limit:.3g} | {verdict} |")
    lines += ["", *(f"- {name}: {text}" for name, text in facts.items())]
    return "\n".join(lines)


def main() -> int:
    """Measure; exit status 0 even when a target is missed: the table says so.

    A case that fails is told of, and 1 is the status.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", default=list(CASES), metavar="CASE")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    if os.environ.get("BULKHEAD_BENCH") != "inside":
        os.environ["BULKHEAD_BENCH"] = "inside"
        command = ["unshare", "--mount", "--propagation", "slave", sys.executable, "-m", "bench"]
        os.execvp(command[0], [*command, *sys.argv[1:]])
    results: Result = {}
    failed, text = 0, ""
    with contextlib.ExitStack() as stack:
        stack.enter_context(peers.crun_hierarchies())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory("bench", dir="/var/tmp")))
        remote = stack.enter_context(registry(folder))
        docker = stack.enter_context(peers.docker(folder, remote))
        ours = stack.enter_context(peers.ours(folder))
        rig = Rig(folder, ours, docker, remote, options.rounds)
        prepare(rig)
        for name in options.cases:
            print(f"bench: {name} …", file=sys.stderr, flush=True)
            try:
                results |= CASES[name](rig)
            except Exception as error:  # the others are measured all the same
                failed += 1
                traceback.print_exc()
                rig.facts[f"{name} (not measured)"] = str(error)[:300]
            text = table(results, rig.facts)
            if options.write:  # what is measured is kept, whatever comes after it
                _write(text, options.rounds)
    print(text)
    return 1 if failed else 0


def _write(text: str, rounds: int) -> None:
    head = PAGE.read_text().partition(MARK)[0]
    machine = f"{os.cpu_count()} cores, Linux {platform.release()}"
    day = time.strftime("%Y-%m-%d")
    said = f"Measured {day} on {machine}, --rounds {rounds}."
    PAGE.write_text(f"{head}{MARK}\n\n{said}\n\n{text}\n")


if __name__ == "__main__":
    sys.exit(main())
