"""Network namespaces that are used again: those in which nothing has happened.

Making a namespace with its cable and letting the kernel take it apart costs more than all the rest
of a short run. One that a confined workload (`AttachRequest.confined`) has left without a packet
having been sent in it, on loopback either, is as it was made: no connection lingers, no neighbour
knows its address, and nothing that the workload held could outlive it.

Only some are kept in view, the youngest: two descriptors each.
"""

from collections import OrderedDict

from bulkhead.linux import rtnetlink as rt
from bulkhead.network.attached import Attached
from bulkhead.network.lobby import Bare, Lobby, Wired

MOST = 64


class Lent:
    """Wired namespaces that workloads have now. For one thread."""

    def __init__(self, lobby: Lobby) -> None:
        self._lobby = lobby
        self._kept: OrderedDict[str, Wired] = OrderedDict()

    def lend(self, made: Attached, bare: Bare) -> None:
        """A workload has taken this namespace; look after it, or let go of the socket inside."""
        if bare.cable is None or not made.request.confined or made.served:
            bare.netlink.close()
            return
        if len(self._kept) >= MOST:
            self.drop(next(iter(self._kept)))
        again = Bare(bare.netns.duplicate(), bare.netlink)
        self._kept[made.request.workload_id] = Wired(again, bare.cable)

    def take_back(self, made: Attached) -> bool:
        """Whether the namespace of a workload that has ended waits for the next one.

        Its addresses are still taken then.
        """
        one = self._kept.pop(made.request.workload_id, None)
        if one is None:
            return False
        if not made.served and _untouched(one) and self._lobby.put_back(one):
            return True
        one.bare.close()
        return False

    def drop(self, workload_id: str) -> None:
        """Somebody else gets at its namespace, or its networks change: it is not used again."""
        one = self._kept.pop(workload_id, None)
        if one is not None:
            one.bare.close()

    def close(self) -> None:
        """Let go of all of them."""
        for workload_id in list(self._kept):
            self.drop(workload_id)


def _untouched(one: Wired) -> bool:
    """Whether no interface has sent or tried to send anything."""
    try:
        return not any(rt.sent(one.bare.netlink))
    except OSError:
        return False
