"""Every method the engine answers, gathered from the `rpc_*` modules."""

from bulkhead.engine import rpc_image, rpc_system, rpc_workload
from bulkhead.engine.calls import Method


def methods() -> dict[str, Method]:
    """Methods by name; a name defined twice is a defect."""
    table: dict[str, Method] = {}
    for module in (rpc_image, rpc_system, rpc_workload):
        for name, method in module.METHODS.items():
            if name in table:
                raise ValueError(f"method {name} is defined twice")
            table[name] = method
    return table
