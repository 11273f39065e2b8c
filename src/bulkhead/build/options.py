"""What a build is asked for."""

import re

import msgspec

from bulkhead.errors import Invalid

ENTITLEMENTS = ("network.host", "security.insecure")
OUTPUTS = ("tar", "oci", "docker")
"""The image's files; or the image, as one of `images.archive_write.FORMATS`."""


class Options(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The parameters of `build.run`; paths are relative to the context."""

    tags: list[str] = []
    dockerfile: str = ""
    dockerfile_data: bytes | None = None
    ignore_data: bytes | None = None
    args: dict[str, str] = {}
    target: str = ""
    no_cache: bool = False
    pull: bool = False
    platform: str = ""
    labels: dict[str, str] = {}
    secrets: dict[str, bytes] = {}
    ssh: dict[str, str] = {}
    network: str = ""
    squash: bool = False
    boundary: str = ""
    cache_from: list[str] = []
    cache_to: list[str] = []
    provenance: bool = False
    sbom: bool = False
    limits: dict[str, object] = {}
    auths: dict[str, dict[str, str]] = {}
    format: str = "events"
    context: str = "archive"
    """What the descriptor is: "archive", "directory", "none"; or "remote": none, but `remote`."""
    remote: str = ""
    """A git repository, or the URL of an archive or a Dockerfile, that is the context."""
    allow: list[str] = []
    """What steps of the file may ask for, of `ENTITLEMENTS`."""
    outputs: list[str] = []
    """What to write to the further descriptors, in their order, of `OUTPUTS`."""
    store: bool = True
    """Whether the image gets its names here."""
    push: bool = False
    """Whether it is pushed under its names."""
    source: str = ""
    """What the user called the context, for provenance."""

    @property
    def epoch(self) -> int | None:
        """SOURCE_DATE_EPOCH in seconds; Invalid if it is no number."""
        text = self.args.get("SOURCE_DATE_EPOCH", "")
        if not text:
            return None
        if not re.fullmatch(r"\d{1,12}", text):
            raise Invalid(f"SOURCE_DATE_EPOCH must be seconds since 1970, not {text!r}")
        return int(text)
