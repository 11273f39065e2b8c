"""`--boundary auto` in the engine: the same rules, under the installation's policy."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bulkhead.boundaries.vmm.acceleration import acceleration
from bulkhead.errors import BulkheadError, Conflict, Denied, Invalid
from tests.helpers import engine_rig as rigs
from tests.helpers.engine_rig import IMAGE, Rig
from tests.helpers.residue import residue
from tests.kernel.test_engine_run import REASON

pytestmark = pytest.mark.skipif(bool(REASON), reason=REASON or "usable")


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    directory = tmp_path_factory.mktemp("choosing")
    with residue(str(directory)), rigs.engine(directory) as made:
        rigs.load_busybox(made)
        yield made


@pytest.fixture
def policy(rig: Rig) -> Iterator[Path]:
    path = rig.root / "policy.yaml"
    yield path
    path.unlink(missing_ok=True)


UNTRUSTED = {"bulkhead.needs": "Customers upload the code."}


def make(
    rig: Rig, boundary: str = "auto", labels: dict[str, str] | None = None, **host: Any
) -> Any:
    """What `inspect` says of a workload that is made and removed."""
    body = {"Image": IMAGE, "Cmd": ["true"], "Labels": labels or {}, "HostConfig": host}
    made = rig.call("workload.create", body=body, boundary=boundary)
    try:
        return rig.call("workload.inspect", id=made["Id"])
    finally:
        rig.call("workload.remove", id=made["Id"])


def test_auto_takes_the_lightest_and_says_why(rig: Rig) -> None:
    shown = make(rig)
    assert shown["Boundary"] == shown["HostConfig"]["Runtime"] == "container"
    choice = shown["BoundaryChoice"]
    assert choice["Boundary"] == "container"
    assert choice["Facts"]["trust"]["Value"] == "vetted"
    assert [one["Rule"] for one in choice["Reasons"]] == ["vetted-code"]
    done = rigs.run(rig, ["echo", "ran"], boundary="auto")
    assert (done.code, done.out) == (0, b"ran\n")


def test_a_named_boundary_has_no_choice_to_show(rig: Rig) -> None:
    for boundary in ("", "container"):
        assert "BoundaryChoice" not in make(rig, boundary)


@pytest.mark.parametrize(
    "asked",
    [
        {"boundary": "auto", "labels": UNTRUSTED},
        {"boundary": "", "labels": UNTRUSTED, "Runtime": "auto"},
        {"boundary": "", "labels": {**UNTRUSTED, "bulkhead.boundary": "auto"}},
    ],
    ids=["flag", "Runtime", "label"],
)
def test_what_is_untrusted_gets_a_kernel_of_its_own(rig: Rig, asked: dict[str, Any]) -> None:
    shown = make(rig, **asked)
    assert shown["Boundary"] == "microvm"
    reasons = {one["Rule"]: one for one in shown["BoundaryChoice"]["Reasons"]}
    assert reasons["untrusted"]["Facts"] == ["trust=untrusted"]
    assert reasons["untrusted"]["Source"]


def test_needs_that_contradict_each_other_make_nothing(rig: Rig) -> None:
    with pytest.raises(Conflict, match="contradict each other"):
        make(rig, labels=UNTRUSTED, PidMode="host")
    assert rig.call("workload.list", all=True) == []


def test_the_policy_decides(rig: Rig, policy: Path) -> None:
    policy.write_text("untrusted: vm\nallow: [container, vm]\n")
    shown = make(rig, labels=UNTRUSTED)
    assert shown["Boundary"] == "vm"
    assert shown["BoundaryChoice"]["Policy"] == str(policy)
    # It is read again when it changes.
    policy.write_text("default: sandbox\nneeds: {work: compute}\n")
    assert make(rig, labels={"bulkhead.needs.trust": "input"})["Boundary"] == "sandbox"


def test_kvm_can_be_asked_for(rig: Rig, policy: Path) -> None:
    policy.write_text("untrusted: microvm\nrequire-kvm: true\n")
    if acceleration().name == "kvm":
        assert make(rig, labels=UNTRUSTED)["Boundary"] == "microvm"
    else:
        with pytest.raises(Conflict, match="asks for KVM"):
            make(rig, labels=UNTRUSTED)
    assert make(rig)["Boundary"] == "container"


def test_an_enforced_policy_refuses_what_is_weaker(rig: Rig, policy: Path) -> None:
    policy.write_text("enforce: true\nallow: [container, microvm]\n")
    for boundary in ("", "container"):
        with pytest.raises(Denied, match="enforced"):
            make(rig, boundary, UNTRUSTED)
    assert make(rig, "microvm", UNTRUSTED)["Boundary"] == "microvm"
    with pytest.raises(Denied, match="allows container, microvm only"):
        make(rig, "sandbox")
    policy.write_text("unnamed: auto\n")
    assert make(rig, "", UNTRUSTED)["Boundary"] == "microvm"


def test_auto_gives_a_tenant_what_the_policy_has_for_it(rig: Rig, policy: Path) -> None:
    policy.write_text("tenants: {acme: {boundary: sandbox}, other: {}}\n")
    shown = make(rig, labels={"bulkhead.tenant": "acme"})
    assert shown["Boundary"] == "sandbox"
    assert "policy.tenants" in {one["Rule"] for one in shown["BoundaryChoice"]["Reasons"]}
    assert make(rig, labels={"bulkhead.tenant": "other"})["Boundary"] == "container"


def test_machines_are_made_only_where_the_policy_allows(rig: Rig, policy: Path) -> None:
    policy.write_text("enforce: true\nallow: [container, microvm]\n")
    with pytest.raises(Denied, match="not vm"):
        rig.call("vm.create", name="m", size=1 << 30, body={})


def test_a_policy_that_cannot_be_read_lets_nothing_pass(rig: Rig, policy: Path) -> None:
    for text in ("untrusted: mircovm\n", "untrusted: [\n", "what: ever\n"):
        policy.write_text(text)
        with pytest.raises(Invalid, match=os.fspath(policy)):
            make(rig)


def test_unknown_facts_in_labels_are_told(rig: Rig) -> None:
    with pytest.raises(BulkheadError, match="there is no 'some'"):
        make(rig, labels={"bulkhead.needs.trust": "some"})
