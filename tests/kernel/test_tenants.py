"""Tenants: what the policy ties them to, and that strangers share no namespaces."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from bulkhead.engine import tenants
from bulkhead.errors import Denied
from tests.helpers import engine_rig as rigs
from tests.helpers.engine_rig import Rig
from tests.helpers.residue import residue

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
POLICY = """
version: 1
tenants:
  acme: {boundary: sandbox}
  plain: {}
  bound: {machine: theirs}
"""


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    with residue(str(tmp_path)), rigs.engine(tmp_path) as made:
        rigs.load_busybox(made)
        (tmp_path / "root" / "policy.yaml").write_text(POLICY)
        yield made


def _create(rig: Rig, tenant: str, boundary: str = "container", **host: object) -> str:
    labels = {"Labels": {tenants.LABEL: tenant}} if tenant else {}
    body = {"Image": rigs.IMAGE, "Cmd": ["true"], "HostConfig": host, **labels}
    return str(rig.call("workload.create", name="", body=body, boundary=boundary)["Id"])


def test_a_tenant_has_the_least_boundary_of_the_policy(rig: Rig) -> None:
    with pytest.raises(Denied, match="tenant acme needs --boundary sandbox at least"):
        _create(rig, "acme")
    made = _create(rig, "acme", boundary="")
    assert rig.call("workload.inspect", id=made)["HostConfig"]["Runtime"] == "sandbox"
    with pytest.raises(Denied, match="tied to the machine theirs: --boundary vm:theirs"):
        _create(rig, "bound")
    with pytest.raises(Denied, match="there is no tenant 'nobody'"):
        _create(rig, "nobody")
    _create(rig, "plain")
    _create(rig, "")


def test_strangers_share_no_namespaces(rig: Rig) -> None:
    rigs.start(rig, "first", "sleep 1000", config={"Labels": {tenants.LABEL: "plain"}})
    _create(rig, "plain", NetworkMode="container:first")
    for mode in ("NetworkMode", "PidMode", "IpcMode"):
        with pytest.raises(Denied, match="first is tenant plain's, this workload is no tenant's"):
            _create(rig, "", **{mode: "container:first"})


def test_hardware_is_insisted_on(rig: Rig, tmp_path: Path) -> None:
    from bulkhead.boundaries.vmm.acceleration import acceleration

    if acceleration().name == "kvm":
        pytest.skip("KVM works here")
    (tmp_path / "root" / "policy.yaml").write_text("version: 1\nrequire-kvm: true\n")
    with pytest.raises(Denied, match="require-kvm: this host has no /dev/kvm that works"):
        _create(rig, "", boundary="microvm")
    _create(rig, "")
