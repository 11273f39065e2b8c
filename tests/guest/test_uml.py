"""The kernel tests under user-mode-linux: cgroup v2 of another kernel."""

from pathlib import Path

import pytest

from tests.guest import job, uml

pytestmark = pytest.mark.skipif(bool(uml.missing()), reason=uml.missing())


def test_control_groups_of_version_2(tmp_path: Path, subtests: pytest.Subtests) -> None:
    tests = ["tests/kernel/test_cgroups.py", "tests/kernel/test_seccomp.py"]
    log = uml.run(tests, tmp_path)
    job.told(tmp_path / "exchange", log, "user-mode-linux", subtests)
