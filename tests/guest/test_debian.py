"""The kernel tests in a Debian guest: systemd, cgroup v2 with every controller."""

from pathlib import Path

import pytest

from tests.guest import debian, job

pytestmark = pytest.mark.skipif(bool(debian.missing()), reason=debian.missing())


def test_limits_filters_and_containers(tmp_path: Path, subtests: pytest.Subtests) -> None:
    names = ("test_cgroups", "test_seccomp", "test_container_run")
    tests = [f"tests/kernel/{name}.py" for name in names]
    log = debian.run(tests, tmp_path / "boot")
    job.told(tmp_path / "boot/exchange", log, "Debian", subtests)
