"""--output: the image's files, or the image as an archive, to descriptors of the client's."""

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from bulkhead.build.options import OUTPUTS
from bulkhead.errors import Invalid, Unavailable
from bulkhead.images.assemble import Stored
from bulkhead.oci.reference import Reference
from bulkhead.store import diff, tar_write

if TYPE_CHECKING:
    from bulkhead.build.builder import Builder
    from bulkhead.build.steps import State


def check(wanted: Sequence[str], fds: Sequence[int]) -> None:
    """Invalid for an output that there is not, or one without a descriptor."""
    for kind in wanted:
        if kind not in OUTPUTS:
            raise Invalid(f"unknown output {kind!r}; there are {', '.join(OUTPUTS)}")
    if len(wanted) != len(fds):
        raise Invalid(f"{len(wanted)} outputs, but {len(fds)} descriptors for them")


def write(
    builder: "Builder",
    state: "State",
    stored: Stored,
    references: Sequence[Reference],
    fds: Sequence[int],
) -> None:
    """Write each output to its descriptor, which stays open."""
    for kind, fd in zip(builder.options.outputs, fds, strict=True):
        step = builder.reporter.step(f"exporting as {kind}", stage=-1, text="", line=0)
        try:
            if kind == "tar":
                _all(fd, _files(builder, state))
            else:
                with open(fd, "wb", buffering=1 << 20, closefd=False) as out:
                    builder.host.images.export(stored, references, out, kind)
        except BrokenPipeError:
            raise Unavailable(f"the reader of the {kind} output went away") from None
        step.done()


def _files(builder: "Builder", state: "State") -> Iterator[bytes]:
    """The image's root as a tar."""
    if not state.layers:
        yield tar_write.END
        return
    with builder.host.root(state.layers) as root:
        for piece in diff.tar_tree(f"/proc/self/fd/{root}/."):
            builder.check()
            yield piece


def _all(fd: int, pieces: Iterable[bytes]) -> None:
    for piece in pieces:
        view = memoryview(piece)
        while view:
            view = view[os.write(fd, view) :]
