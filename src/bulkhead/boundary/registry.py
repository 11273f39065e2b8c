"""The boundaries by name, imported only when asked for."""

from dataclasses import dataclass
from importlib import import_module

from bulkhead.boundary.seam import Boundary, Launcher
from bulkhead.errors import NotFound
from bulkhead.home import Home

_MODULES: dict[str, tuple[str, str]] = {
    "container": ("bulkhead.boundaries.container", "ContainerBoundary"),
    "sandbox": ("bulkhead.boundaries.sandbox", "SandboxBoundary"),
    "microvm": ("bulkhead.boundaries.microvm", "MicrovmBoundary"),
    "vm": ("bulkhead.boundaries.vm", "VmBoundary"),
}
"""Name: (module, class). The class is called with one `Services`."""

GUESTS = frozenset({"sandbox", "microvm", "vm"})
"""Those with a kernel of their own."""
GVISOR = "gvisor"
"""A kernel of the sandbox boundary that works on the host's files: it has no disks and no taps."""


@dataclass(frozen=True, slots=True)
class Services:
    """What a boundary may use of the rest of the project."""

    home: Home
    launcher: Launcher


def names() -> tuple[str, ...]:
    """The boundaries there are, whether or not they can run here."""
    return tuple(_MODULES)


def boundary(name: str, services: Services) -> Boundary:
    """The boundary called `name`; NotFound with the names there are."""
    entry = _MODULES.get(name)
    if entry is None:
        raise NotFound(f"unknown boundary {name!r}; there are: {', '.join(sorted(_MODULES))}")
    module, class_ = entry
    made: Boundary = getattr(import_module(module), class_)(services)
    return made
