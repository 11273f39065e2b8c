"""Every method the engine answers, gathered from the `rpc_*` modules."""

from collections.abc import Callable, Iterator, Mapping

from bulkhead.engine import (
    rpc_build,
    rpc_describe,
    rpc_exec,
    rpc_files,
    rpc_image,
    rpc_kernel,
    rpc_move,
    rpc_network,
    rpc_output,
    rpc_remote,
    rpc_snapshot,
    rpc_system,
    rpc_transfer,
    rpc_volume,
    rpc_workload,
)
from bulkhead.engine.calls import Method, Table

_MODULES = (
    rpc_build,
    rpc_describe,
    rpc_exec,
    rpc_files,
    rpc_image,
    rpc_kernel,
    rpc_move,
    rpc_network,
    rpc_output,
    rpc_remote,
    rpc_snapshot,
    rpc_system,
    rpc_transfer,
    rpc_volume,
    rpc_workload,
)


def _machines() -> Table:
    from bulkhead.engine import rpc_vm

    return rpc_vm.METHODS


_LATER: dict[str, Callable[[], Table]] = {"vm": _machines, "machine": _machines}
"""By the first word of their names: methods whose modules most engines never need (2 MB)."""


class Methods(Mapping[str, Method]):
    """Methods by name; a name defined twice is a defect."""

    def __init__(self) -> None:
        self._known: dict[str, Method] = {}
        for module in _MODULES:
            self._take(module.METHODS)

    def _take(self, table: Table) -> None:
        for name, method in table.items():
            if self._known.setdefault(name, method) is not method:
                raise ValueError(f"method {name} is defined twice")

    def __getitem__(self, name: str) -> Method:
        if name not in self._known and (load := _LATER.get(name.partition(".")[0])):
            self._take(load())
        return self._known[name]

    def __iter__(self) -> Iterator[str]:
        for load in _LATER.values():
            self._take(load())
        return iter(self._known)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def methods() -> Methods:
    """All of them."""
    return Methods()
