"""Inventories of what others wrote, and the plan that an assessment makes of them."""

import html.parser
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from bulkhead.choosing import compose, docker, domain, kubernetes, policy, report, sources
from bulkhead.choosing.facts import Statement
from bulkhead.choosing.items import Item, Mount, statements
from bulkhead.choosing.portfolio import Assessment, assess
from bulkhead.choosing.runs import commands
from bulkhead.errors import Invalid, NotFound
from tests.helpers import portfolio


def facts_of(item: Item, machine: str = "amd64") -> set[str]:
    return {f"{one.key}={one.value}" for one in statements(item, machine)}


@pytest.fixture
def found(tmp_path: Path) -> Assessment:
    items = sources.items(str(portfolio.write(tmp_path / "stacks")), {})
    return assess(items, [Statement("kvm", "yes")], policy.NONE, None, "amd64")


def test_the_inventory_is_whole(found: Assessment) -> None:
    behind = {one.item.name: one.behind for one in found.placed}
    assert behind == {
        "web": "container", "front": "container", "cache": "container", "orders": "vm",
        "runner": "microvm", "judge": "sandbox", "watcher": "container", "builder": "microvm",
        "wiki": "container", "payroll": "vm:tenant-hr", "leave": "vm:tenant-hr",
        "report": "container", "erp": "vm",
    }  # fmt: skip


def test_waves_begin_with_what_is_stateless_and_end_with_the_host(found: Assessment) -> None:
    waves = [[one.item.name for one in step.members] for step in found.waves]
    assert waves == [
        ["web", "cache", "front"], ["runner", "judge", "payroll", "leave"], ["wiki"], ["orders"],
        ["erp"], ["watcher"],
    ]  # fmt: skip
    assert {one.item.name: one.blockers for one in found.staying} == {
        "builder": ["its image has to be built first"],
        "report": ["variables come from the cluster"],
    }


def test_a_tenant_that_needs_a_wall_gets_one_machine(found: Assessment) -> None:
    (machine,) = found.machines
    assert (machine.name, machine.tenants) == ("tenant-hr", ["hr"])
    assert machine.members == ["payroll", "leave"]
    lines = found.waves[1].commands
    assert lines.index(
        f"bulkhead machine create --memory {machine.memory} --start tenant-hr"
    ) < next(n for n, line in enumerate(lines) if "--boundary vm:tenant-hr" in line)


def test_commands_are_exact_and_made_once(found: Assessment) -> None:
    lines = found.waves[0].commands
    assert lines.count("bulkhead network create shop_default") == 1
    front = next(line for line in lines if "--name shop-front-2" in line)
    words = shlex.split(front)
    assert words[:3] == ["bulkhead", "run", "-d"]
    assert words[-4:] == ["busybox:latest", "sh", "-c",
                          "while true; do nc -l -p 8080 -e hostname; done"]  # fmt: skip
    for step in found.waves:
        for line in [*step.commands, *step.undo]:
            assert shlex.split(line)[0] in ("bulkhead", "docker", "sh")


def test_what_depends_on_something_that_stays_stays(tmp_path: Path) -> None:
    text = "services: {a: {image: i, depends_on: [b]}, b: {build: .}, c: {image: i}}"
    made = assess(compose.items(text, str(tmp_path / "x.yaml")), [], policy.NONE, None)
    assert [one.item.name for one in made.staying] == ["a", "b"]
    assert "it depends on b, which stays" in made.staying[0].blockers


@pytest.mark.parametrize(
    "text",
    [
        "services: {a: {image: --privileged, command: [busybox]}}",
        "services: {a: {image: i, volumes: ['-v:/x']}}\nvolumes: {-v: {external: true}}",
        "services: {a: {image: i, networks: [n]}}\nnetworks: {n: {name: --internal}}",
    ],
)
def test_names_cannot_be_options(text: str, tmp_path: Path) -> None:
    items = compose.items(text, str(tmp_path / "x.yaml"))
    made = assess(items, [], policy.NONE, None)
    assert "begins as an option does" in made.staying[0].blockers[0]
    assert commands(made.staying[0].item, "container") == []


def test_tenants_are_put_together_by_the_policy(found: Assessment) -> None:
    rules = policy.parse(
        "tenants: {hr: {machine: office}, marketing: {machine: office}}", "policy.yaml"
    )
    made = assess([one.item for one in found.placed], [], rules, None)
    (machine,) = made.machines
    assert machine.tenants == ["hr", "marketing"]
    assert sorted(machine.members) == ["leave", "payroll", "web"]


class _Page(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.outside: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.outside += [value or "" for name, value in attrs if name in ("src", "href")]


def test_the_page_needs_nothing_but_itself_and_escapes_names(found: Assessment) -> None:
    found.placed[0].item.name = "<script>alert(1)</script>"
    text = report.as_html(found)
    page = _Page()
    page.feed(text)
    assert not page.outside and not {"script", "img", "link", "iframe"} & page.tags
    assert "&lt;script&gt;" in text
    assert set(re.findall("https?://[^/ ]*", text)) == {"http://127.0.0.1"}  # of a health check


def test_data_and_text_say_the_same(found: Assessment) -> None:
    data = json.loads(json.dumps(report.as_json(found)))
    assert len(data["Inventory"]) == len(found.placed) == 13
    assert [one["Commands"] for one in data["Waves"]] == [one.commands for one in found.waves]
    lines = "\n".join(report.as_text(found, ["table"]))
    for step in found.waves:
        assert all(command in lines for command in step.commands)
    assert "nothing was measured on this host yet" in lines


# --- readers


def service(text: str, **environ: str) -> Item:
    (item,) = compose.items("services:\n  a:\n" + text, "/srv/shop/compose.yaml", environ)
    return item


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        ("    image: i/x\n    privileged: true", "rights=all"),
        ("    image: i/x\n    cap_add: [SYS_ADMIN]", "rights=more"),
        ("    image: i/x\n    cap_add: [SYS_MODULE]", "modules=yes"),
        ("    image: i/x\n    network_mode: host", "host=reach"),
        ("    image: i/x\n    volumes: ['/var/run/docker.sock:/s']", "host=reach"),
        ("    image: i/x\n    devices: ['/dev/ttyUSB0:/dev/ttyUSB0']", "hardware=device"),
        ("    image: mysql:8", "state=database"),
        ("    image: docker:27-dind", "engine=yes"),
        ("    image: i/x\n    command: /sbin/init", "init=system"),
        ("    image: i/x\n    runtime: runsc", "trust=untrusted"),
        ("    image: i/x\n    cpuset: 2-3", "guarantee=reserved"),
        ("    image: i/x\n    platform: linux/arm64", "arch=foreign"),
        ("    image: i/x\n    x-bulkhead: {trust: untrusted}", "trust=untrusted"),
        ("    image: i/x\n    labels: {bulkhead.needs: Customers upload the code}",
         "trust=untrusted"),
    ],
)  # fmt: skip
def test_what_a_service_states(text: str, fact: str) -> None:
    assert fact in facts_of(service(text))


def test_a_service_becomes_the_command_that_compose_would_run() -> None:
    item = service(
        "    image: x:${TAG:-1}\n    ports: ['127.0.0.1:80:8080', {target: 53, published: 53, "
        "protocol: udp}]\n    environment: [A=$$1, B]\n    volumes: ['./data:/d:ro', n:/n]\n"
        "    mem_limit: 512M\n    healthcheck: {test: [CMD, wget, -q, 'a b'], retries: 3}\n"
        "    entrypoint: [/e, f]\n    command: [g]\n    secrets: [s]\n",
        TAG="7",
    )
    (_, volume, line) = commands(item, "container")
    assert volume == ["bulkhead", "volume", "create", "shop_n"]
    assert line == [
        "bulkhead", "run", "-d", "--name", "shop-a", "--boundary", "container",
        "--network", "shop_default", "--network-alias", "a",
        "-p", "127.0.0.1:80:8080", "-p", "53:53/udp", "-v", "/srv/shop/data:/d:ro",
        "-v", "shop_n:/n", "-e", "A=$1", "-e", "B=", "--memory", str(512 << 20),
        "--health-cmd", "wget -q 'a b'", "--health-retries", "3",
        "--entrypoint", "/e", "x:7", "f", "g",
    ]  # fmt: skip
    assert item.notes == ["not carried over: secrets"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("services: {a: 1}", "services.a: it must be a mapping"),
        ("services: {a: {image: i, mem_limit: lots}}", "'lots' is no size"),
        ("services: {a: {image: '${X:?say it}'}}", "the variable X is not set: say it"),
        ("services: {a: {volumes: [{type: bind}]}}", "services.a"),
        ("volumes: {}", "it has no services"),
        ("services: {a: {x-bulkhead: {trust: some}}}", "there is no 'some'"),
    ],
)
def test_compose_files_that_are_none_are_refused(text: str, said: str) -> None:
    with pytest.raises(Invalid) as caught:
        compose.items(text, "c.yaml")
    assert said in caught.value.message and "c.yaml" in caught.value.message


def pod(spec: dict[str, Any], kind: str = "Pod") -> list[Item]:
    document = {"apiVersion": "v1", "kind": kind, "metadata": {"name": "p"}, "spec": spec}
    return kubernetes.items(json.dumps(document), "k.yaml")


@pytest.mark.parametrize(
    ("spec", "fact"),
    [
        ({"hostNetwork": True}, "host=reach"),
        ({"nodeSelector": {"kubernetes.io/os": "windows"}}, "os=windows"),
        ({"runtimeClassName": "kata"}, "separation=hardware"),
        ({"securityContext": {"privileged": True}}, "rights=all"),
        ({"volumes": [{"name": "v", "hostPath": {"path": "/proc"}}]}, "host=reach"),
        ({"volumes": [{"name": "v", "persistentVolumeClaim": {"claimName": "c"}}]},
         "state=volumes"),
    ],
)  # fmt: skip
def test_what_a_pod_states(spec: dict[str, Any], fact: str) -> None:
    container = {"name": "c", "image": "i/x", "volumeMounts": [{"name": "v", "mountPath": "/v"}]}
    if "volumes" not in spec:
        container.pop("volumeMounts")
    (item,) = pod({**spec, "containers": [container]})
    assert fact in facts_of(item)


def test_pods_of_several_containers_and_lists_are_taken_apart() -> None:
    containers = [{"name": "a", "image": "x"}, {"name": "b", "image": "y"}]
    first, second = pod({"containers": containers})
    assert (first.name, second.name) == ("p-a", "p-b")
    assert "shares a pod" in first.notes[0]
    with pytest.raises(Invalid, match="no manifest"):
        kubernetes.items("a: 1", "k.yaml")
    with pytest.raises(Invalid, match=r"k\.yaml: Pod p"):
        pod({"containers": [{"image": 1, "env": [{}]}]})


def test_a_domain_is_a_machine_with_its_demands() -> None:
    text = b"""<domain><name>w</name><memory>2097152</memory><vcpu>2</vcpu>
    <metadata><l:os xmlns:l="x" id="http://microsoft.com/win/2k19"/></metadata>
    <cputune><vcpupin vcpu="0" cpuset="1"/></cputune>
    <devices><hostdev type="pci"/><disk type="file"><source file="/d.qcow2"/></disk></devices>
    </domain>"""
    (item,) = domain.items(text, "w.xml")
    assert item.memory == 2 << 30 and item.os == "windows"
    assert {"os=windows", "form=disk", "guarantee=reserved", "hardware=passthrough"} <= facts_of(
        item
    )
    assert commands(item, "vm")[0] == ["bulkhead", "vm", "import", "/d.qcow2", "w"]
    with pytest.raises(Invalid, match="no libvirt domain"):
        domain.items(b"<network/>", "n.xml")


def test_disks_and_paths(tmp_path: Path) -> None:
    disk = tmp_path / "Old Box.qcow2"
    disk.write_bytes(b"QFI\xfb" + (3).to_bytes(4, "big") + bytes(504))
    (item,) = sources.items(str(disk), {})
    assert (item.kind, item.name) == ("disk", "old-box") and "form=disk" in facts_of(item)
    with pytest.raises(NotFound):
        sources.items(str(tmp_path / "none"), {})
    (tmp_path / "other.yaml").write_text("a: 1\n")
    assert [one.name for one in sources.items(str(tmp_path), {})] == ["old-box"]
    with pytest.raises(Invalid, match="neither a Compose file nor a manifest"):
        sources.items(str(tmp_path / "other.yaml"), {})


def test_an_image_cannot_vouch_for_itself() -> None:
    labels = {"bulkhead.needs": "Fully trusted, our own code. It needs its own kernel modules.",
              "bulkhead.needs.trust": "own", "bulkhead.needs.what": "ever",
              "bulkhead.tenant": "acme", "org.label": "kept"}  # fmt: skip
    item = docker.from_request("a", {"Image": "x/y"}, {})
    docker.add_image(item, {"Config": {"Labels": labels}})
    assert facts_of(item) == {"modules=yes", "kernel=own"} and item.labels == {"org.label": "kept"}


def test_a_container_of_a_docker_host_brings_image_and_volumes_along() -> None:
    shown = {
        "Name": "/db", "Path": "postgres", "Args": [], "Image": "sha256:0",
        "Config": {"Image": "postgres:16", "Labels": {}, "User": "999"},
        "HostConfig": {"PortBindings": {"5432/tcp": [{"HostIp": "", "HostPort": "5432"}]}},
        "Mounts": [{"Type": "volume", "Name": "data", "Destination": "/d", "RW": True}],
    }  # fmt: skip
    item = docker.from_container(shown, "unix:///var/run/docker.sock")
    assert item.mounts == [Mount("volume", "data", "/d")] and item.ports == ["5432:5432/tcp"]
    volume, load, stop, copy, run = commands(item, "container")
    assert volume == ["bulkhead", "volume", "create", "data"]
    assert load[2].endswith("save postgres:16 | bulkhead load")
    assert stop[-2:] == ["stop", "db"] and "| bulkhead run --rm -i" in copy[2]
    assert run[-1] == "postgres:16"
    for host in ("ssh://x", "nothing"):
        with pytest.raises(Invalid, match="name it as unix"):
            docker.inventory(host)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.yaml", "services: {a: {image: x, mem_limit: 1e999}}"),
        ("a.yaml", f"services: {{a: {{image: x, mem_limit: {'9' * 390}}}}}"),
        ("a.yaml", "services: {a: {image: x, mem_limit: -1}}"),
        ("a.yaml", "services: {a: {image: x, cpus: inf}}"),
        ("a.yaml", "services: {a: {image: x, scale: 1000000000}}"),
        ("a.yaml", "{apiVersion: v1, kind: List, items: 5}"),
        ("a.yaml", "{apiVersion: v1, kind: Service, spec: x}"),
        ("a.yaml", "{apiVersion: v1, kind: Service, metadata: [1]}"),
        ("a.yaml", "{apiVersion: v1, kind: Pod, spec: "
                   "{containers: [{resources: {limits: {cpu: 1e999}}}]}}"),
        ("a.xml", '<?xml version="1.0" encoding="foo"?><domain/>'),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_with_its_file(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(Invalid, match=name):
        sources.items(str(tmp_path / name), {})


@pytest.mark.parametrize("host", ["tcp://h:99999", "tcp://[::1", "tcp://", "foo", ""])
def test_what_is_no_docker_host_is_refused(host: str) -> None:
    with pytest.raises(Invalid, match="--docker"):
        docker.inventory(host)
