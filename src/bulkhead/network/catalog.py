"""The networks there are: kept documents, names, ids, Docker's filters."""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from bulkhead.errors import Conflict, Denied, Invalid, NotFound
from bulkhead.home import Home
from bulkhead.network import records
from bulkhead.network.bridges import default_link, subnets
from bulkhead.network.ipam import Prefix
from bulkhead.network.records import Network, Subnet

NO_FILTERS: Mapping[str, Iterable[str]] = {}
HOST, NONE = "host", "none"


class DocumentStore(Protocol):
    """Where networks are kept: JSON text by id (state/database.py's Documents)."""

    def get(self, key: str) -> str | None:
        """The text, None if there is none."""
        ...

    def put(self, key: str, text: str) -> None:
        """Keep the text, durably."""
        ...

    def delete(self, key: str) -> None:
        """Forget it."""
        ...

    def items(self) -> Iterable[tuple[str, str]]:
        """All (key, text) pairs."""
        ...


class Catalog:
    """All networks by id; reads the documents once, writes through."""

    def __init__(self, home: Home, documents: DocumentStore) -> None:
        self._documents = documents
        self._networks: dict[str, Network] = {}
        self._names: dict[str, str] = {}
        seed = home.root.encode()
        self._pseudo = {
            name: hashlib.sha256(seed + name.encode()).hexdigest() for name in (HOST, NONE)
        }
        for _, text in documents.items():
            self._add(records.decode(text))
        if "bridge" not in self._names:
            self._add(
                Network(
                    id=hashlib.sha256(seed + b"bridge").hexdigest(),
                    name="bridge",
                    created=records.now(),
                    link=default_link(home),
                    default=True,
                )
            )
        self.default = self._networks[self._names["bridge"]]

    def _add(self, network: Network) -> None:
        self._networks[network.id] = network
        self._names[network.name] = network.id

    def all(self) -> list[Network]:
        """Every bridge network."""
        return list(self._networks.values())

    def by_id(self, identity: str) -> Network:
        """The network with that full id; NotFound."""
        try:
            return self._networks[identity]
        except KeyError:
            raise NotFound(f"network {identity} not found") from None

    def pseudo(self, ref: str) -> dict[str, Any] | None:
        """Docker's map if `ref` means "host" or "none"."""
        for name, identity in self._pseudo.items():
            if ref == name or (len(ref) >= 4 and identity.startswith(ref)):
                return records.pseudo(name, identity)
        return None

    def pseudo_id(self, name: str) -> str:
        """The id of "host" or "none"."""
        return self._pseudo[name]

    def find(self, ref: str) -> Network:
        """The network with that name, id or id prefix; NotFound, or Invalid if ambiguous."""
        if ref in ("", "default"):
            return self.default
        identity = self._names.get(ref)
        if identity is not None:
            return self._networks[identity]
        if ref in self._networks:
            return self._networks[ref]
        found = [one for one in self._networks.values() if one.id.startswith(ref)]
        if len(found) > 1:
            raise Invalid(f"network {ref} is ambiguous ({len(found)} matches found on ID prefix)")
        if not found:
            raise NotFound(f"network {ref} not found", network=ref)
        return found[0]

    def keep(self, network: Network) -> None:
        """Write a network's document; it is known from then on."""
        self._documents.put(network.id, network.encode())
        self._add(network)

    def create(
        self,
        body: Mapping[str, Any],
        choose4: Callable[[Network], Subnet],
        choose6: Callable[[Network], Subnet],
    ) -> Network:
        """A new network from a NetworkCreate body; Conflict if the name or a range is taken."""
        network, want4, want6 = records.from_docker(body)
        if network.name in self._names:
            raise Conflict(f"network with name {network.name} already exists")
        for other in self._networks.values():
            if other.link == network.link:
                raise Conflict(f"interface {network.link} belongs to network {other.name}")
        self._refuse_overlap(network)
        if want4:
            network.ipv4 = choose4(network)
        if want6:
            network.ipv6 = choose6(network)
        self.keep(network)
        return network

    def _refuse_overlap(self, network: Network) -> None:
        mine: list[Prefix] = subnets(network)
        for other in self._networks.values():
            for theirs in subnets(other):
                if any(one.version == theirs.version and one.overlaps(theirs) for one in mine):
                    raise Denied(
                        "invalid pool request: Pool overlaps with other one on this address "
                        f"space (network {other.name} has {theirs})"
                    )

    def remove(self, network: Network) -> None:
        """Forget a network; Denied for the predefined one."""
        if network.default:
            raise Denied(f"{network.name} is a pre-defined network and cannot be removed")
        self._documents.delete(network.id)
        del self._networks[network.id]
        del self._names[network.name]

    def select(
        self, filters: Mapping[str, Iterable[str]], in_use: Callable[[Network], bool]
    ) -> list[dict[str, Any] | Network]:
        """What `filters` (Docker's: id, name, driver, label, scope, type, dangling) let through."""
        known = {"id", "name", "driver", "label", "label!", "scope", "type", "dangling", "until"}
        for key in filters:
            if key not in known:
                raise Invalid(f"invalid filter '{key}'")
        everything: list[dict[str, Any] | Network] = [
            *self._networks.values(),
            *(records.pseudo(name, identity) for name, identity in self._pseudo.items()),
        ]
        return [one for one in everything if _matches(one, filters, in_use)]


def _matches(
    one: dict[str, Any] | Network,
    filters: Mapping[str, Iterable[str]],
    in_use: Callable[[Network], bool],
) -> bool:
    shape = one.describe() if isinstance(one, Network) else one
    custom = isinstance(one, Network) and not one.default
    for key, wanted in filters.items():
        values = list(wanted)
        if not values:
            continue
        if key == "id":
            fine = any(shape["Id"].startswith(value) for value in values)
        elif key == "name":
            fine = any(value in shape["Name"] for value in values)
        elif key == "driver":
            fine = shape["Driver"] in values
        elif key == "scope":
            fine = shape["Scope"] in values
        elif key in ("label", "label!"):
            fine = all(_labelled(shape["Labels"], value) for value in values) != (key == "label!")
        elif key == "type":
            if any(value not in ("custom", "builtin") for value in values):
                raise Invalid(f"invalid filter 'type={values[0]}'")
            fine = any((value == "custom") == custom for value in values)
        elif key == "dangling":
            unused = custom and isinstance(one, Network) and not in_use(one)
            fine = any((value.lower() in ("1", "true")) == unused for value in values)
        else:
            fine = True
        if not fine:
            return False
    return True


def _labelled(labels: Mapping[str, str], wanted: str) -> bool:
    key, found, value = wanted.partition("=")
    return key in labels and (not found or labels[key] == value)
