"""Every method the engine answers, gathered from the `rpc_*` modules."""

from bulkhead.engine import (
    rpc_build,
    rpc_describe,
    rpc_exec,
    rpc_files,
    rpc_image,
    rpc_kernel,
    rpc_network,
    rpc_output,
    rpc_remote,
    rpc_snapshot,
    rpc_system,
    rpc_transfer,
    rpc_vm,
    rpc_volume,
    rpc_workload,
)
from bulkhead.engine.calls import Method

_MODULES = (
    rpc_build,
    rpc_describe,
    rpc_exec,
    rpc_files,
    rpc_image,
    rpc_kernel,
    rpc_network,
    rpc_output,
    rpc_remote,
    rpc_snapshot,
    rpc_system,
    rpc_transfer,
    rpc_vm,
    rpc_volume,
    rpc_workload,
)


def methods() -> dict[str, Method]:
    """Methods by name; a name defined twice is a defect."""
    table: dict[str, Method] = {}
    for module in _MODULES:
        for name, method in module.METHODS.items():
            if name in table:
                raise ValueError(f"method {name} is defined twice")
            table[name] = method
    return table
