"""What the SDK returns: Structs over the engine's JSON shapes, unknown members dropped."""

from typing import Any, TypeVar

import msgspec


class _Model(msgspec.Struct, rename="pascal", kw_only=True):
    """Base: members are the Engine API's, in snake case."""


class State(_Model):
    """A container's state, from `inspect`."""

    status: str = ""
    running: bool = False
    paused: bool = False
    restarting: bool = False
    oom_killed: bool = msgspec.field(default=False, name="OOMKilled")
    pid: int = 0
    exit_code: int | None = None
    error: str = ""
    started_at: str = ""
    finished_at: str = ""


class ContainerInfo(_Model):
    """A container, from `inspect`; `raw` is the whole answer."""

    id: str
    name: str = ""
    created: str = ""
    image: str = ""
    state: State = msgspec.field(default_factory=State)
    restart_count: int = 0
    raw: dict[str, Any] = msgspec.field(default_factory=dict, name="raw")


class Moved(_Model):
    """What a `move` came to; seconds.

    `way`: "ready first", "stopped first" or "stopped"; `gap`: nobody answered; `held`: new
    connections waited; `cut`: some had not ended in time.
    """

    id: str
    name: str
    boundary: str
    way: str
    gap: float = 0.0
    held: float = 0.0
    cut: bool = False


class ContainerSummary(_Model):
    """A container, from `list`."""

    id: str
    names: list[str] = []
    image: str = ""
    image_id: str = msgspec.field(default="", name="ImageID")
    command: str = ""
    created: int = 0
    state: str = ""
    status: str = ""
    labels: dict[str, str] | None = None


class Outcome(_Model):
    """How a container or an exec ended."""

    id: str = ""
    exit_code: int | None = None
    stdout: bytes = b""
    stderr: bytes = b""

    def check(self) -> "Outcome":
        """Itself, if the exit code is 0; Conflict with the end of stderr otherwise."""
        if self.exit_code != 0:
            from bulkhead.errors import Conflict

            said = self.stderr.decode(errors="replace").strip()[-400:]
            raise Conflict(f"exit code {self.exit_code}: {said or 'no output on stderr'}")
        return self


class ImageInfo(_Model):
    """An image, from `inspect`; `raw` is the whole answer."""

    id: str
    repo_tags: list[str] | None = None
    repo_digests: list[str] | None = None
    created: str = ""
    architecture: str = ""
    os: str = ""
    size: int = 0
    raw: dict[str, Any] = msgspec.field(default_factory=dict, name="raw")


class ImageSummary(_Model):
    """An image, from `list`."""

    id: str
    repo_tags: list[str] | None = None
    repo_digests: list[str] | None = None
    created: int = 0
    size: int = 0
    labels: dict[str, str] | None = None


class NetworkInfo(_Model):
    """A network; `raw` is the whole answer."""

    id: str
    name: str = ""
    driver: str = ""
    internal: bool = False
    labels: dict[str, str] | None = None
    raw: dict[str, Any] = msgspec.field(default_factory=dict, name="raw")


class VolumeInfo(_Model):
    """A volume."""

    name: str
    driver: str = ""
    mountpoint: str = ""
    labels: dict[str, str] | None = None


class Actor(_Model):
    """What an event is about."""

    id: str = msgspec.field(default="", name="ID")
    attributes: dict[str, str] | None = None


class Event(_Model):
    """Something that happened."""

    type: str = ""
    action: str = ""
    actor: Actor = msgspec.field(default_factory=Actor)
    time_nano: int = msgspec.field(default=0, name="timeNano")


M = TypeVar("M", bound=_Model)


def typed(kind: type[M], found: dict[str, Any]) -> M:
    """`found` as a `kind`; its `raw` member, if it has one, holds everything."""
    if "raw" in kind.__struct_fields__:
        found = {**found, "raw": found}
    return msgspec.convert(found, kind)
