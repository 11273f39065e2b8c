"""What all suites share: Hypothesis profiles and the list of failed tests."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.helpers.scale import SCALE

settings.register_profile(
    "suite",
    deadline=None,
    derandomize=SCALE <= 1,
    database=None,
    max_examples=max(1, int(50 * SCALE)),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("suite")


@pytest.fixture(scope="session", autouse=True)
def own_root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Programs that are told no root (OCI runtimes keep filters there) have one of the tests'."""
    if "BULKHEAD_ROOT" in os.environ:
        yield
        return
    os.environ["BULKHEAD_ROOT"] = str(tmp_path_factory.mktemp("root"))
    yield
    del os.environ["BULKHEAD_ROOT"]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Append each failed test's id to the file scripts/suites.py asks for."""
    path = os.environ.get("BULKHEAD_FAILED_TESTS")
    if path and report.failed:
        known = Path(path).read_text().splitlines() if Path(path).exists() else []
        if report.nodeid not in known:
            with Path(path).open("a") as file:
                file.write(f"{report.nodeid}\n")
