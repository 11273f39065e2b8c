"""Cache keys: what a step's result depends on, and nothing else.

A RUN depends on the layers below it (by content), its command, environment, user, directory,
mounts, network and the build arguments it sees; a COPY on what it copies (see `copying`). Times,
names of stages, progress and the place of the step in the file take no part.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence

_VERSION = "1"
"""Changed when the meaning of a step changes: old results are then not found."""


def key(kind: str, **parts: object) -> str:
    """The key of these parts, which must be JSON."""
    text = json.dumps([_VERSION, kind, parts], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def run(
    *,
    layers: Sequence[str],
    args: Sequence[str],
    documents: Sequence[tuple[str, str]],
    env: Sequence[str],
    user: str,
    directory: str,
    mounts: Sequence[Mapping[str, object]],
    network: str,
    boundary: str,
    platform: str,
    epoch: int | None,
    privileged: bool = False,
) -> str:
    """Of a RUN. `env` is in the order the image has it; arguments are in it."""
    further = {"privileged": True} if privileged else {}
    return key(
        "run", layers=list(layers), args=list(args), documents=[list(d) for d in documents],
        env=sorted(env), user=user, directory=directory, mounts=[dict(m) for m in mounts],
        network=network, boundary=boundary, platform=platform, epoch=epoch, **further,
    )  # fmt: skip


def copy(*, digest: str, epoch: int | None) -> str:
    """Of a layer made of a plan with this digest."""
    return key("copy", digest=digest, epoch=epoch)
