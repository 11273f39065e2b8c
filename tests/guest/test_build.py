"""A build whose steps run behind a kernel of their own."""

import os
import shutil
from pathlib import Path

import pytest

from tests.helpers.installation import installation

PROGRAMS = ("linux.uml", "mke2fs", "busybox")
LACKING = [name for name in PROGRAMS if shutil.which(name) is None]
pytestmark = pytest.mark.skipif(
    bool(LACKING) or os.geteuid() != 0,
    reason=f"not installed: {', '.join(LACKING)}" if LACKING else "needs root",
)
DOCKERFILE = """\
FROM busybox
RUN echo 1 > /kept; mkdir -p /gone/x
RUN --mount=type=cache,target=/root/.cache/c --mount=type=secret,id=s --mount=type=bind,target=/b \\
    set -e; cat /kept /b/file /run/secrets/s > /seen; echo c > /root/.cache/c/c; rm -r /gone; \\
    uname -r > /kernel
"""


def test_steps_run_in_a_sandbox(tmp_path: Path) -> None:
    context = tmp_path / "context"
    context.mkdir()
    (context / "Dockerfile").write_text(DOCKERFILE)
    (context / "file").write_text("2\n")
    (tmp_path / "secret").write_text("3\n")
    with installation(tmp_path / "here") as here:
        here.load_busybox(tmp_path)
        build = ("build", "--progress", "plain", "--boundary", "sandbox", "-t", "made",
                 "--secret", f"id=s,src={tmp_path}/secret", str(context))  # fmt: skip
        here.cli(*build, SOURCE_DATE_EPOCH="1600000000").ok()
        script = "cat /seen /kernel; ls -d /gone /b /root/.cache/c 2>&1; stat -c %Y /seen"
        said = here.cli("run", "--rm", "made", "sh", "-c", script).ok().out.splitlines()
        assert said[:3] == ["1", "2", "3"]
        assert said[3] != os.uname().release
        assert sum("No such file" in line for line in said) == 3
        assert said[-1] == "1600000000"
        again = here.cli(*build, SOURCE_DATE_EPOCH="1600000000").ok().err
        assert again.count("CACHED") == 2
