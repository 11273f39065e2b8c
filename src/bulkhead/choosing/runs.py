"""The exact commands that put an item behind a boundary here."""

import shlex

from bulkhead.choosing.items import Item, Mount

MACHINE_MEMORY = 1 << 30
"""Of a whole machine whose source does not say how much it has."""


def line(words: list[str]) -> str:
    """Words as one line that a shell reads back."""
    return shlex.join(words)


def instances(item: Item) -> list[str]:
    """The names of its copies here."""
    base = f"{item.group}-{item.name}" if item.group and item.kind != "container" else item.name
    base = item.called or base
    base = "".join(one if one.isalnum() or one in "_.-" else "-" for one in base).strip("-._")
    base = base or "workload"
    if item.replicas <= 1:
        return [base]
    return [f"{base}-{number}" for number in range(1, item.replicas + 1)]


def networks(item: Item) -> list[list[str]]:
    """What makes the networks it needs."""
    return [["bulkhead", "network", "create", name] for name in item.networks]


def volumes(item: Item) -> list[list[str]]:
    """What makes the named volumes it needs."""
    return [
        ["bulkhead", "volume", "create", one.source]
        for one in item.mounts
        if one.kind == "volume" and one.source
    ]


def _mount(mount: Mount) -> list[str]:
    if mount.kind == "tmpfs":
        return ["--tmpfs", mount.target]
    if not mount.source:
        return ["-v", mount.target]
    return ["-v", f"{mount.source}:{mount.target}{':ro' if mount.read_only else ''}"]


def run(item: Item, boundary: str, name: str, *, first: bool = True) -> list[str]:
    """`bulkhead run` of one copy; fixed ports belong to the first one."""
    words = ["bulkhead", "run", "-d", "--name", name, "--boundary", boundary]
    for index, network in enumerate(item.networks):
        words += ["--network", network]
        if index == 0:
            words += ["--network-alias", item.name]
    for port in item.ports:
        if first or ":" not in port:
            words += ["-p", port]
    for mount in item.mounts:
        words += _mount(mount)
    for variable in item.env:
        words += ["-e", variable]
    for key, value in item.labels.items():
        words += ["--label", f"{key}={value}"]
    words += _limits(item)
    words += item.options
    entry = item.entrypoint
    if entry:
        words += ["--entrypoint", entry[0]]
    return [*words, item.image, *entry[1:], *item.command]


def _limits(item: Item) -> list[str]:
    words: list[str] = []
    if item.memory:
        words += ["--memory", str(item.memory)]
    if item.nano_cpus:
        words += ["--cpus", f"{item.nano_cpus / 10**9:g}"]
    if item.cpuset:
        words += ["--cpuset-cpus", item.cpuset]
    if item.user:
        words += ["--user", item.user]
    if item.read_only:
        words.append("--read-only")
    if item.privileged:
        words.append("--privileged")
    if item.kind != "service":  # a Compose file's are options already
        for one in item.capabilities:
            words += ["--cap-add", one]
        for one in item.devices:
            words += ["--device", one]
        for one in item.host_namespaces:
            words += [f"--{'network' if one == 'network' else one}", "host"]
    if item.restart and item.restart != "no":
        words += ["--restart", item.restart]
    return words


def machine(item: Item) -> list[list[str]]:
    """`vm import` of its disk and `vm create` from it."""
    name = instances(item)[0]
    if not item.disks:
        return []
    firmware = [one for one in item.options if one.startswith("--firmware")]
    create = ["bulkhead", "vm", "create", "--image", name]
    create += ["--memory", str(item.memory or MACHINE_MEMORY)]
    if item.nano_cpus:
        create += ["--cpus", f"{max(1, item.nano_cpus // 10**9)}"]
    for network in item.networks:
        create += ["--network", network]
    return [
        ["bulkhead", "vm", "import", *firmware, item.disks[0], name],
        [*create, "--no-seed", "--start", name],
    ]


def _shell(text: str) -> list[str]:
    return ["sh", "-ec", text]


def _from_docker(item: Item) -> list[list[str]]:
    """Stop it on its Docker host, and bring its image and its volumes here."""
    host = ["docker", "-H", item.source]
    image = shlex.quote(item.image)
    found = [
        _shell(f"{line([*host, 'save', item.image])} | bulkhead load"),
        [*host, "stop", item.name],
    ]
    for one in item.mounts:
        if one.kind == "volume" and one.source:
            there = line([*host, "run", "--rm", "--user", "0", "--entrypoint", "tar",
                          "-v", f"{one.source}:/volume:ro"])  # fmt: skip
            here = line(["bulkhead", "run", "--rm", "-i", "--user", "0", "--entrypoint", "tar",
                         "-v", f"{one.source}:/volume"])  # fmt: skip
            found.append(_shell(f"{there} {image} -C /volume -c . | {here} {image} -C /volume -x"))
    return found


def from_docker(item: Item) -> bool:
    """Whether it runs on a Docker host."""
    return item.kind == "container" and item.source.startswith(("unix:", "tcp:", "http:", "/"))


def strange(item: Item) -> str:
    """A name of it that a command would take for an option, "" if there is none."""
    sources = [one.source for one in item.mounts]
    names = [item.image, *item.networks, *sources, *item.disks]
    if from_docker(item):
        names.append(item.name)
    return next((one for one in names if one.startswith("-")), "")


def commands(item: Item, boundary: str) -> list[list[str]]:
    """Everything that brings it up behind the boundary, in order; nothing for a strange one."""
    if strange(item):
        return []
    if item.kind in ("domain", "disk") or (boundary == "vm" and item.disks):
        return [*networks(item), *machine(item)]
    if not item.image:
        return []
    names = instances(item)
    made = [run(item, boundary, name, first=name == names[0]) for name in names]
    first = _from_docker(item) if from_docker(item) else []
    return [*networks(item), *volumes(item), *first, *made]


def undo(item: Item, boundary: str) -> list[list[str]]:
    """What takes it away again; volumes and networks stay."""
    names = instances(item)
    if item.kind in ("domain", "disk") or (boundary == "vm" and item.disks):
        return [["bulkhead", "vm", "rm", "-f", names[0]]] if item.disks else []
    back = [["docker", "-H", item.source, "start", item.name]] if from_docker(item) else []
    return [["bulkhead", "rm", "-f", *names], *back] if item.image else []
