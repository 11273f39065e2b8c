"""The image specification as typed data: descriptors, manifests, indexes, configurations.

OCI image-spec 1.1 and its elder, Docker's image manifest version 2 schema 2, are read by the same
types; what differs is the media type. Reading is strict about what is used (types, digests, sizes,
counts) and ignores the rest; the original bytes are what is stored and sent, never a re-encoding.
"""

from typing import Any

import msgspec

from bulkhead.errors import Corrupt, Invalid, Unsupported
from bulkhead.oci.digest import check

OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar"
DOCKER_SCHEMA1 = (
    "application/vnd.docker.distribution.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v1+prettyjws",
)
INDEXES = (OCI_INDEX, DOCKER_LIST)
MANIFESTS = (OCI_MANIFEST, DOCKER_MANIFEST)
CONFIGS = (OCI_CONFIG, DOCKER_CONFIG)

COMPRESSION: dict[str, str] = {
    OCI_LAYER: "",
    OCI_LAYER + "+gzip": "gzip",
    OCI_LAYER + "+zstd": "zstd",
    "application/vnd.oci.image.layer.nondistributable.v1.tar": "",
    "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip": "gzip",
    "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd": "zstd",
    DOCKER_LAYER: "",
    DOCKER_LAYER + ".gzip": "gzip",
    DOCKER_LAYER + ".zstd": "zstd",
    "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip": "gzip",
}
"""Layer media types and the compression each one says."""

LARGEST_MANIFEST = 4 << 20
"""Bytes; what distribution-spec tells registries to accept at least."""
LARGEST_CONFIG = 8 << 20
MOST_LAYERS = 500
"""The kernel's overlay takes so many lower directories (OVL_MAX_STACK, fs/overlayfs)."""
LARGEST_BLOB = 1 << 40
MOST_MANIFESTS = 1000


class Platform(msgspec.Struct, omit_defaults=True, frozen=True):
    """What an image runs on, in Go's words ("linux", "amd64", "v8")."""

    architecture: str = ""
    os: str = ""
    variant: str = ""
    os_version: str = msgspec.field(default="", name="os.version")
    os_features: list[str] = msgspec.field(default_factory=list, name="os.features")

    def __str__(self) -> str:
        return "/".join(part for part in (self.os, self.architecture, self.variant) if part)


class Descriptor(msgspec.Struct, rename="camel", omit_defaults=True):
    """A typed pointer to a blob: OCI content descriptor."""

    media_type: str = ""
    digest: str = ""
    size: int = -1
    urls: list[str] = msgspec.field(default_factory=list)
    annotations: dict[str, str] = msgspec.field(default_factory=dict)
    platform: Platform | None = None
    artifact_type: str = ""

    def validate(self, what: str, largest: int = LARGEST_BLOB) -> None:
        """Invalid unless digest and size are possible; `what` names it, `largest` is in bytes."""
        check(self.digest, where=what)
        if not 0 <= self.size <= largest:
            raise Invalid(
                f"{what} {self.digest} claims {self.size} bytes; allowed are 0 to {largest}"
            )


def _two() -> int:
    return 2


class Manifest(msgspec.Struct, rename="camel", omit_defaults=True):
    """One image for one platform."""

    config: Descriptor
    layers: list[Descriptor]
    schema_version: int = msgspec.field(default_factory=_two)  # a factory: never omitted
    media_type: str = ""
    artifact_type: str = ""
    subject: Descriptor | None = None
    annotations: dict[str, str] = msgspec.field(default_factory=dict)


class Index(msgspec.Struct, rename="camel", omit_defaults=True):
    """Several manifests, usually one per platform."""

    manifests: list[Descriptor]
    schema_version: int = msgspec.field(default_factory=_two)  # a factory: never omitted
    media_type: str = ""
    artifact_type: str = ""
    subject: Descriptor | None = None
    annotations: dict[str, str] = msgspec.field(default_factory=dict)


class Healthcheck(msgspec.Struct, rename="pascal", omit_defaults=True):
    """Docker's HEALTHCHECK; times in nanoseconds, 0 means inherit."""

    test: list[str] | None = None
    interval: int = 0
    timeout: int = 0
    start_period: int = 0
    start_interval: int = 0
    retries: int = 0


class ContainerConfig(msgspec.Struct, rename="pascal", omit_defaults=True):
    """What a workload made from the image starts with (`config` of the image configuration)."""

    hostname: str = ""
    domainname: str = ""
    user: str = ""
    exposed_ports: dict[str, Any] | None = None
    env: list[str] | None = None
    cmd: list[str] | None = None
    args_escaped: bool = False
    healthcheck: Healthcheck | None = None
    volumes: dict[str, Any] | None = None
    working_dir: str = ""
    entrypoint: list[str] | None = None
    on_build: list[str] | None = None
    labels: dict[str, str] | None = None
    stop_signal: str = ""
    stop_timeout: int | None = None
    shell: list[str] | None = None


class RootFS(msgspec.Struct):
    """The digests of the uncompressed layers, lowest first."""

    type: str = "layers"
    diff_ids: list[str] = []


class History(msgspec.Struct, omit_defaults=True):
    """How one layer, or a change of configuration only (`empty_layer`), came to be."""

    created: str | None = None
    created_by: str = ""
    author: str = ""
    comment: str = ""
    empty_layer: bool = False


class ImageConfig(msgspec.Struct, omit_defaults=True):
    """The image configuration; its digest is the image's id."""

    architecture: str = ""
    os: str = ""
    config: ContainerConfig | None = None
    rootfs: RootFS = msgspec.field(default_factory=RootFS)
    history: list[History] | None = None
    created: str | None = None
    author: str = ""
    variant: str = ""
    os_version: str = msgspec.field(default="", name="os.version")
    os_features: list[str] = msgspec.field(default_factory=list, name="os.features")
    comment: str = ""
    parent: str = ""
    docker_version: str = ""

    @property
    def platform(self) -> Platform:
        """The platform it was built for."""
        return Platform(self.architecture, self.os, self.variant, self.os_version, self.os_features)

    @property
    def container(self) -> ContainerConfig:
        """`config`, empty if the image has none."""
        return self.config or ContainerConfig()


_manifest = msgspec.json.Decoder(Manifest)
_index = msgspec.json.Decoder(Index)
_config = msgspec.json.Decoder(ImageConfig)
_any = msgspec.json.Decoder(dict[str, Any])
_encoder = msgspec.json.Encoder()


def encode(document: msgspec.Struct) -> bytes:
    """JSON of one of this module's types, as it is to be stored."""
    return _encoder.encode(document)


def decode_object(data: bytes, what: str) -> dict[str, Any]:
    """Any JSON object; Corrupt, naming `what`, if `data` is none."""
    try:
        return _any.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Corrupt(f"{what} is not a JSON object: {error}") from error


def media_type_of(document: dict[str, Any], declared: str, what: str) -> str:
    """Which kind of manifest `document` is, given the media type it was `declared` with.

    `declared` is an HTTP Content-Type or a descriptor's media type, "" if there was none. A
    document that says two things at once is refused (CVE-2021-41190): image-spec, "mediaType".
    """
    inside = document.get("mediaType")
    inside = inside if isinstance(inside, str) else ""
    declared = declared.partition(";")[0].strip().lower()
    known = (*INDEXES, *MANIFESTS, *DOCKER_SCHEMA1)
    if document.get("schemaVersion") == 1 or declared in DOCKER_SCHEMA1 or "fsLayers" in document:
        raise Unsupported(
            f"{what} is a Docker image manifest version 2 schema 1, which has no verifiable layer "
            "digests and is not supported; push the image again with a current docker or skopeo"
        )
    if inside and declared in known and declared != inside:
        raise Corrupt(f"{what} was declared as {declared} but calls itself {inside}")
    kind = inside or (declared if declared in known else "")
    has_manifests, has_layers = "manifests" in document, "layers" in document
    if has_manifests and (has_layers or "config" in document):
        raise Corrupt(f"{what} is both an index and a manifest")
    if not kind:
        kind = OCI_INDEX if has_manifests else OCI_MANIFEST
    if kind not in known:
        raise Unsupported(f"{what} has media type {kind!r}, which is not an image")
    if (kind in INDEXES) != has_manifests:
        raise Corrupt(f"{what} has media type {kind} but not its members")
    return kind


def _decode(decoder: msgspec.json.Decoder[Any], data: bytes, what: str) -> Any:
    try:
        return decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Corrupt(f"{what} cannot be read: {error}") from error


def decode_manifest(data: bytes, declared: str = "", what: str = "manifest") -> Manifest:
    """A checked manifest; its `media_type` is filled in. Corrupt, Invalid or Unsupported if not."""
    kind = media_type_of(decode_object(data, what), declared, what)
    if kind not in MANIFESTS:
        raise Corrupt(f"{what} is an index where an image manifest was expected")
    manifest: Manifest = _decode(_manifest, data, what)
    if manifest.schema_version != 2:
        raise Unsupported(f"{what} has schemaVersion {manifest.schema_version}; only 2 is known")
    manifest.media_type = kind
    manifest.config.validate(f"{what}: config", LARGEST_CONFIG)
    if manifest.config.media_type not in CONFIGS:
        raise Unsupported(
            f"{what} is an artifact ({manifest.config.media_type or 'no media type'}), not an image"
        )
    if len(manifest.layers) > MOST_LAYERS:
        raise Invalid(
            f"{what} has {len(manifest.layers)} layers; at most {MOST_LAYERS} can be used"
        )
    for layer in manifest.layers:
        layer.validate(f"{what}: layer")
        compression_of(layer, what)
    return manifest


def decode_index(
    data: bytes, declared: str = "", what: str = "index", most: int = MOST_MANIFESTS
) -> Index:
    """A checked index; its `media_type` is filled in. Corrupt, Invalid or Unsupported if not.

    It may list `most` manifests.
    """
    kind = media_type_of(decode_object(data, what), declared, what)
    if kind not in INDEXES:
        raise Corrupt(f"{what} is a manifest where an index was expected")
    index: Index = _decode(_index, data, what)
    index.media_type = kind
    if len(index.manifests) > most:
        raise Invalid(f"{what} lists {len(index.manifests)} manifests; at most {most}")
    for entry in index.manifests:
        entry.validate(f"{what}: manifest", LARGEST_MANIFEST)
    return index


def blobs_of(data: bytes, what: str) -> list[Descriptor]:
    """The config and layers any manifest refers to, be it an image, an artifact or an attestation.

    Digests and sizes are checked, media types are not.
    """
    manifest: Manifest = _decode(_manifest, data, what)
    blobs = [manifest.config, *manifest.layers]
    for blob in blobs:
        blob.validate(what)
    return blobs


def decode_config(data: bytes, what: str = "image configuration") -> ImageConfig:
    """A checked image configuration."""
    config: ImageConfig = _decode(_config, data, what)
    if config.rootfs.type != "layers":
        raise Unsupported(f"{what} has a root file system of type {config.rootfs.type!r}")
    if len(config.rootfs.diff_ids) > MOST_LAYERS:
        raise Invalid(f"{what} has {len(config.rootfs.diff_ids)} layers; at most {MOST_LAYERS}")
    for diff_id in config.rootfs.diff_ids:
        check(diff_id, where=f"a layer of {what}")
    return config


def compression_of(layer: Descriptor, what: str = "manifest") -> str:
    """The compression a layer's media type states: "gzip", "zstd" or ""; Unsupported if unknown."""
    try:
        return COMPRESSION[layer.media_type]
    except KeyError:
        raise Unsupported(
            f"{what}: layer {layer.digest} has media type {layer.media_type!r}, which is unknown "
            "(an encrypted or foreign layer?)"
        ) from None
