"""kill -9 at random points of storing a layer: what is seen afterwards is whole."""

import gzip
import hashlib
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

from bulkhead.store.content import ContentStore
from tests.helpers import archives as a
from tests.helpers.scale import SCALE

KILLS = max(5, int(15 * SCALE))

PROGRAM = """
import sys
from bulkhead.store.content import ContentStore
store = ContentStore(sys.argv[1])
print("ready", flush=True)
n = 0
while True:
    with store.lease():
        def chunks():
            with open(sys.argv[2], "rb") as stream:
                while piece := stream.read(65536):
                    yield piece
                    print(".", end="", flush=True)
        store.put(b"%d" % n)
        store.ingest(chunks())
        store.gc(lambda: ())
    store.gc(lambda: ())
    n += 1
"""


def test_kill_while_storing(tmp_path: Path) -> None:
    """After each kill all blobs and layers have their digests; the next start sweeps the rest."""
    chance = random.Random(5)
    data = b"".join(
        a.file(b"d/%d" % n, chance.randbytes(chance.randrange(9000))) for n in range(500)
    )
    (tmp_path / "layer.tar.gz").write_bytes(gzip.compress(data + a.END, 1))
    root = str(tmp_path / "store")
    for _ in range(KILLS):
        with subprocess.Popen(
            [sys.executable, "-c", PROGRAM, root, str(tmp_path / "layer.tar.gz")],
            stdout=subprocess.PIPE,
        ) as process:
            assert process.stdout is not None
            wanted = len(b"ready\n") + chance.randrange(0, 150)
            assert len(process.stdout.read(wanted)) == wanted
            process.send_signal(signal.SIGKILL)
            process.wait()
        store = ContentStore(root)
        assert os.listdir(f"{root}/work") == []
        for digest in store.blobs():
            data_now = Path(store.blob_path(digest)).read_bytes()
            assert "sha256:" + hashlib.sha256(data_now).hexdigest() == digest
        for diff_id in store.layers():
            assert sum(len(piece) for piece in store.tar(diff_id)) > 0
    ContentStore(root).gc(lambda: (), partial_age_s=0)
    left = [f"{base}/{name}" for base, _, names in os.walk(root) for name in names]
    assert sorted(os.path.basename(path) for path in left) == ["gate", "oci-layout"]
