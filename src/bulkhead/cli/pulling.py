"""Pulling an image, for `pull` and for a `run` that lacks it."""

from typing import TYPE_CHECKING, Any, TextIO

from bulkhead.cli.progress import Progress

if TYPE_CHECKING:
    from bulkhead.cli.command import Context


def follow(
    context: "Context",
    method: str,
    params: dict[str, Any],
    progress: Progress,
    fds: tuple[int, ...] = (),
) -> Any:
    """Run a request whose items are progress messages; its result."""
    items = context.stream(method, params, fds)
    try:
        while True:
            try:
                progress.update(next(items))
            except StopIteration as end:
                return end.value
    finally:
        progress.close()


def pull(
    context: "Context",
    image: str,
    *,
    platform: str,
    quiet: bool,
    stream: TextIO,
    everything: bool = False,
) -> dict[str, Any]:
    """Pull `image` with the caller's credentials, telling `stream`; {"Id", "Digest", …}.

    `everything`: all tags of the repository `image`; the result is that of the last one.
    """
    from bulkhead.cli.credentials import find

    params: dict[str, Any] = {"name": image}
    if platform:
        params["platform"] = platform
    if everything:
        params["all"] = True
    auth = find(context, image)
    if auth:
        params["auth"] = auth
    result: dict[str, Any] = follow(context, "image.pull", params, Progress(stream, quiet=quiet))
    return result or {}
