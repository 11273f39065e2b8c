"""Who may know which name: the index behind the resolver.

An asker sees the names of workloads on networks it is on itself, and nothing of any other. Names on
the default bridge are not indexed (as with Docker, only user-defined networks have names).
"""

import re
from collections.abc import Iterable
from socket import AF_INET, AF_INET6, inet_pton
from typing import Any

_IDENTITY = re.compile(r"[0-9a-f]{64}")


class Names:
    """Names and addresses of attached workloads, by network."""

    def __init__(self) -> None:
        self._names: dict[str, dict[str, dict[str, tuple[str, str]]]] = {}
        """network -> name -> workload -> (IPv4 or "", IPv6 or "")"""
        self._addresses: dict[str, dict[str, tuple[str, str]]] = {}
        """network -> address -> (workload, its first name)"""
        self._own: dict[str, dict[str, tuple[list[str], list[str]]]] = {}
        """workload -> network (in its own order) -> (names, addresses)"""
        self._links: dict[str, dict[str, dict[str, str]]] = {}
        """workload -> network -> what it alone calls another -> that one's name"""

    def put(self, workload: str, endpoints: Iterable[dict[str, Any]]) -> None:
        """Know a workload by its endpoints (maps with network, network_name, ipv4, ipv6, names).

        A member `request` may have links: "name:alias" of others, for this workload alone.
        """
        self.drop(workload)
        own: dict[str, tuple[list[str], list[str]]] = {}
        for endpoint in endpoints:
            links = (endpoint.get("request") or {}).get("links") or ()
            for name, _, alias in (str(one).lower().partition(":") for one in links):
                known = self._links.setdefault(workload, {}).setdefault(endpoint["network"], {})
                known[alias or name] = name[:12] if _IDENTITY.fullmatch(name) else name
            names = [str(name).lower() for name in endpoint.get("names") or ()]
            if not names:
                continue
            network = endpoint["network"]
            suffix = str(endpoint.get("network_name") or "").lower()
            full = names + [f"{name}.{suffix}" for name in names if suffix]
            pair = (str(endpoint.get("ipv4") or ""), str(endpoint.get("ipv6") or ""))
            index = self._names.setdefault(network, {})
            for name in full:
                index.setdefault(name, {})[workload] = pair
            addresses = self._addresses.setdefault(network, {})
            shown = f"{names[0]}.{suffix}" if suffix else names[0]
            for address in filter(None, pair):
                addresses[address] = (workload, shown)
            own[network] = (full, [one for one in pair if one])
        self._own[workload] = own

    def drop(self, workload: str) -> None:
        """Know it no more."""
        self._links.pop(workload, None)
        for network, (names, held) in self._own.pop(workload, {}).items():
            index, addresses = self._names[network], self._addresses[network]
            for name in names:
                holders = index.get(name, {})
                holders.pop(workload, None)
                if not holders:
                    index.pop(name, None)
            for address in held:
                if addresses.get(address, ("",))[0] == workload:
                    del addresses[address]
            if not index:
                del self._names[network], self._addresses[network]

    def networks(self, workload: str) -> tuple[str, ...]:
        """The networks whose names a workload may know."""
        return tuple(self._own.get(workload, ()))

    def asker(self, network: str, address: str) -> str | None:
        """Which workload has an address on a network."""
        found = self._addresses.get(network, {}).get(address)
        return found[0] if found else None

    def find(
        self, networks: Iterable[str], name: str, asker: str = ""
    ) -> tuple[list[bytes], list[bytes]] | None:
        """(IPv4, IPv6) addresses of a name on the first of the networks that has it, packed.

        `asker`: the workload that asks, whose links come first.
        """
        links = self._links.get(asker, {})
        for network in networks:
            wanted = links.get(network, {}).get(name, name) if links else name
            holders = self._names.get(network, {}).get(wanted)
            if holders:
                four = [inet_pton(AF_INET, one) for one, _ in holders.values() if one]
                six = [inet_pton(AF_INET6, one) for _, one in holders.values() if one]
                return four, six
        return None

    def reverse(self, networks: Iterable[str], address: str) -> str | None:
        """The name of the workload that has an address on one of the networks."""
        for network in networks:
            found = self._addresses.get(network, {}).get(address)
            if found:
                return found[1]
        return None
