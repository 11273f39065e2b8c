"""Items from a Compose file: its services, as far as the choice and a plan need them."""

import os
import re
from collections.abc import Mapping
from typing import Any

from bulkhead.choosing.documents import yaml_document
from bulkhead.choosing.facts import FIRM, HINT, SAID, statement
from bulkhead.choosing.items import (
    MOST_NANO_CPUS,
    MOST_REPLICAS,
    TENANT,
    Item,
    Mount,
    memory,
    within,
)
from bulkhead.choosing.words import read
from bulkhead.errors import Invalid

_VARIABLE = re.compile(r"\$(?:\$|([A-Za-z_]\w*)|\{([A-Za-z_]\w*)(?:(:?[-?+])([^{}]*))?\})")
_NAMESPACES = {"network_mode": "network", "pid": "pid", "ipc": "ipc", "uts": "uts"}
_PLAIN = {"working_dir": "-w", "hostname": "-h", "stop_signal": "--stop-signal",
          "shm_size": "--shm-size", "pids_limit": "--pids-limit", "domainname": "--domainname",
          "mac_address": "--mac-address", "userns_mode": "--userns", "cgroup_parent":
          "--cgroup-parent"}  # fmt: skip
_LISTS = {"cap_add": "--cap-add", "cap_drop": "--cap-drop", "dns": "--dns", "group_add":
          "--group-add", "tmpfs": "--tmpfs", "security_opt": "--security-opt", "extra_hosts":
          "--add-host", "env_file": "--env-file", "dns_search": "--dns-search"}  # fmt: skip
_READ = frozenset(
    str.split(
        "image build command entrypoint environment labels user ports volumes networks depends_on "
        "privileged devices read_only restart runtime cpuset healthcheck deploy mem_limit cpus "
        "scale network_mode pid ipc uts container_name init tty stdin_open mem_reservation expose "
        "profiles platform sysctls pull_policy x-bulkhead mem_swappiness stop_grace_period"
    )
)


def is_compose(document: Any) -> bool:
    """Whether a YAML document looks like one."""
    return isinstance(document, dict) and isinstance(document.get("services"), dict)


def items(text: str, source: str, environ: Mapping[str, str] | None = None) -> list[Item]:
    """The services of a Compose file; Invalid, with the place as far as it is known."""
    environ = environ or {}
    document = yaml_document(text, source)
    if not is_compose(document):
        raise Invalid(f"{source}: it has no services: it is no Compose file")
    document = _interpolated(document, environ, source)
    folder = os.path.dirname(os.path.abspath(source))
    project = str(document.get("name") or _project(folder, os.path.basename(source)))
    volumes = document.get("volumes") or {}
    networks = document.get("networks") or {}
    found = []
    for name, service in document["services"].items():
        if not isinstance(service, dict):
            raise Invalid(f"{source}: services.{name}: it must be a mapping")
        reader = _Service(str(name), service, source, folder, project)
        try:
            found.append(reader.item(volumes, networks))
        except KeyError as error:
            raise Invalid(f"{source}: services.{name}: {error} is missing") from error
        except (TypeError, ValueError, AttributeError, OverflowError) as error:
            raise Invalid(f"{source}: services.{name}: {error}") from error
        except Invalid as error:
            place = "" if error.message.startswith(source) else f"{source}: services.{name}: "
            raise Invalid(f"{place}{error.message}") from error
    if document.get("include"):
        for one in found:
            one.notes.append("the file includes others, which were not read")
    return found


_USUAL = ("compose.yaml", "compose.yml", "docker-compose.yml", "docker-compose.yaml")


def _project(folder: str, file: str) -> str:
    """Compose's name of it; a file that is not called as usual, among others, gives its own."""
    word = os.path.basename(folder) if file in _USUAL else file.rpartition(".")[0]
    return re.sub(r"[^a-z0-9_-]", "", word.lower()) or "default"


def _interpolated(value: Any, environ: Mapping[str, str], source: str) -> Any:
    if isinstance(value, dict):
        return {key: _interpolated(one, environ, source) for key, one in value.items()}
    if isinstance(value, list):
        return [_interpolated(one, environ, source) for one in value]
    if isinstance(value, str) and "$" in value:
        return _VARIABLE.sub(lambda match: _variable(match, environ, source), value)
    return value


def _variable(match: "re.Match[str]", environ: Mapping[str, str], source: str) -> str:
    name = match[1] or match[2]
    if name is None:
        return "$"
    value, how, other = environ.get(name), match[3] or "", match[4] or ""
    missing = value is None or (how.startswith(":") and not value)
    if how.endswith("+"):
        return "" if missing else other
    if not missing:
        return value or ""
    if how.endswith("?"):
        raise Invalid(f"{source}: the variable {name} is not set: {other or 'it is required'}")
    return other


def _mapping(value: Any, separator: str = "=") -> dict[str, str]:
    if isinstance(value, dict):
        return {str(k): "" if v is None else _text(v) for k, v in value.items()}
    return dict(str(one).partition(separator)[::2] for one in value or ())


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _list(value: Any) -> list[str]:
    if value is None:
        return []
    return [_text(one) for one in value] if isinstance(value, list) else [_text(value)]


def _argv(value: Any) -> list[str]:
    if isinstance(value, str):
        import shlex

        return shlex.split(value)
    return _list(value)


class _Service:
    """One service being read."""

    def __init__(
        self, name: str, service: dict[str, Any], source: str, folder: str, project: str
    ) -> None:
        self.name, self.service = name, service
        self.source, self.folder, self.project = source, folder, project

    def item(self, volumes: Mapping[str, Any], networks: Mapping[str, Any]) -> Item:
        """The item it is."""
        own = self.service
        labels = _mapping(own.get("labels"))
        ours = own.get("x-bulkhead") or {}
        item = Item(
            name=self.name,
            kind="service",
            source=self.source,
            image=str(own.get("image") or f"{self.project}-{self.name}"),
            group=self.project,
            tenant=str(ours.get("tenant") or labels.get(TENANT, "")),
            entrypoint=_argv(own.get("entrypoint")),
            command=_argv(own.get("command")),
            env=[f"{k}={v}" for k, v in _mapping(own.get("environment")).items()],
            labels=labels,
            user=_text(own.get("user") or ""),
            ports=[_port(one) for one in own.get("ports") or ()],
            depends=[str(one) for one in own.get("depends_on") or ()],
            privileged=own.get("privileged") is True,
            capabilities=_list(own.get("cap_add")),
            devices=[str(one).partition(":")[0] for one in own.get("devices") or ()],
            read_only=own.get("read_only") is True,
            restart=_text(own.get("restart") or ""),
            runtime=str(own.get("runtime") or ""),
            cpuset=_text(own.get("cpuset") or ""),
            health=bool(own.get("healthcheck")),
            host_namespaces=[w for key, w in _NAMESPACES.items() if own.get(key) == "host"],
        )
        item.mounts = [self._mount(one, volumes) for one in own.get("volumes") or ()]
        item.networks = self._networks(networks)
        self._resources(item)
        self._options(item)
        self._ours(item, ours)
        self._notes(item)
        return item

    def _mount(self, value: Any, volumes: Mapping[str, Any]) -> Mount:
        if isinstance(value, dict):
            kind, source = str(value.get("type") or "volume"), str(value.get("source") or "")
            target, read_only = str(value["target"]), value.get("read_only") is True
        else:
            parts = str(value).split(":")
            if len(parts) == 1:
                return Mount("volume", "", parts[0])
            source, target = parts[0], parts[1]
            kind = "bind" if source.startswith(("/", ".", "~")) else "volume"
            read_only = len(parts) > 2 and "ro" in parts[2].split(",")
        if kind == "bind" and not source.startswith(("/", "~")):
            source = os.path.normpath(os.path.join(self.folder, source))
        elif kind == "volume" and source:
            given = volumes.get(source) or {}
            external = given.get("external") is True
            source = str(given.get("name") or (source if external else f"{self.project}_{source}"))
        return Mount(kind, source, target, read_only)

    def _networks(self, networks: Mapping[str, Any]) -> list[str]:
        if self.service.get("network_mode"):
            return []
        names = list(self.service.get("networks") or ["default"])
        found = []
        for name in names:
            given = networks.get(name) or {}
            found.append(
                str(
                    given.get("name")
                    or (name if given.get("external") else f"{self.project}_{name}")
                )
            )
        return found

    def _resources(self, item: Item) -> None:
        own, where = self.service, f"{self.source}: services.{self.name}"
        deploy = own.get("deploy") or {}
        resources = deploy.get("resources") or {}
        limits, wanted = resources.get("limits") or {}, resources.get("reservations") or {}
        item.memory = memory(
            own.get("mem_limit") or limits.get("memory") or own.get("mem_reservation")
            or wanted.get("memory"), where, decimal=False,
        )  # fmt: skip
        cpus = float(own.get("cpus") or limits.get("cpus") or 0)
        item.nano_cpus = within(cpus * 10**9, MOST_NANO_CPUS, f"{where}: cpus")
        count = own.get("scale") or deploy.get("replicas") or 1
        item.replicas = within(float(count), MOST_REPLICAS, f"{where}: replicas")
        for device in wanted.get("devices") or ():
            item.devices.append(f"{'/'.join(_list(device.get('capabilities')))} of the host")
            item.notes.append("deploy: devices by capability must be named with --device")

    def _options(self, item: Item) -> None:
        own = self.service
        for key, flag in _PLAIN.items():
            if own.get(key) is not None:
                item.options += [flag, _text(own[key])]
        for key, flag in _LISTS.items():
            for one in _mapping_lines(own.get(key)):
                if key == "env_file":
                    one = os.path.normpath(os.path.join(self.folder, one))
                item.options += [flag, one]
        for key, flag in (("init", "--init"), ("tty", "-t"), ("stdin_open", "-i")):
            if own.get(key) is True:
                item.options.append(flag)
        for key, value in _mapping(own.get("sysctls")).items():
            item.options += ["--sysctl", f"{key}={value}"]
        for one in own.get("devices") or ():
            item.options += ["--device", str(one)]
        mode = own.get("network_mode")
        if mode:
            item.options += ["--network", str(mode)]
        for key in ("pid", "ipc", "uts"):
            if own.get(key):
                item.options += [f"--{key}", str(own[key])]
        item.options += _health(own.get("healthcheck"))

    def _ours(self, item: Item, ours: Mapping[str, Any]) -> None:
        for key, value in ours.items():
            where = f"{self.name}: x-bulkhead.{key}"
            if key == "needs":
                item.stated += read(str(value))
            elif key == "boundary":
                item.notes.append(f"the file asks for the boundary {value}")
            elif key != "tenant":
                item.stated.append(statement(f"{key}={value}", where, FIRM))
        if self.service.get("platform"):
            system, _, architecture = str(self.service["platform"]).partition("/")
            item.os, item.architecture = system, architecture.partition("/")[0]
        if item.replicas > 1:
            item.stated.append(statement("style=services", f"{item.replicas} replicas", HINT))
        if item.devices and any("gpu" in one for one in item.devices):
            item.stated.append(statement("hardware=device", "it reserves a GPU", SAID))

    def _notes(self, item: Item) -> None:
        own = self.service
        unknown = [
            key for key in own
            if key not in _READ and key not in _PLAIN and key not in _LISTS
            and not key.startswith("x-")
        ]  # fmt: skip
        if unknown:
            item.notes.append(f"not carried over: {', '.join(sorted(unknown))}")
        if own.get("build") is not None:
            item.notes.append("its image has to be built first")


def _mapping_lines(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [f"{key}:{one}" for key, one in value.items()]
    found = []
    for one in value if isinstance(value, list) else [value] if value is not None else []:
        found.append(str(one.get("path")) if isinstance(one, dict) else _text(one))
    return found


def _port(value: Any) -> str:
    if not isinstance(value, dict):
        return _text(value)
    text = f"{value.get('published', '')}:{value['target']}".lstrip(":")
    if value.get("host_ip"):
        text = f"{value['host_ip']}:{text}"
    return f"{text}/{value['protocol']}" if value.get("protocol", "tcp") != "tcp" else text


def _health(check: Any) -> list[str]:
    if not isinstance(check, dict):
        return []
    if check.get("disable") is True:
        return ["--no-healthcheck"]
    test = check.get("test")
    words: list[str] = []
    if isinstance(test, str):
        words = ["--health-cmd", test]
    elif isinstance(test, list) and len(test) > 1:
        import shlex

        line = test[1] if test[0] == "CMD-SHELL" else shlex.join(str(one) for one in test[1:])
        words = ["--health-cmd", str(line)]
    for key in ("interval", "timeout", "retries", "start_period"):
        if check.get(key) is not None:
            words += [f"--health-{key.replace('_', '-')}", str(check[key])]
    return words
