"""The cloud-init seed of a machine: a small disk labelled "cidata" (cloud-init's NoCloud).

    user-data   what the user wrote, or users, keys and a password of the options
    meta-data   instance-id and host name
    vendor-data what bulkhead adds, which user-data overrides

Address, routes and name servers come by DHCP (network/dhcp.py), so that nothing in here changes
when the machine's networks do.
"""

import io
import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from bulkhead.errors import Invalid
from bulkhead.machines import fat

LABEL = "cidata"
MOST_BYTES = 1 << 20
"""Of user-data."""
_SIZE = fat.LEAST_BYTES
_KEYS = ("ssh-", "ecdsa-", "sk-ssh-", "sk-ecdsa-")


_VENDOR = b'#cloud-config\n{"growpart": {"mode": "auto"}}\n'


@dataclass(frozen=True, slots=True)
class Seed:
    """What the first boot is told. `user_data` replaces all but the name."""

    instance: str
    hostname: str
    user: str = ""
    keys: Sequence[str] = ()
    password: str = ""
    """In plain text; it is hashed nowhere, so it is for consoles only: ssh refuses passwords."""
    user_data: str = ""
    vendor_data: str = ""
    """"" for what every machine has."""

    def files(self) -> dict[str, bytes]:
        """The seed's files. YAML 1.2 contains JSON, so nothing needs quoting by hand."""
        meta = {"instance-id": self.instance, "local-hostname": self.hostname}
        return {
            "meta-data": _json(meta),
            "user-data": self.user_data.encode() if self.user_data else self._made(),
            "vendor-data": self.vendor_data.encode() or _VENDOR,
        }

    def _made(self) -> bytes:
        config: dict[str, object] = {"hostname": self.hostname}
        if self.user:
            config["system_info"] = {"default_user": {"name": self.user}}
        if self.keys:
            config["ssh_authorized_keys"] = list(self.keys)
        if self.password:
            config |= {"password": self.password, "chpasswd": {"expire": False}}
        return b"#cloud-config\n" + _json(config)


def _json(value: object) -> bytes:
    return json.dumps(value, indent=1, ensure_ascii=True).encode() + b"\n"


def check(seed: Seed) -> None:
    """Invalid for keys that are none and for user-data that cloud-init would not read."""
    for key in seed.keys:
        if not key.startswith(_KEYS) or "\n" in key.strip() or len(key.split()) < 2:
            raise Invalid(f"{key[:40]!r} is not a public key of ssh")
    if len(seed.user_data.encode()) > MOST_BYTES:
        raise Invalid(f"user-data has more than {MOST_BYTES >> 10} KiB")
    if seed.user_data and not seed.user_data.startswith(("#", "Content-Type:", "MIME-Version:")):
        raise Invalid("user-data must begin with #cloud-config, #! or another mark of cloud-init")


def write(path: str, seed: Seed, *, uid: int) -> None:
    """Write the seed's disk, replacing what is there; only `uid` may read it."""
    check(seed)
    files = seed.files()
    out = io.BytesIO()
    serial = zlib.crc32(b"".join(files.values()))
    size = _SIZE + (sum(map(len, files.values())) // 4096 + 1) * 4096
    fat.write(out, files, size=size, label=LABEL, serial=serial, moment=0)
    scratch = f"{path}.new"
    fd = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with open(fd, "wb") as file:
        file.write(out.getbuffer())
    os.chown(scratch, uid, uid)
    os.rename(scratch, path)
