"""`/bulkhead/…`: what Docker's API has no words for (docs/api-extensions.yaml)."""

from typing import Any

from bulkhead.api.exchange import Exchange
from bulkhead.api.routes import ROUTES
from bulkhead.engine import body


@ROUTES.add("GET", "/bulkhead/boundaries")
async def boundaries(x: Exchange) -> list[dict[str, Any]]:
    """The boundaries there are, and what each can do on this host."""
    found: list[dict[str, Any]] = await x.call("system.boundaries")
    return found


@ROUTES.add("GET", "/bulkhead/doctor")
async def doctor(x: Exchange) -> list[dict[str, str]]:
    """What this host offers and lacks."""
    found: list[dict[str, str]] = await x.call("system.doctor")
    return found


@ROUTES.add("GET", "/bulkhead/containers/{id}/explain")
async def explain(x: Exchange) -> dict[str, Any]:
    """What the kernel says of a container."""
    found: dict[str, Any] = await x.call("workload.explain", {"id": x.at["id"]})
    return found


@ROUTES.add("POST", "/bulkhead/containers/plan")
async def plan(x: Exchange) -> dict[str, Any]:
    """The steps that a start would take; nothing is made."""
    request = await x.json(body.CreateBody)
    found: dict[str, Any] = await x.call("workload.plan", {"body": request, "name": x.text("name")})
    return found
