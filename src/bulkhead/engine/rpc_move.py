"""RPC: a workload behind another boundary (`workload.move`)."""

from typing import Any

from bulkhead.boundary import registry
from bulkhead.engine.calls import Call, Params, Table
from bulkhead.engine.core import Engine
from bulkhead.errors import Invalid

METHODS = Table()


class Move(Params, frozen=True):
    """Which, and where to; seconds."""

    id: str
    to: str
    kernel: str = ""
    timeout_s: float = 60.0
    drain_s: float = 10.0
    stop_first: bool = False


@METHODS.method("workload.move", Move)
async def move(engine: Engine, params: Move, call: Call) -> dict[str, Any]:
    """Put a workload behind another boundary; items say what happens."""
    from bulkhead.engine import moving  # most engines never move anything

    if params.to not in registry.names():
        raise Invalid(f"unknown boundary {params.to!r}; there are {', '.join(registry.names())}")
    workload = engine.workloads.find(params.id)
    wish = moving.Wish(
        params.to, params.kernel, params.timeout_s, params.drain_s, params.stop_first
    )
    made = await moving.move(engine, workload, wish, lambda text: call.send({"Step": text}))
    return {
        "Id": made.workload.id,
        "Name": made.workload.record.name,
        "Boundary": made.workload.record.boundary,
        "Way": made.way,
        "Gap": round(made.gap_s, 3),
        "Held": round(made.held_s, 3),
        "Cut": made.cut,
    }
