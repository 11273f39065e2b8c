"""What the engine holds of a running container so that its end is quick.

The last process of a mount namespace takes it apart before anybody hears of its end: file systems
are shut down one by one, the overlay writes its upper layer back. While somebody else has the
namespace and the root, that is left to whoever closes them.
"""

from bulkhead.boundary.seam import Bundle, Launched
from bulkhead.isolation import mounts
from bulkhead.linux import pidfd
from bulkhead.linux.fds import OwnedFd


def hold(bundle: Bundle, root: OwnedFd | None, launched: Launched) -> list[OwnedFd]:
    """The mount namespace (Linux 6.11), and the overlay if it was mounted here.

    Not a namespace with something of the host's in it that others may want back at its end.
    """
    held = []
    own = f"{bundle.directory}/"
    binds = (one for one in bundle.spec.mounts if mounts.is_bind(one))
    if launched.pidfd is not None and all(one.source.startswith(own) for one in binds):
        namespace = pidfd.mount_namespace(launched.pidfd)
        if namespace is not None:
            held.append(namespace)
    if root is not None:
        held.append(root)
    return held


def let_go(held: list[OwnedFd]) -> None:
    """Unmount it all, now; for any thread."""
    while held:
        held.pop(0).close()
