"""What makes a disk image a machine: a read-only disk with this very bulkhead, and a seed.

    lib/    the package and what it imports, as they are installed here
    bin/bulkhead

The interpreter is the machine's own; compiled modules fit if it is of the same version as ours.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile

from bulkhead.errors import Unavailable, Unsupported

LABEL = "bulkhead"
PLACE = "/opt/bulkhead"
PYTHON = {"debian:bookworm": (3, 11), "debian:trixie": (3, 13)}
"""The interpreters of the disk images that machines can be made of."""
_MODULES = ("msgspec", "isal", "urllib3", "backports")
_SIZE = 96 << 20
_MAKE_S = 300.0
_COMMAND = f"""#!/bin/sh
PYTHONPATH={PLACE}/lib PYTHONDONTWRITEBYTECODE=1 exec python3 -m bulkhead "$@"
"""
_UNIT = f"""[Unit]
Description=bulkhead's agent
[Service]
Environment=PYTHONPATH={PLACE}/lib PYTHONDONTWRITEBYTECODE=1 HOME=/root
Environment=BULKHEAD_COMMAND_SERVER=0
ExecStart=/usr/bin/python3 -m bulkhead.machines.agent
KillMode=process
Restart=always
RestartSec=1
[Install]
WantedBy=multi-user.target
"""


SEED = f"""#!/bin/sh
# cloud-init's vendor-data of a machine: run once, at the first boot.
set -e
mkdir -p {PLACE}
echo 'LABEL={LABEL} {PLACE} ext4 ro,nofail 0 0' >> /etc/fstab
mount {PLACE}
cat > /etc/systemd/system/bulkhead-agent.service <<'UNIT'
{_UNIT}UNIT
cat > /usr/local/bin/bulkhead <<'COMMAND'
{_COMMAND}COMMAND
chmod 755 /usr/local/bin/bulkhead
systemctl daemon-reload
systemctl enable --now bulkhead-agent.service
"""


def check(image: str) -> None:
    """Unsupported if our compiled modules do not fit the interpreter of disk image `image`."""
    wanted = PYTHON.get(image)
    if wanted is None:
        raise Unsupported(f"a machine is made of {' or '.join(PYTHON)} (vm bootstrap), not {image}")
    if sys.version_info[:2] != wanted:
        own = ".".join(map(str, sys.version_info[:2]))
        raise Unsupported(
            f"{image} has Python {'.'.join(map(str, wanted))}, and this is bulkhead on {own}: its "
            "compiled modules do not fit"
        )


def write(path: str) -> None:
    """Make the disk at `path`."""
    with tempfile.TemporaryDirectory(dir=os.path.dirname(path), prefix=".payload-") as stage:
        library = f"{stage}/lib"
        ignore = shutil.ignore_patterns("__pycache__", "*.pyi", "test", "tests")
        for name in ("bulkhead", *_MODULES):
            found = importlib.util.find_spec(name)
            if found is None or not found.submodule_search_locations:
                if name == "backports":
                    continue  # Python 3.14 has what is in it
                raise Unavailable(f"the module {name} is not installed")
            place = next(iter(found.submodule_search_locations))
            shutil.copytree(place, f"{library}/{name}", ignore=ignore, symlinks=False)
        command = [
            "mke2fs", "-q", "-F", "-t", "ext4", "-L", LABEL, "-m", "0", "-O", "^has_journal",
            "-E", "root_owner=0:0", "-d", stage, path, f"{_SIZE >> 10}k",
        ]  # fmt: skip
        os.chmod(stage, 0o755)
        done = subprocess.run(command, capture_output=True, text=True, timeout=_MAKE_S, check=False)
        if done.returncode != 0:
            raise Unavailable(f"mke2fs: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
    os.chmod(path, 0o644)
