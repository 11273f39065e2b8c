"""Runs the kernel tests inside guests: other kernels, cgroup v2 with every controller, AppArmor.

    python scripts/test_kernels.py [--guest uml|debian]… [--timeout SECONDS] [TEST…]

`make test` runs four files of tests/kernel in each guest; this runs all that can run there. What
passed, failed and was skipped (with the reason) is printed for each guest. 1 if a test failed, or a
guest did not get through.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.guest import debian, job, uml  # noqa: E402

LINES = 20
"""Of what a failed test says."""
ELSEWHERE = {
    "test_store_old_kernel.py": "simulates what these guests are",
    "test_residue.py": "tests the tests",
    "test_guest_init.py": "is about guests on this host",
    "test_guest_monitor.py": "is about guests on this host",
    "test_guest_plan.py": "is about guests on this host",
    "test_guest_interior.py": "is about guests on this host",
    "test_guest_files.py": "is about guests on this host",
    "test_network_guests.py": "is about guests on this host",
    "test_emulation.py": "needs a compiler and QEMU",
}
WITHOUT_NETWORK = (
    "test_cgroups.py", "test_seccomp.py", "test_container_", "test_processes_", "test_store_",
    "test_runtime_",
)  # fmt: skip
"""What user-mode-linux can: its nf_tables has no inet family, which the engine's networks need."""
GUESTS: dict[str, tuple[Callable[[], str], Callable[..., str]]] = {
    "uml": (uml.missing, uml.run),
    "debian": (debian.missing, debian.run),
}


def chosen(guest: str, names: list[str]) -> list[str]:
    """Paths of the tests to run in `guest`."""
    if names:
        return names
    files = sorted((ROOT / "tests/kernel").glob("test_*.py"))
    files = [file for file in files if file.name not in ELSEWHERE]
    if guest == "uml":
        files = [file for file in files if file.name.startswith(WITHOUT_NETWORK)]
        files = [file for file in files if file.name != "test_runtime_checkpoint.py"]
    else:
        files.append(ROOT / "tests/guest/inside/runtime.py")
    return [str(file.relative_to(ROOT)) for file in files]


def run(guest: str, tests: list[str], timeout_s: int) -> bool:
    """Run `tests` in `guest` and print what came of it; whether all is well."""
    missing, start = GUESTS[guest]
    reason = missing()
    if reason:
        print(f"{guest}: not run: {reason}", flush=True)
        return True
    began = time.monotonic()
    out: list[str] = []
    with tempfile.TemporaryDirectory(prefix="bulkhead-kernels-") as folder:
        place = Path(folder, "boot")
        place.mkdir()
        log = start(tests, place, timeout_s=timeout_s)
        found = job.results(place / "exchange")
        code_file = place / "exchange" / "code"
        code = code_file.read_text().strip() if code_file.exists() else "none"
    counts = {
        outcome: sum(result.outcome == outcome for result in found)
        for outcome in ("passed", "failed", "skipped")
    }
    said = set()
    for result in found:
        if result.outcome == "failed":
            text = "\n".join(result.text.splitlines()[-LINES:])
            out.append(f"\n{guest}: {result.id}\n{'as above' if text in said else text}")
            said.add(text)
    reasons: dict[str, int] = {}
    for result in found:
        if result.outcome == "skipped":
            reasons[result.text] = reasons.get(result.text, 0) + 1
    for text, number in sorted(reasons.items()):
        out.append(f"{guest}: skipped {number}: {text}")
    seconds = time.monotonic() - began
    summary = ", ".join(f"{number} {outcome}" for outcome, number in counts.items())
    out.append(f"{guest}: {summary} in {seconds:.0f} s, pytest ended with {code}")
    if code not in {"0", "1"}:
        out.append(f"{guest} did not get through:\n{job.tail(log)}")
    print("\n".join(out), flush=True)
    return code == "0" and counts["passed"] > 0


def main() -> int:
    """Every guest in turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tests", nargs="*", metavar="TEST")
    parser.add_argument("--guest", action="append", choices=[*GUESTS], default=[])
    parser.add_argument("--timeout", type=int, default=3600)
    options = parser.parse_args()
    guests = options.guest or [*GUESTS]
    # At once: much of a test is waiting. What each says comes out in one piece.
    with ThreadPoolExecutor(len(guests)) as pool:
        begun = [
            pool.submit(run, guest, chosen(guest, options.tests), options.timeout)
            for guest in guests
        ]
    return 0 if all(one.result() for one in begun) else 1


if __name__ == "__main__":
    sys.exit(main())
