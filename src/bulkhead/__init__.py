"""bulkhead: any OCI image behind the isolation boundary its workload needs."""

TYPE_CHECKING = False  # mypy knows the name; typing itself costs 14 ms of every start
if TYPE_CHECKING:
    from bulkhead.client.aio import AsyncClient as AsyncClient
    from bulkhead.client.sdk import Client as Client


def __getattr__(name: str) -> object:
    """`from bulkhead import Client`, imported at first use (PEP 562)."""
    if name == "Client":
        from bulkhead.client.sdk import Client

        return Client
    if name == "AsyncClient":
        from bulkhead.client.aio import AsyncClient

        return AsyncClient
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
