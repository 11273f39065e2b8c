"""The kernel tests in a Debian guest (systemd, cgroup v2 with every controller), and a reboot."""

from pathlib import Path

import pytest

from tests.guest import debian, job

pytestmark = pytest.mark.skipif(bool(debian.missing()), reason=debian.missing())


def test_limits_filters_and_containers(tmp_path: Path, subtests: pytest.Subtests) -> None:
    names = ("test_cgroups", "test_seccomp", "test_container_run", "test_container_stress")
    tests = [f"tests/kernel/{name}.py" for name in names]
    log = debian.run(tests, tmp_path / "boot")
    job.told(tmp_path / "boot/exchange", log, "Debian", subtests)


def test_service_and_reboot(tmp_path: Path, subtests: pytest.Subtests) -> None:
    for name in ("service", "second_boot"):
        log = debian.run([f"tests/guest/inside/{name}.py"], tmp_path / name, disk=tmp_path / "disk")
        job.told(tmp_path / name / "exchange", log, f"Debian, {name}", subtests)
