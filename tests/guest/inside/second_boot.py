"""The same machine, booted again: `service` was the first boot."""

from pathlib import Path

from tests.guest.inside.service import active
from tests.helpers import engine_rig as rigs
from tests.helpers.engine_rig import Rig
from tests.helpers.waiting import until


def test_policies_decide_what_comes_back() -> None:
    until(lambda: active() == "active", "the service starts by itself")
    rig = Rig(Path("/var/lib/bulkhead"), Path("/run/bulkhead"))
    try:
        for name in ("always", "always-stopped", "unless", "failure"):
            until(lambda name=name: rigs.state(rig, name)["Running"], f"{name} runs")  # type: ignore[misc]
        for name in ("unless-stopped", "no"):
            state = rigs.state(rig, name)
            assert (name, state["Status"]) == (name, "exited")
        assert "machine went down" in rigs.state(rig, "no")["Error"]
        assert rigs.execute(rig, "always", ["echo", "in"]) == (0, b"in\n")
        for found in rig.call("workload.list", all=True):
            rig.call("workload.remove", id=found["Id"], force=True)
    finally:
        rig.hang_up()
