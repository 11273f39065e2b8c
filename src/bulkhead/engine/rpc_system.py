"""RPC: the engine itself (`system.*`)."""

from typing import Any

from bulkhead.engine.calls import Call, Nothing, Table
from bulkhead.engine.core import Engine
from bulkhead.rpc import wire

METHODS = Table()


@METHODS.method("system.ping", Nothing)
async def ping(engine: Engine, params: Nothing, call: Call) -> dict[str, Any]:
    """Whether the engine answers, and the version of the protocol it speaks."""
    return {"pong": True, "protocol": wire.VERSION, "pid": engine.pid}
