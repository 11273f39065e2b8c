"""The kernel tests under user-mode-linux: cgroup v2 of another kernel."""

from pathlib import Path

import pytest

from tests.guest import job, uml

pytestmark = pytest.mark.skipif(bool(uml.missing()), reason=uml.missing())


def test_limits_filters_and_containers(tmp_path: Path, subtests: pytest.Subtests) -> None:
    names = ("test_cgroups", "test_seccomp", "test_container_run", "test_container_stress")
    tests = [f"tests/kernel/{name}.py" for name in names]
    log = uml.run(tests, tmp_path)
    job.told(tmp_path / "exchange", log, "user-mode-linux", subtests)
