"""UEFI for machines: OVMF, installed as a package or fetched and unpacked by us.

<root>/machines/firmware/OVMF_CODE.fd OVMF_VARS.fd
"""

import glob
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass

from bulkhead.errors import Unavailable, Unsupported
from bulkhead.home import Home

_INSTALLED = "/usr/share/OVMF"
_PAIRS = (("OVMF_CODE_4M.fd", "OVMF_VARS_4M.fd"), ("OVMF_CODE.fd", "OVMF_VARS.fd"))
_DOWNLOAD_S = 600.0


@dataclass(frozen=True, slots=True)
class Uefi:
    """Its code, and the template of a machine's variables."""

    code: str
    variables: str


def _in(folder: str) -> Uefi | None:
    for code, variables in _PAIRS:
        if os.path.exists(f"{folder}/{code}") and os.path.exists(f"{folder}/{variables}"):
            return Uefi(f"{folder}/{code}", f"{folder}/{variables}")
    return None


def find(home: Home) -> Uefi | None:
    """The firmware that machines use, if there is one."""
    return _in(_INSTALLED) or _in(home.in_root("machines", "firmware"))


def need(home: Home) -> Uefi:
    """Likewise; Unsupported says how to get one."""
    found = find(home)
    if found is None:
        raise Unsupported(
            "there is no UEFI firmware: apt-get install ovmf, or bulkhead vm firmware"
        )
    return found


def pull(home: Home) -> Uefi:
    """Fetch it from the distribution, if there is none; the package is unpacked, not installed."""
    found = find(home)
    if found is not None:
        return found
    target = home.in_root("machines", "firmware")
    os.makedirs(os.path.dirname(target), mode=0o711, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=os.path.dirname(target), prefix=".new-") as scratch:
        os.chmod(scratch, 0o755)
        _run(["apt-get", "-q", "download", "ovmf"], scratch)
        (package,) = glob.glob(f"{scratch}/*.deb")
        _run(["dpkg-deb", "-x", package, f"{scratch}/tree"], scratch)
        unpacked = _in(f"{scratch}/tree{_INSTALLED}")
        if unpacked is None:
            raise Unavailable("the package ovmf has no firmware in it")
        os.mkdir(f"{scratch}/firmware", 0o755)
        for path in (unpacked.code, unpacked.variables):
            shutil.copyfile(path, f"{scratch}/firmware/{os.path.basename(path)}")
        os.rename(f"{scratch}/firmware", target)
    return need(home)


def _run(command: list[str], folder: str) -> None:
    try:
        done = subprocess.run(
            command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            errors="replace", timeout=_DOWNLOAD_S, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{command[0]}: {error}") from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise Unavailable(f"{' '.join(command[:3])}: {last}")
