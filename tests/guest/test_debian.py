"""The kernel tests in a Debian guest: systemd, cgroup v2 with every controller."""

from pathlib import Path

import pytest

from tests.guest import debian, job

pytestmark = pytest.mark.skipif(bool(debian.missing()), reason=debian.missing())


def test_control_groups_of_version_2_with_every_controller(
    tmp_path: Path, subtests: pytest.Subtests
) -> None:
    tests = ["tests/kernel/test_cgroups.py", "tests/kernel/test_seccomp.py"]
    log = debian.run(tests, tmp_path / "boot")
    job.told(tmp_path / "boot/exchange", log, "Debian", subtests)
