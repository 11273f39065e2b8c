"""Network cards of a guest that runs: one more network, or one fewer.

A boundary has spare cards and its own way to connect them (`Cards`). The first card of the start
stays when its network is taken away, without any but the address from which our resolver is asked.

    <workload run directory>/guest/wires     JSON: names of the start's cards, the spare ones in use
                                             by the name they have, those that are used up

All of it blocks, and is for threads.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec

from bulkhead.boundaries.guest import link, wiring
from bulkhead.boundary.seam import Nic
from bulkhead.errors import Unsupported
from bulkhead.linux.fds import OwnedFd
from bulkhead.linux.program import Program

NAME = "wires"
ALONE, RESOLVER = "169.254.53.52/31", "169.254.53.53"
"""As in network/tap.py."""
Gateways = Mapping[int, tuple[str, str]]


class Cards(Protocol):
    """How a kind of machine is told of its cards."""

    spares: Sequence[int]
    """Numbers of the spare cards."""
    lasting: bool
    """Whether one can be connected again after it was disconnected."""

    def spare_tap(self, number: int) -> OwnedFd | None:
        """A tap without an interface that the machine has for it; None: it takes any."""
        ...

    def add(self, number: int, nic: Nic) -> str:
        """Connect a spare card: the kernel's name of it."""
        ...

    def remove(self, number: int) -> None:
        """Disconnect it; the guest has taken it down."""
        ...

    def unplug(self, index: int) -> None:
        """Likewise a card of the start."""
        ...


class Wires(msgspec.Struct):
    """What is on file."""

    names: list[str] = []
    live: dict[str, int] = {}
    spent: list[int] = []

    @property
    def changed(self) -> bool:
        """Whether the cards are not those of the start any more."""
        return bool(self.live or self.spent)


def read(directory: str) -> Wires:
    """The notes of a running guest."""
    try:
        with open(f"{directory}/{NAME}", "rb") as file:
            return msgspec.json.decode(file.read(), type=Wires)
    except FileNotFoundError:
        return Wires()


def write(directory: str, wires: Wires) -> None:
    """Write them."""
    scratch = f"{directory}/{NAME}.new"
    with open(scratch, "wb") as file:
        file.write(msgspec.json.encode(wires))
    os.rename(scratch, f"{directory}/{NAME}")


@dataclass(frozen=True, slots=True)
class Running:
    """The cards of the guest whose monitor is process `pid`, with its notes in `directory`."""

    directory: str
    pid: int
    cards: Cards

    def free(self) -> int:
        """The number of a spare card; Unsupported if there is none left."""
        wires = read(self.directory)
        taken = {*wires.live.values(), *wires.spent}
        number = next((one for one in self.cards.spares if one not in taken), None)
        if number is None:
            raise Unsupported(
                "this guest has no spare network card left: a restart gives it as many as it has "
                "networks, and spare ones"
            )
        return number

    def connect(self, number: int, nic: Nic, gateways: Gateways) -> None:
        """Give the guest `nic` on spare card `number`."""
        wires = read(self.directory)
        wires.live[nic.name] = number
        write(self.directory, wires)
        kernel_name = self.cards.add(number, nic)
        program = Program()
        wiring.plan_interface(program, nic, kernel_name)
        wiring.plan_default(program, gateways)
        self._run(program)

    def disconnect(self, name: str, gateways: Gateways) -> None:
        """Take interface `name` away."""
        wires = read(self.directory)
        program = Program()
        first = wires.names[:1] == [name] and name not in wires.live
        if first:
            wiring.plan_empty(program, name, ALONE, RESOLVER)
        else:
            wiring.plan_down(program, name)
        wiring.plan_default(program, gateways)
        self._run(program)
        if name in wires.live:
            number = wires.live.pop(name)
            self.cards.remove(number)
            if not self.cards.lasting:
                wires.spent.append(number)
        elif not first and name in wires.names:
            self.cards.unplug(wires.names.index(name))
            wires.spent.append(-1)
        write(self.directory, wires)

    def _run(self, program: Program) -> None:
        with link.Link(self.pid) as connection:
            connection.set_up(program)
