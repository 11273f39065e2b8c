"""RPC: guest kernels (`kernel.*`)."""

import os

from bulkhead.boundaries.guest import kernels
from bulkhead.engine.calls import Call, Params, Table
from bulkhead.engine.core import Engine
from bulkhead.errors import Conflict, Invalid

METHODS = Table()


class Nothing(Params, frozen=True):
    """No parameters."""


class One(Params, frozen=True):
    """A kernel."""

    name: str


class Add(One, frozen=True):
    """A kernel image of the host, and a directory like /lib/modules/RELEASE, "" for none."""

    file: str
    modules: str = ""


@METHODS.method("kernel.list", Nothing)
async def list_(engine: Engine, params: Nothing, call: Call) -> list[dict[str, str]]:
    """Installed, added and pulled kernels."""
    found = await engine.blocking(lambda: kernels.kernels(engine.home))
    return [one.describe() for one in found]


@METHODS.method("kernel.add", Add)
async def add(engine: Engine, params: Add, call: Call) -> dict[str, str]:
    """Copy one in."""
    for path in (params.file, params.modules):
        if path and not os.path.isabs(path):
            raise Invalid(f"{path} is not an absolute path")
    made = await engine.blocking(
        lambda: kernels.add(engine.home, params.name, params.file, params.modules)
    )
    return made.describe()


@METHODS.method("kernel.pull", One)
async def pull(engine: Engine, params: One, call: Call) -> dict[str, str]:
    """Fetch one from the distribution."""
    made = await engine.blocking(lambda: kernels.pull(engine.home, params.name))
    return made.describe()


@METHODS.method("kernel.remove", One)
async def remove(engine: Engine, params: One, call: Call) -> dict[str, str]:
    """Remove one that no workload asks for by name."""
    users = [one.record.name for one in engine.workloads if one.record.kernel == params.name]
    if users:
        raise Conflict(f"the kernel {params.name} is in use by {', '.join(sorted(users))}")
    await engine.blocking(lambda: kernels.remove(engine.home, params.name))
    return {}
