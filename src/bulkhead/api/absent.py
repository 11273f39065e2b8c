"""Swarm and plugins: answered as by a daemon that is no swarm manager and has no plugins."""

from typing import Any

from bulkhead.api.answers import Failed, Reply
from bulkhead.api.exchange import Exchange
from bulkhead.api.routes import ROUTES
from bulkhead.errors import NotFound

NO_MANAGER = (
    'This node is not a swarm manager. Use "docker swarm init" or "docker swarm join" to connect '
    "this node to swarm and try again."
)
_SWARM = (
    ("GET", "/nodes"), ("GET", "/nodes/{id}"), ("DELETE", "/nodes/{id}"),
    ("POST", "/nodes/{id}/update"), ("GET", "/swarm"), ("POST", "/swarm/update"),
    ("GET", "/swarm/unlockkey"), ("POST", "/swarm/unlock"), ("GET", "/services"),
    ("POST", "/services/create"), ("GET", "/services/{id}"), ("DELETE", "/services/{id}"),
    ("POST", "/services/{id}/update"), ("GET", "/services/{id}/logs"), ("GET", "/tasks"),
    ("GET", "/tasks/{id}"), ("GET", "/tasks/{id}/logs"), ("GET", "/secrets"),
    ("POST", "/secrets/create"), ("GET", "/secrets/{id}"), ("DELETE", "/secrets/{id}"),
    ("POST", "/secrets/{id}/update"), ("GET", "/configs"), ("POST", "/configs/create"),
    ("GET", "/configs/{id}"), ("DELETE", "/configs/{id}"), ("POST", "/configs/{id}/update"),
)  # fmt: skip
_JOINING = (("POST", "/swarm/init"), ("POST", "/swarm/join"))
_PLUGINS = (
    ("GET", "/plugins/privileges"),
    ("POST", "/plugins/pull"),
    ("POST", "/plugins/create"),
)
_ONE_PLUGIN = (
    ("GET", "/plugins/{name*}/json"), ("POST", "/plugins/{name*}/enable"),
    ("POST", "/plugins/{name*}/disable"), ("POST", "/plugins/{name*}/upgrade"),
    ("POST", "/plugins/{name*}/push"), ("POST", "/plugins/{name*}/set"),
    ("DELETE", "/plugins/{name*}"),
)  # fmt: skip


async def _no_manager(x: Exchange) -> Reply:
    raise Failed(503, NO_MANAGER)


async def _no_swarm(x: Exchange) -> Reply:
    raise Failed(501, "swarm mode is not supported: this engine serves one machine")


async def _no_plugins(x: Exchange) -> Reply:
    raise Failed(501, "plugins are not supported")


async def _no_such_plugin(x: Exchange) -> Reply:
    raise NotFound(f'plugin "{x.at["name"]}" not found')


@ROUTES.add("POST", "/swarm/leave")
async def leave(x: Exchange) -> Reply:
    """There is nothing to leave."""
    raise Failed(503, "This node is not part of a swarm")


@ROUTES.add("GET", "/plugins")
async def plugins(x: Exchange) -> list[dict[str, Any]]:
    """None."""
    x.filters()
    return []


for _routes, _handler in (
    (_SWARM, _no_manager),
    (_JOINING, _no_swarm),
    (_PLUGINS, _no_plugins),
    (_ONE_PLUGIN, _no_such_plugin),
):
    for _method, _path in _routes:
        ROUTES.add(_method, _path)(_handler)
