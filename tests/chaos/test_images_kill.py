"""kill -9 in the middle of pulls, tags and removals: names and content stay whole."""

import contextlib
import os
import random
import subprocess
import sys
import threading
from pathlib import Path

from tests.helpers.fake_registry import FakeRegistry, Handler, fake_registry, service
from tests.helpers.images import build, digest_of, tar_of
from tests.helpers.scale import scaled

_CHILD = """
import sys
from pathlib import Path
from tests.helpers.fake_registry import service
images = service(Path(sys.argv[1]))
print("ready", flush=True)
while True:
    images.pull(sys.argv[2] + "/r:1")
    images.tag(sys.argv[2] + "/r:1", "other:1")
    images.remove(sys.argv[2] + "/r:1")
    images.remove("other:1")
    images.prune()
"""


def killed_after(home: Path, host: str, requests: int, registry: FakeRegistry) -> None:
    """Run the child and kill it at its request number `requests`, wherever it is then."""
    reached = threading.Event()
    seen = [0]
    serve = type(registry).serve

    def counting(handler: Handler) -> None:
        seen[0] += 1
        if seen[0] >= requests:
            reached.set()
        with contextlib.suppress(OSError):
            serve(registry, handler)

    registry.serve = counting  # type: ignore[method-assign]
    process = subprocess.Popen(
        [sys.executable, "-c", _CHILD, str(home), host],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        assert reached.wait(120)
        process.kill()


def test_a_killed_process_leaves_whole_names_and_content(tmp_path: Path) -> None:
    chance = random.Random(1)
    noise = random.Random(2).randbytes(400_000)
    with fake_registry() as registry:
        image = build(registry.blobs, [tar_of({"a": noise}), tar_of({"b": noise[:9000]})])
        registry.publish("1", image)
        home = tmp_path / "home"
        for _ in range(scaled(12)):
            killed_after(home, registry.host, chance.randint(1, 12), registry)
            images = service(home)
            for row in images.list():  # what has a name or an entry is whole
                assert row["Id"] == image.id
                for diff_id in image_diffs(image.tars):
                    assert b"".join(images.store.tar(diff_id))
                assert images.store.read(image.digest) == image.manifest
            images.gc()
        images = service(home)
        assert images.pull(f"{registry.host}/r:1").id == image.id
        for row in images.list():
            images.remove(row["Id"], force=True)
        images.gc()
        assert images.store.layers() == []
        assert images.store.blobs() == []
        assert list((home / "store" / "work").iterdir()) == []


def image_diffs(tars: list[bytes]) -> list[str]:
    return [digest_of(tar) for tar in tars]
