"""What a builder needs of the engine: roots to look into, and steps to be run."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

from bulkhead.images.service import ImageService
from bulkhead.store.content import ContentStore


@dataclass(slots=True)
class Bind:
    """A path of the host mounted into a step; `tmpfs` options instead if there is no `source`."""

    target: str
    source: str = ""
    readonly: bool = False
    tmpfs: str = ""


@dataclass(slots=True)
class Job:
    """One RUN step."""

    layers: Sequence[str]
    image: str
    """The id of the image it began with, for records; "" for scratch."""
    args: Sequence[str]
    env: Sequence[str]
    user: str
    directory: str
    binds: Sequence[Bind] = ()
    network: str = ""
    boundary: str = ""
    platform: str = ""
    privileged: bool = False
    limits: dict[str, Any] = field(default_factory=dict)
    """Members of HostConfig."""
    private: Sequence[str] = ()
    """Further variables, which must not reach a disk."""
    latest_ns: int | None = None
    """No time in the layer is later."""


Output = Callable[[int, bytes], None]
"""Told the stream (1 or 2) and what was written to it."""


class Host(Protocol):
    """The engine, for a builder's threads. Methods block."""

    store: ContentStore
    images: ImageService

    def root(self, layers: Sequence[str]) -> AbstractContextManager[int]:
        """A descriptor of the layers' union, read-only; bottom layer first."""
        ...

    def place(self, layers: Sequence[str], *, writable: bool) -> AbstractContextManager[str]:
        """A path where the layers' union is mounted; what is written to it is thrown away."""
        ...

    def run(
        self,
        job: Job,
        output: Output,
        stop: threading.Event,
        keep: Callable[[Iterator[bytes]], None],
    ) -> int:
        """Run a step; its exit code. After 0, `keep` is called with the tar of what it changed."""
        ...

    def scratch(self) -> AbstractContextManager[str]:
        """A directory in memory for what must not reach a disk."""
        ...
