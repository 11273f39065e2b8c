"""Our images under an old kernel: Debian's user-mode-linux (6.1) mounts them as a disk."""

import glob
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from bulkhead.store.content import ContentStore
from bulkhead.store.mounts import LayerMounts
from tests.helpers import archives as a
from tests.kernel.test_store_mounts import _usable, corpus

TIMEOUT_S = 600
TAR = (
    "tar --xattrs --xattrs-include='*' --acls --numeric-owner --sort=name --format=posix "
    "--pax-option=delete=atime,delete=ctime,exthdr.name=%f -cf - . | sha256sum"
)

INIT = """#!/bin/sh
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
mount -t proc proc /proc
mount -t tmpfs tmpfs /mnt
mkdir /mnt/layer
busybox insmod {module}
mount -t erofs -o ro /dev/ubda /mnt/layer && echo "UML-MOUNTED"
cd /mnt/layer && echo "UML-SUM $({tar})"
echo o > /proc/sysrq-trigger
while :; do sleep 1; done
"""


def _boot(image: str, folder: Path) -> str:
    """Run the script in a guest whose disk is `image`; its console."""
    kernel, busybox = shutil.which("linux.uml"), shutil.which("busybox")
    modules = glob.glob("/usr/lib/uml/modules/*/kernel/fs/erofs/erofs.ko")
    if not kernel or not busybox or not modules:
        pytest.skip("needs linux.uml with its erofs module, and busybox")
    script = folder / "init"
    script.write_text(INIT.format(module=modules[0], tar=TAR))
    script.chmod(0o755)
    with subprocess.Popen(
        [
            kernel, "mem=128M", f"ubd0r={image}", "rootfstype=hostfs", "rootflags=/", "ro",
            f"init={script}", f"uml_dir={folder}/uml", "con=null", "con0=null,fd:1",
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        env={**os.environ, "TMPDIR": str(folder), "HOME": str(folder)},
    ) as process:  # fmt: skip
        try:
            console, _ = process.communicate(timeout=TIMEOUT_S)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return console.decode(errors="replace")


def test_linux_6_1_reads_our_images(tmp_path: Path) -> None:
    """Every file with its attributes is the same there as here."""
    _usable("file", tmp_path)
    store = ContentStore(str(tmp_path / "store"))
    layer = a.ingest(store, corpus()[0])
    console = _boot(layer.path, tmp_path)
    if "as init process" not in console:
        pytest.skip(f"user-mode-linux does not boot here: {console[-300:]!r}")
    mounts = LayerMounts(store, str(tmp_path / "run"), ["file"])
    try:
        (path,) = mounts.lowers([layer.diff_id])
        here = subprocess.run(TAR, shell=True, cwd=path, capture_output=True, text=True, check=True)
    finally:
        mounts.close()
    assert "UML-MOUNTED" in console, console
    assert f"UML-SUM {here.stdout.strip()}" in console, console
