"""Small images made in memory: layers, manifests, indexes, and archives of them.

`busybox_archive(path)` is the quickest way to something that runs. Equal arguments, equal bytes.
"""

import gzip
import hashlib
import io
import json
import os
import platform
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from backports import zstd

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar"

ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "riscv64": "riscv64", "ppc64le": "ppc64le"}
ARCHITECTURE = ARCHITECTURES.get(platform.machine(), platform.machine())
BUSYBOX = "/bin/busybox"
_APPLETS = """
    ash cat chmod chown cp cut date dd df echo env expr false find free grep head hostname id ip
    kill ln ls mkdir mknod mount mv nc nslookup ping printf ps pwd rm seq sh sleep sort stat stty
    sync tail tee test touch tr true tty umount uname wc wget which whoami yes
"""
APPLETS = tuple(_APPLETS.split())


def digest_of(data: bytes) -> str:
    """sha256:…"""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def tar_of(files: Mapping[str, bytes | str | None], *, mode: int = 0o755) -> bytes:
    """A layer's tar: bytes are files, None directories, a str a symbolic link's target."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.mode = mode
            if content is None:
                member.type = tarfile.DIRTYPE
                tar.addfile(member)
            elif isinstance(content, str):
                member.type, member.linkname = tarfile.SYMTYPE, content
                tar.addfile(member)
            else:
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def squeeze(data: bytes, compression: str) -> bytes:
    """`data` compressed with "gzip", "zstd" or not ("")."""
    if compression == "gzip":
        return gzip.compress(data, 6, mtime=0)
    if compression == "zstd":
        return zstd.compress(data, 3)
    return data


@dataclass
class Blobs:
    """Blobs by digest, and descriptors for them."""

    by_digest: dict[str, bytes] = field(default_factory=dict)

    def add(self, data: bytes, media_type: str, **more: Any) -> dict[str, Any]:
        """Keep `data`; its descriptor."""
        digest = digest_of(data)
        self.by_digest[digest] = data
        return {"mediaType": media_type, "digest": digest, "size": len(data), **more}


@dataclass
class BuiltImage:
    """One image: its descriptor, and its parts as bytes."""

    descriptor: dict[str, Any]
    manifest: bytes
    config: bytes
    tars: list[bytes]
    layers: list[bytes]

    @property
    def id(self) -> str:
        """What docker calls the image id."""
        return digest_of(self.config)

    @property
    def digest(self) -> str:
        """The manifest's."""
        return digest_of(self.manifest)


def build(
    blobs: Blobs,
    tars: Sequence[bytes],
    *,
    compression: str = "gzip",
    docker: bool = False,
    config: Mapping[str, Any] | None = None,
    architecture: str = ARCHITECTURE,
    variant: str = "",
    created: str = "2024-05-06T07:08:09Z",
) -> BuiltImage:
    """An image of `tars` in `blobs`, in OCI's or Docker's media types."""
    document: dict[str, Any] = {
        "architecture": architecture,
        "os": "linux",
        "created": created,
        "config": {"Env": ["PATH=/bin:/usr/bin"], "Cmd": ["sh"], **(config or {})},
        "rootfs": {"type": "layers", "diff_ids": [digest_of(tar) for tar in tars]},
        "history": [{"created": created, "created_by": f"layer {n}"} for n in range(len(tars))],
    }
    if variant:
        document["variant"] = variant
    config_data = json.dumps(document).encode()
    layers = [squeeze(tar, compression) for tar in tars]
    if docker:
        layer_type = DOCKER_LAYER + (f".{compression}" if compression else "")
    else:
        layer_type = OCI_LAYER + (f"+{compression}" if compression else "")
    manifest: dict[str, Any] = {
        "schemaVersion": 2,
        "mediaType": DOCKER_MANIFEST if docker else OCI_MANIFEST,
        "config": blobs.add(config_data, DOCKER_CONFIG if docker else OCI_CONFIG),
        "layers": [blobs.add(layer, layer_type) for layer in layers],
    }
    data = json.dumps(manifest, indent=3).encode()
    described = {"architecture": architecture, "os": "linux"}
    if variant:
        described["variant"] = variant
    descriptor = blobs.add(data, manifest["mediaType"], platform=described)
    return BuiltImage(descriptor, data, config_data, list(tars), layers)


def index_of(
    blobs: Blobs, images: Sequence[BuiltImage], *, docker: bool = False
) -> tuple[dict[str, Any], bytes]:
    """An index of `images` in `blobs`: its descriptor and bytes."""
    media_type = DOCKER_LIST if docker else OCI_INDEX
    document = {
        "schemaVersion": 2,
        "mediaType": media_type,
        "manifests": [image.descriptor for image in images],
    }
    data = json.dumps(document).encode()
    return blobs.add(data, media_type), data


def _write_tar(path: Path, members: Mapping[str, bytes | str | None]) -> Path:
    data = tar_of(members, mode=0o644)
    path.write_bytes(data)
    return path


def oci_archive(path: Path, blobs: Blobs, named: Sequence[tuple[str, dict[str, Any]]]) -> Path:
    """An OCI archive of everything in `blobs`; `named` gives (reference or "", descriptor)."""
    manifests = []
    for name, descriptor in named:
        entry = dict(descriptor)
        if name:
            entry["annotations"] = {"org.opencontainers.image.ref.name": name}
        manifests.append(entry)
    index = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": manifests}
    members: dict[str, bytes | str | None] = {
        "oci-layout": b'{"imageLayoutVersion": "1.0.0"}',
        "index.json": json.dumps(index).encode(),
    }
    for digest, data in blobs.by_digest.items():
        members[f"blobs/sha256/{digest[7:]}"] = data
    return _write_tar(path, members)


def docker_archive(path: Path, image: BuiltImage, tags: Sequence[str]) -> Path:
    """A docker-archive as `docker save` before 25 wrote it."""
    members: dict[str, bytes | str | None] = {}
    names: list[str] = []
    for position, tar in enumerate(image.tars):
        folder = hashlib.sha256(f"{position}{image.id}".encode()).hexdigest()
        members[folder] = None
        members[f"{folder}/VERSION"] = b"1.0"
        members[f"{folder}/json"] = json.dumps({"id": folder}).encode()
        members[f"{folder}/layer.tar"] = tar
        names.append(f"{folder}/layer.tar")
    config = f"{image.id[7:]}.json"
    members[config] = image.config
    manifest = [{"Config": config, "RepoTags": list(tags), "Layers": names}]
    members["manifest.json"] = json.dumps(manifest).encode()
    members["repositories"] = b"{}"
    return _write_tar(path, members)


def busybox_tar(extra: Mapping[str, bytes | str | None] | None = None) -> bytes:
    """The layer of a root file system that runs: busybox and a few directories."""
    files: dict[str, bytes | str | None] = dict.fromkeys(
        ("bin", "dev", "etc", "proc", "root", "sys", "tmp", "usr", "usr/bin", "var", "home")
    )
    files["bin/busybox"] = Path(BUSYBOX).read_bytes()
    files.update({f"bin/{applet}": "busybox" for applet in APPLETS})
    files["etc/passwd"] = (
        b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n"
        b"alice:x:1000:1000::/home:/bin/sh\n"
    )
    files["etc/group"] = b"root:x:0:\nwheel:x:10:root,alice\nalice:x:1000:\nnogroup:x:65534:\n"
    files.update(extra or {})
    return tar_of(files)


def busybox_archive(path: Path, name: str = "busybox:latest", **config: Any) -> Path:
    """An OCI archive with one busybox image called `name`; `config` is Docker's Config."""
    blobs = Blobs()
    image = build(blobs, [busybox_tar()], config=config)
    return oci_archive(path, blobs, [(name, image.descriptor)])


def many_layers(blobs: Blobs, count: int = 100, **options: Any) -> BuiltImage:
    """An image of busybox and `count` - 1 layers with one file each (`/layers/N`)."""
    tars = [busybox_tar({"layers": None})]
    tars += [tar_of({f"layers/{n}": f"{n}\n".encode()}) for n in range(1, count)]
    return build(blobs, tars, **options)


def many_layers_archive(path: Path, name: str = "hundred:latest", count: int = 100) -> Path:
    """An OCI archive with that image."""
    blobs = Blobs()
    image = many_layers(blobs, count)
    return oci_archive(path, blobs, [(name, image.descriptor)])


def has_busybox() -> bool:
    """Whether this machine has a static busybox to make images of."""
    return os.access(BUSYBOX, os.X_OK)
