"""Items from Kubernetes manifests: the containers of whatever makes pods."""

from collections.abc import Iterator, Mapping
from typing import Any

from bulkhead.choosing.documents import yaml_documents
from bulkhead.choosing.facts import HINT, SAID, statement
from bulkhead.choosing.items import (
    MOST_NANO_CPUS,
    MOST_REPLICAS,
    NEEDS,
    TENANT,
    Item,
    Mount,
    memory,
    within,
)
from bulkhead.errors import Invalid

KINDS = frozenset(
    str.split("Pod Deployment StatefulSet DaemonSet ReplicaSet Job CronJob ReplicationController")
)
_NAMESPACES = {"hostNetwork": "network", "hostPID": "pid", "hostIPC": "ipc"}


def is_manifest(document: Any) -> bool:
    """Whether a YAML document looks like one."""
    return isinstance(document, dict) and "apiVersion" in document and "kind" in document


def items(text: str, source: str) -> list[Item]:
    """The containers that a file's manifests make; Invalid for what is no manifest."""
    try:
        return _items(yaml_documents(text, source), source)
    except (TypeError, ValueError, AttributeError, KeyError, OverflowError) as error:
        raise Invalid(f"{source}: it is no manifest: {error}") from error


def _items(documents: list[Any], source: str) -> list[Item]:
    found: list[Item] = []
    ports: dict[str, Any] = {}
    for document in _flat(documents):
        if not is_manifest(document):
            raise Invalid(f"{source}: it has no apiVersion and kind: it is no manifest")
        kind = str(document["kind"])
        if kind == "Service":
            ports[_name(document)] = document
        if kind in KINDS:
            try:
                found += _workload(kind, document, source)
            except (TypeError, ValueError, AttributeError, KeyError, OverflowError) as error:
                raise Invalid(f"{source}: {kind} {_name(document)}: {error}") from error
    for service in ports.values():
        _publish(service, found)
    return found


def _flat(documents: list[Any]) -> Iterator[Any]:
    for one in documents:
        if isinstance(one, dict) and one.get("kind") == "List":
            yield from one.get("items") or ()
        else:
            yield one


def _name(document: Mapping[str, Any]) -> str:
    return str((document.get("metadata") or {}).get("name") or "?")


def _publish(service: Mapping[str, Any], found: list[Item]) -> None:
    spec = service.get("spec") or {}
    selector = spec.get("selector") or {}
    if spec.get("type") not in ("NodePort", "LoadBalancer") or not selector:
        return
    for item in found:
        if all(item.labels.get(key) == value for key, value in selector.items()):
            for port in spec.get("ports") or ():
                outer = port.get("nodePort") or port.get("port")
                item.ports.append(f"{outer}:{port.get('targetPort') or port.get('port')}")


def _pod(kind: str, document: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    spec = document.get("spec") or {}
    if kind == "Pod":
        return spec, document.get("metadata") or {}
    if kind == "CronJob":
        spec = (spec.get("jobTemplate") or {}).get("spec") or {}
    template = spec.get("template") or {}
    return template.get("spec") or {}, template.get("metadata") or {}


def _workload(kind: str, document: Mapping[str, Any], source: str) -> list[Item]:
    metadata = document.get("metadata") or {}
    pod, inner = _pod(kind, document)
    labels = {**(metadata.get("labels") or {}), **(inner.get("labels") or {})}
    labels = {str(key): str(value) for key, value in labels.items()}
    notes = {**(metadata.get("annotations") or {}), **(inner.get("annotations") or {})}
    labels |= {k: str(v) for k, v in notes.items() if k.startswith(NEEDS) or k == TENANT}
    volumes = {one["name"]: one for one in pod.get("volumes") or ()}
    claims = {
        one["metadata"]["name"]: {"persistentVolumeClaim": {"claimName": one["metadata"]["name"]}}
        for one in (document.get("spec") or {}).get("volumeClaimTemplates") or ()
    }
    containers = pod.get("containers") or ()
    found = []
    for container in containers:
        own = container.get("name") or "container"
        name = _name(document) if len(containers) == 1 else f"{_name(document)}-{own}"
        item = _item(name, container, pod, {**volumes, **claims}, source)
        item.labels = dict(labels)
        item.group = item.tenant = str(metadata.get("namespace") or "")
        item.tenant = labels.get(TENANT, item.tenant)
        count = float((document.get("spec") or {}).get("replicas") or 1)
        item.replicas = within(count, MOST_REPLICAS, f"{source}: {name}: replicas")
        _by_kind(kind, item, pod)
        if len(containers) > 1:
            item.notes.append(f"it shares a pod with {len(containers) - 1} other containers")
        if pod.get("initContainers"):
            item.notes.append("its init containers have to be run before it")
        found.append(item)
    return found


def _by_kind(kind: str, item: Item, pod: Mapping[str, Any]) -> None:
    if kind in ("Job", "CronJob"):
        item.stated.append(statement("life=minutes", f"a {kind}", HINT))
    if kind == "StatefulSet":
        item.stated.append(statement("state=volumes", "a StatefulSet", HINT))
    if kind in ("Deployment", "ReplicaSet") and item.replicas > 1:
        item.stated.append(statement("style=services", f"{item.replicas} replicas", HINT))
    item.runtime = str(pod.get("runtimeClassName") or "")
    selector = pod.get("nodeSelector") or {}
    item.os = str(selector.get("kubernetes.io/os") or "")
    item.architecture = str(selector.get("kubernetes.io/arch") or "")
    if item.restart == "" and kind not in ("Job", "CronJob"):
        item.restart = "always"


def _item(
    name: str, container: Mapping[str, Any], pod: Mapping[str, Any],
    volumes: Mapping[str, Any], source: str,
) -> Item:  # fmt: skip
    security = {**(pod.get("securityContext") or {}), **(container.get("securityContext") or {})}
    limits = (container.get("resources") or {}).get("limits") or {}
    wanted = (container.get("resources") or {}).get("requests") or {}
    where = f"{source}: {name}"
    item = Item(
        name=name,
        kind="pod",
        source=source,
        image=str(container.get("image") or ""),
        memory=memory(limits.get("memory") or wanted.get("memory"), where),
        nano_cpus=_cpus(limits.get("cpu") or wanted.get("cpu"), f"{where}: cpu"),
        entrypoint=[str(one) for one in container.get("command") or ()],
        command=[str(one) for one in container.get("args") or ()],
        user=str(security.get("runAsUser", "")),
        privileged=security.get("privileged") is True,
        capabilities=[str(one) for one in (security.get("capabilities") or {}).get("add") or ()],
        read_only=security.get("readOnlyRootFilesystem") is True,
        health=bool(container.get("readinessProbe") or container.get("livenessProbe")),
        host_namespaces=[word for key, word in _NAMESPACES.items() if pod.get(key) is True],
    )
    for one in container.get("env") or ():
        if "value" in one:
            item.env.append(f"{one['name']}={one['value']}")
        else:
            item.notes.append(f"the variable {one['name']} comes from the cluster")
    if container.get("envFrom"):
        item.notes.append("variables come from the cluster")
    for port in container.get("ports") or ():
        if port.get("hostPort"):
            item.ports.append(f"{port['hostPort']}:{port['containerPort']}")
    _mounts(item, container, volumes)
    for key in limits:
        if "/" in str(key):
            item.stated.append(statement("hardware=device", f"it asks for {key}", SAID))
    return item


def _mounts(item: Item, container: Mapping[str, Any], volumes: Mapping[str, Any]) -> None:
    for mount in container.get("volumeMounts") or ():
        volume = volumes.get(mount["name"]) or {}
        read_only = mount.get("readOnly") is True
        target = str(mount["mountPath"])
        if "hostPath" in volume:
            item.mounts.append(Mount("bind", str(volume["hostPath"]["path"]), target, read_only))
        elif "persistentVolumeClaim" in volume:
            claim = str(volume["persistentVolumeClaim"].get("claimName"))
            item.mounts.append(Mount("volume", claim, target, read_only))
        elif "emptyDir" in volume:
            item.mounts.append(Mount("tmpfs", "", target))
        else:
            item.notes.append(f"{target} comes from the cluster ({', '.join(volume) or 'unknown'})")


def _cpus(value: Any, where: str) -> int:
    if value is None:
        return 0
    text = str(value)
    nano = float(text[:-1]) * 10**6 if text.endswith("m") else float(text) * 10**9
    return within(nano, MOST_NANO_CPUS, where)
