"""The engine's answers in the shape that the client's version of the API has. Pure."""

from typing import Any

Version = tuple[int, int]


def summary(one: dict[str, Any], version: Version) -> dict[str, Any]:
    """ContainerSummary."""
    if version < (1, 48) and "Health" in one:
        one.pop("Health")
    return one


def container(one: dict[str, Any], version: Version) -> dict[str, Any]:
    """ContainerInspectResponse."""
    host = one["HostConfig"]
    if host.get("ConsoleSize") is None:
        host["ConsoleSize"] = [0, 0]
    return one


def image(one: dict[str, Any], version: Version) -> dict[str, Any]:
    """ImageInspect and ImageSummary: until 1.43 the size is given twice."""
    if version < (1, 44) and "Size" in one:
        one["VirtualSize"] = one["Size"]
    else:
        one.pop("VirtualSize", None)
    return one
