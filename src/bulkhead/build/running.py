"""RUN: mounts, environment and key of a step, and its layer."""

import contextlib
import os
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bulkhead.build import configure, keys
from bulkhead.build.copying import Options as CopyOptions
from bulkhead.build.copying import Plan
from bulkhead.build.host import Bind, Job
from bulkhead.build.instructions import Mount, Run
from bulkhead.build.report import Step
from bulkhead.build.stages import EPOCH
from bulkhead.build.trees import EmptyTree
from bulkhead.errors import Invalid
from bulkhead.linux import copying, openat2
from bulkhead.linux.fds import OwnedFd

if TYPE_CHECKING:
    from bulkhead.build.steps import StageBuild

_SCRIPTS = "/dev/pipes"
_AGENT = "/run/buildkit/ssh_agent"
_SECRETS = "/run/secrets"


class StepFailed(Invalid):
    """A RUN whose program failed; `details["code"]` is its exit code."""


@dataclass(slots=True)
class _Prepared:
    """The mounts of a step: for its key, and (made later) for running it."""

    keys: list[dict[str, Any]] = field(default_factory=list)
    binds: list[Bind] = field(default_factory=list)
    env: list[str] = field(default_factory=list)
    private: list[str] = field(default_factory=list)
    """Variables that are secrets."""


def run(build: "StageBuild", instruction: Run, step: Step) -> None:
    """Do it, or find it done."""
    builder, state = build.builder, build.state
    args, scripts = command(build, instruction)
    arguments = build.scope.run_arguments()
    env = [*(state.config.env or ()), *(f"{k}={v}" for k, v in sorted(arguments.items()))]
    if builder.epoch is not None and EPOCH not in build.scope.names:
        env.append(f"{EPOCH}={builder.epoch}")
    mounts = _Mounts(build, instruction)
    network = instruction.network if instruction.network not in ("", "default") else ""
    network = network or builder.options.network
    _entitled(build, instruction)
    key = keys.run(
        layers=state.layers,
        args=args,
        documents=scripts,
        env=env,
        user=state.config.user,
        directory=state.config.working_dir,
        mounts=mounts.keys(),
        network=network,
        boundary=builder.options.boundary,
        platform=state.platform,
        epoch=builder.epoch,
        privileged=instruction.insecure,
    )
    text = _shown(arguments, args)
    with builder.once(key):
        known = build.recall(key)
        if known is not None:
            step.cached = True
            build.append(known, text, step)
            return
        with contextlib.ExitStack() as undo:
            prepared = mounts.make(undo)
            prepared.binds += _scripts(build, scripts, undo)
            job = Job(
                layers=state.layers,
                image=state.image,
                args=args,
                env=[*env, *(f"{k}={v}" for k, v in build.scope.proxies().items()), *prepared.env],
                user=state.config.user,
                directory=state.config.working_dir or "/",
                binds=prepared.binds,
                network=network,
                boundary=builder.options.boundary,
                platform=state.platform,
                privileged=instruction.insecure,
                limits=builder.options.limits,
                private=prepared.private,
                latest_ns=None if builder.epoch is None else builder.epoch * 10**9,
            )
            made = _execute(build, instruction, job, step)
        known = build.remember(key, *made, text, "run")
    build.append(known, text, step)


def _entitled(build: "StageBuild", instruction: Run) -> None:
    """What only the one who builds may grant, as a Dockerfile can come from anywhere."""
    options = build.builder.options
    for name, asked in (
        ("network.host", instruction.network == "host" and options.network != "host"),
        ("security.insecure", instruction.insecure),
    ):
        if asked and name not in options.allow:
            raise instruction.error(f"{name} is not allowed: build with --allow {name} to grant it")


def _execute(build: "StageBuild", instruction: Run, job: Job, step: Step) -> tuple[str, int]:
    """The layer's diff_id ("" if nothing changed) and size."""
    builder = build.builder
    made: list[tuple[str, int]] = []

    def keep(tar: Iterator[bytes]) -> None:
        layer = builder.host.store.ingest(tar, compression="", keep_blob=False)
        made.append((layer.diff_id if layer.entries else "", layer.size))

    with builder.slot():
        code = builder.host.run(job, step.output, builder.stop, keep)
    builder.check()
    if code:
        shown = " ".join(job.args)
        error = instruction.error(f"The command '{shown}' returned a non-zero code: {code}")
        raise StepFailed(error.message, code=code, **error.details)
    return made[0]


def _shown(arguments: dict[str, str], args: list[str]) -> str:
    """How history shows it, as Docker does."""
    given = "".join(f"{name}={value} " for name, value in sorted(arguments.items()))
    counted = f"|{len(arguments)} {given}" if arguments else ""
    return f"RUN {counted}{' '.join(args)}"


def command(build: "StageBuild", instruction: Run) -> tuple[list[str], list[tuple[str, str]]]:
    """What is executed, and the scripts (name, content) it needs as files."""
    if instruction.exec_form is not None:
        return list(instruction.exec_form), []
    shell = configure.shell(build.state.config)
    script = instruction.script
    documents = instruction.line.heredocs
    if not documents:
        return [*shell, script], []
    first = documents[0]
    alone = len(documents) == 1 and len(script.split()) == 1 and script.lstrip("0").startswith("<<")
    if alone and not first.body.startswith("#!"):
        return [*shell, first.body], []
    if alone:
        words = first.body.splitlines()[0][2:].split(None, 1)
        if not words:
            raise instruction.error("the script's first line names no interpreter")
        return [*words, f"{_SCRIPTS}/{first.name}"], [(first.name, first.body)]
    for document in documents:
        script += f"\n{document.body}{document.name}"
    return [*shell, script], []


def _scripts(
    build: "StageBuild", scripts: list[tuple[str, str]], undo: contextlib.ExitStack
) -> list[Bind]:
    binds = []
    for name, body in scripts:
        folder = undo.enter_context(build.builder.host.scratch())
        path = f"{folder}/script"
        with open(path, "wb") as file:
            file.write(body.encode("utf-8", "surrogateescape"))
        os.chmod(path, 0o755)
        binds.append(Bind(f"{_SCRIPTS}/{posixpath.basename(name)}", path, readonly=True))
    return binds


class _Mounts:
    """The --mount flags of one RUN."""

    def __init__(self, build: "StageBuild", instruction: Run) -> None:
        self._build = build
        self._mounts = instruction.mounts
        self._values = [
            {name: build.word(text) for name, text in mount.values.items()}
            for mount in instruction.mounts
        ]
        self._found: list[tuple[list[str], str]] = []
        """Layers and path of each bind mount's source, in order."""

    def _target(self, mount: Mount, values: dict[str, str], default: str = "") -> str:
        target = values.get("target") or default
        if not target:
            raise mount.at.error("the mount has no target")
        target = posixpath.join("/", self._build.state.config.working_dir or "/", target)
        target = "/" + posixpath.normpath(target).lstrip("/")
        if target == "/":
            raise mount.at.error("invalid mount target '/'")
        return target

    def keys(self) -> list[dict[str, Any]]:
        """What the step's result depends on."""
        found: list[dict[str, Any]] = []
        for mount, values in zip(self._mounts, self._values, strict=True):
            entry: dict[str, Any] = {"kind": mount.kind, **values}
            if mount.kind == "bind":
                source = self._source(mount, values)
                self._found.append(source)
                entry = {"kind": "bind", "target": values.get("target"), "layers": source[0],
                         "source": source[1], "rw": mount.flag("readwrite")}  # fmt: skip
            found.append(entry)
        return found

    def _source(self, mount: Mount, values: dict[str, str]) -> tuple[list[str], str]:
        """The layers a bind mount shows, and the path in them."""
        build, builder = self._build, self._build.builder
        path = values.get("source", "").strip("/")
        origin = mount.values.get("from")
        if origin is not None and values["from"]:
            layers = builder.origin_layers(build, values["from"], origin)
            with builder.layers_tree(layers) as tree:
                place, node = tree.resolve(path)
            if node is None:
                raise mount.at.error(f'"/{path}": not found')
            return layers, place
        tree = builder.context_tree(mount.at)
        place, node = tree.resolve(path)
        if node is None:
            raise mount.at.error(f'"/{path}": not found')
        plan = Plan(EmptyTree(), CopyOptions(now_ns=build.now_ns))
        plan.add(tree, path or ".", "/root/" if node.is_dir else "/root/file", directory=False)
        plan.make_directory("/root")
        key = keys.copy(digest=plan.digest(), epoch=builder.epoch)
        with builder.once(key):
            known = build.recall(key)
            if known is None:
                layer = builder.host.store.ingest(plan.tar(), compression="", keep_blob=False)
                known = build.remember(
                    key, layer.diff_id, layer.size, f"bind mount of {path or '.'}", "bind"
                )
        return [known.diff_id], "root" if node.is_dir else "root/file"

    def make(self, undo: contextlib.ExitStack) -> _Prepared:
        """Make them."""
        prepared = _Prepared()
        caches = self._caches(undo)
        sources = iter(self._found)
        for number, (mount, values) in enumerate(zip(self._mounts, self._values, strict=True)):
            if mount.kind == "bind":
                layers, path = next(sources)
                writable = mount.flag("readwrite") or values.get("readonly") == "false"
                place = undo.enter_context(
                    self._build.builder.host.place(layers, writable=writable)
                )
                source = f"{place}/{path}" if path else place
                prepared.binds.append(Bind(self._target(mount, values), source, not writable))
            elif mount.kind == "cache":
                prepared.binds.append(self._cache(mount, values, caches))
            elif mount.kind == "tmpfs":
                size = values.get("size", "")
                options = f"size={size}" if size else "rw"
                prepared.binds.append(
                    Bind(self._target(mount, values), tmpfs=f"exec,dev,suid,{options}")
                )
            elif mount.kind == "secret":
                self._secret(mount, values, prepared, undo)
            else:
                self._agent(mount, values, prepared, number)
        return prepared

    def _caches(self, undo: contextlib.ExitStack) -> dict[tuple[str, str], str]:
        """The directories of all cache mounts, taken in one order by everybody: no deadlock."""
        builder = self._build.builder
        wanted = {
            (values.get("id") or self._target(mount, values), values.get("sharing") or "shared")
            for mount, values in zip(self._mounts, self._values, strict=True)
            if mount.kind == "cache"
        }
        return {
            (name, sharing): undo.enter_context(builder.cache.mount(name, sharing, builder.check))
            for name, sharing in sorted(wanted)
        }

    def _cache(
        self, mount: Mount, values: dict[str, str], caches: dict[tuple[str, str], str]
    ) -> Bind:
        target = self._target(mount, values)
        path = caches[values.get("id") or target, values.get("sharing") or "shared"]
        with self._build.builder.once(f"cache mount {path}"):
            if not os.listdir(path):
                if values.get("from"):
                    self._filled(mount, values, path)
                os.chown(path, _number(mount, values, "uid", 0), _number(mount, values, "gid", 0))
                os.chmod(path, _mode(mount, values, 0o755))
        return Bind(target, path, readonly=mount.flag("readonly"))

    def _filled(self, mount: Mount, values: dict[str, str], path: str) -> None:
        """What a cache mount begins with: a directory of a stage or an image."""
        builder = self._build.builder
        layers = builder.origin_layers(self._build, values["from"], mount.values["from"])
        source = values.get("source", "").strip("/")
        with builder.layers_tree(layers) as tree:
            place, node = tree.resolve(source)
        if node is None or not node.is_dir:
            raise mount.at.error(f'"/{source}": there is no such directory')
        if not layers:
            return
        flags = os.O_RDONLY | os.O_DIRECTORY
        with builder.host.root(layers) as root, OwnedFd(os.open(path, flags)) as target:
            beneath = openat2.BENEATH | openat2.NO_SYMLINKS
            with openat2.openat2(root, place or ".", flags, beneath) as found:
                copying.copy_directory(int(found), int(target))

    def _secret(
        self,
        mount: Mount,
        values: dict[str, str],
        prepared: _Prepared,
        undo: contextlib.ExitStack,
    ) -> None:
        target, variable = values.get("target", ""), values.get("env", "")
        name = values.get("id") or values.get("source") or posixpath.basename(target)
        if not name:
            raise mount.at.error("a secret mount needs an id or a target")
        data = self._build.builder.options.secrets.get(name)
        if data is None:
            if mount.flag("required"):
                raise mount.at.error(f"secret {name}: not found")
            return
        if variable:
            text = data.decode("utf-8", "surrogateescape")
            prepared.private.append(f"{variable}={text}")
            if not target:
                return
        folder = undo.enter_context(self._build.builder.host.scratch())
        path = f"{folder}/secret"
        with open(path, "wb") as file:
            file.write(data)
        os.chown(path, _number(mount, values, "uid", 0), _number(mount, values, "gid", 0))
        os.chmod(path, _mode(mount, values, 0o400))
        place = self._target(mount, values, f"{_SECRETS}/{name}")
        prepared.binds.append(Bind(place, path, readonly=True))

    def _agent(
        self, mount: Mount, values: dict[str, str], prepared: _Prepared, number: int
    ) -> None:
        name = values.get("id") or "default"
        socket = self._build.builder.options.ssh.get(name)
        if socket is None:
            if mount.flag("required"):
                raise mount.at.error(f"no SSH agent {name!r} was given: use --ssh {name}")
            return
        if not os.path.exists(socket):
            raise mount.at.error(f"the SSH agent's socket {socket} does not exist")
        target = self._target(mount, values, f"{_AGENT}.{number}")
        prepared.binds.append(Bind(target, socket))
        prepared.env.append(f"SSH_AUTH_SOCK={target}")


def _number(mount: Mount, values: dict[str, str], name: str, default: int) -> int:
    text = values.get(name, "")
    if not text:
        return default
    if not text.isdecimal() or int(text) > 2**31 - 1:
        raise mount.at.error(f"{name} must be a number, not {text!r}")
    return int(text)


def _mode(mount: Mount, values: dict[str, str], default: int) -> int:
    text = values.get("mode", "")
    try:
        value = int(text, 8) if text else default
    except ValueError:
        raise mount.at.error(f"mode must be octal, not {text!r}") from None
    if value > 0o7777:
        raise mount.at.error(f"mode must be octal, not {text!r}")
    return value
