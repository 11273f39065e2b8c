"""One stage being built: its state, and what each instruction does to it."""

import contextlib
import dataclasses
import os
import posixpath
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from bulkhead.build import accounts, configure, expand, fetch, git, keys, running
from bulkhead.build.cache import Step as Remembered
from bulkhead.build.copying import Options as CopyOptions
from bulkhead.build.copying import Plan
from bulkhead.build.globs import is_pattern
from bulkhead.build.ignore import Ignore
from bulkhead.build.ignore import lines as ignore_lines
from bulkhead.build.instructions import (
    Arg,
    Command,
    Copy,
    Health,
    Instruction,
    OnBuild,
    Pairs,
    Run,
    Words,
    parse,
)
from bulkhead.build.parser import parse as parse_text
from bulkhead.build.report import Step
from bulkhead.build.stages import Scope, Stage
from bulkhead.build.text import Spanned
from bulkhead.build.trees import (
    ArchiveTree,
    DirectoryTree,
    EmptyTree,
    Node,
    Tree,
    may_be_archive,
)
from bulkhead.errors import BulkheadError, Corrupt, Invalid, NotFound
from bulkhead.images import assemble
from bulkhead.images.timestamps import now, of_nanoseconds
from bulkhead.oci.image import ContainerConfig, Descriptor, History

if TYPE_CHECKING:
    from bulkhead.build.builder import Builder


@dataclass(slots=True)
class State:
    """What a stage has become so far."""

    layers: list[str] = field(default_factory=list)
    descriptors: list[Descriptor] = field(default_factory=list)
    config: ContainerConfig = field(default_factory=ContainerConfig)
    history: list[History] = field(default_factory=list)
    image: str = ""
    author: str = ""
    created: str = ""
    platform: str = ""
    inherited: int = 0
    """Layers that were there before the first stage of the chain."""

    def copied(self) -> "State":
        """For a stage that begins with this one."""
        return dataclasses.replace(
            self,
            layers=list(self.layers),
            descriptors=list(self.descriptors),
            config=configure.copied(self.config),
            history=list(self.history),
        )


class StageBuild:
    """Runs the instructions of one stage, in a thread of its own."""

    def __init__(self, builder: "Builder", stage: Stage) -> None:
        self.builder = builder
        self.stage = stage
        self.escape = builder.plan.document.escape
        self.state = State()
        self.scope = Scope({}, {}, ())
        self._cmd_set = False
        self._number = 0
        self._total = 1 + len(stage.instructions)

    def run(self) -> State:
        """Build it; errors have the place of the instruction."""
        self._begin()
        self.scope = Scope(
            self.builder.plan.globals_, self.builder.options.args, self.state.config.env or ()
        )
        triggers, self.state.config.on_build = self.state.config.on_build or [], None
        inherited = [self._trigger(text) for text in triggers]
        self._total += len(inherited)
        for instruction in (*inherited, *self.stage.instructions):
            self.builder.check()
            self._instruction(instruction)
        return self.state

    # --- beginning

    def _step(self, text: str, line: int = 0) -> Step:
        self._number += 1
        name = f"[{self.stage.label} {self._number}/{self._total}] {text}"
        return self.builder.reporter.step(name, stage=self.stage.index, text=text, line=line)

    def _begin(self) -> None:
        stage = self.stage
        text = stage.head.line.whole.text
        if stage.parent is not None:
            self.state = self.builder.stage(stage.parent).copied()
            self._step(text, stage.head.line.at.line).done()
            return
        step = self._step(text, stage.head.line.at.line)
        if stage.base == "scratch":
            self.state.platform = str(self.builder.platform(stage.platform))
        else:
            try:
                self.state = self.builder.base(stage.base, stage.platform, step)
            except BulkheadError as error:
                raise stage.head.image.error(error.message) from error
        configure.with_path(self.state.config)
        step.done()

    def _trigger(self, text: str) -> Instruction:
        document = parse_text("ONBUILD", text.encode("utf-8", "surrogateescape"))
        if len(document.lines) != 1:
            raise self.stage.head.error(f"the base image has a malformed ONBUILD trigger: {text!r}")
        return parse(document.lines[0])

    # --- instructions

    def _instruction(self, instruction: Instruction) -> None:
        if isinstance(instruction, Arg):
            self._number += 1
            self.scope.declare(instruction, self.escape)
            names = [f"{n}={self.scope.args[n]}" if n in self.scope.args else n
                     for n, _ in instruction.pairs]  # fmt: skip
            self._meta(f"ARG {' '.join(names)}")
            return
        line = instruction.line
        step = self._step(_flat(line.whole.text), line.at.line)
        try:
            self._dispatch(instruction, step)
        except BulkheadError as error:
            step.failed(error.message)
            if "line" in error.details:
                raise
            wrapped = line.whole.error(error.message)
            wrapped.details.update(error.details)
            raise wrapped from error
        step.done()

    def _dispatch(self, instruction: Instruction, step: Step) -> None:
        if isinstance(instruction, Run):
            running.run(self, instruction, step)
        elif isinstance(instruction, Copy):
            self._copy(instruction, step)
        elif isinstance(instruction, Pairs):
            self._pairs(instruction)
        elif isinstance(instruction, Command):
            self._command(instruction)
        elif isinstance(instruction, Health):
            self.state.config.healthcheck = configure.healthcheck(instruction)
            self._meta(_flat(instruction.line.whole.text))
        elif isinstance(instruction, OnBuild):
            config = self.state.config
            config.on_build = [*(config.on_build or ()), instruction.trigger]
            self._meta(f"ONBUILD {instruction.trigger}")
        elif isinstance(instruction, Words):
            self._words(instruction, step)
        else:
            raise instruction.error(f"{instruction.keyword} is not possible here")

    def word(self, text: Spanned) -> str:
        """With variables put in."""
        return expand.word(text, self.scope.names, self.escape)

    def _pairs(self, instruction: Pairs) -> None:
        pairs = [(self.word(key), self.word(value)) for key, value in instruction.pairs]
        for (key, _), (at, _) in zip(pairs, instruction.pairs, strict=True):
            if not key or (instruction.keyword == "ENV" and "=" in key):
                raise at.error(f"{instruction.keyword} names can not be blank")
        if instruction.keyword == "ENV":
            configure.set_env(self.state.config, pairs)
            self.scope.env.update(pairs)
        else:
            configure.set_labels(self.state.config, dict(pairs))
        shown = " ".join(f"{key}={value}" for key, value in pairs)
        self._meta(f"{instruction.keyword} {shown}")

    def _command(self, instruction: Command) -> None:
        config = self.state.config
        found = configure.command(config, instruction)
        if instruction.keyword == "CMD":
            config.cmd = found
            self._cmd_set = True
        else:
            config.entrypoint = found
            if not self._cmd_set:
                config.cmd = None
        shown = " ".join(f'"{word}"' for word in found)
        self._meta(f"{instruction.keyword} [{shown}]")

    def _words(self, instruction: Words, step: Step) -> None:
        config, first = self.state.config, instruction.values[0]
        keyword = instruction.keyword
        if keyword == "SHELL":
            config.shell = [word.text for word in instruction.values]
            self._meta(f"SHELL [{' '.join(config.shell)}]")
            return
        values = [self.word(word) for word in instruction.values]
        if not all(values):
            raise instruction.error(f"{keyword} requires a value: {first.text!r} is empty")
        if keyword == "EXPOSE":
            for one, at in zip(values, instruction.values, strict=True):
                for port in one.split():
                    configure.expose(config, port, at)
        elif keyword == "VOLUME":
            config.volumes = {**(config.volumes or {}), **{place: {} for place in values}}
        elif keyword == "USER":
            config.user = values[0]
        elif keyword == "STOPSIGNAL":
            config.stop_signal = configure.stop_signal(values[0], first)
        elif keyword == "MAINTAINER":
            self.state.author = values[0]
        elif keyword == "WORKDIR":
            self._workdir(values[0], step)
            return
        self._meta(f"{keyword} {' '.join(values)}")

    def _workdir(self, path: str, step: Step) -> None:
        place = configure.workdir(self.state.config, path)
        text = f"WORKDIR {place}"
        with self.tree() as base:
            plan = Plan(base, CopyOptions(now_ns=self.now_ns))
            if place == "/" or not plan.make_directory(place):
                self._meta(text)
                return
            self._layer_of(plan, text, step)

    # --- files

    @property
    def now_ns(self) -> int:
        """The time that what is made now gets."""
        epoch = self.builder.epoch
        return time.time_ns() if epoch is None else epoch * 10**9

    @contextlib.contextmanager
    def tree(self) -> Iterator[Tree]:
        """The stage's files as they are now."""
        with self.builder.layers_tree(self.state.layers) as tree:
            yield tree

    def _copy(self, instruction: Copy, step: Step) -> None:
        with contextlib.ExitStack() as undo:
            base: Tree = undo.enter_context(self.tree())
            options = CopyOptions(parents=instruction.parents, now_ns=self.now_ns)
            if instruction.chown is not None:
                owner = self.word(instruction.chown)
                options.owner = accounts.owner(owner, base, instruction.chown)
            if instruction.chmod is not None:
                options.chmod = self.word(instruction.chmod)
            if instruction.exclude:
                texts = [self.word(one) for one in instruction.exclude]
                options.exclude = Ignore(ignore_lines("\n".join(texts)))
            plan = Plan(EmptyTree() if instruction.link else base, options)
            target = self.word(instruction.target)
            directory = self._many(instruction, target)
            place = posixpath.join("/", self.state.config.working_dir or "/", target)
            source = _Sources(self, instruction, plan, place, undo)
            source.add(directory=directory)
            shown = " ".join([*(s.text for s in instruction.sources),
                              *(f"<<{d.name}" for d in instruction.documents), target])  # fmt: skip
            self._layer_of(plan, git.redacted(f"{instruction.keyword} {shown}"), step)

    def _many(self, instruction: Copy, target: str) -> bool:
        """Whether the target must be a directory."""
        slash = target.endswith(("/", "/.")) or target in (".", "..")
        if len(instruction.sources) + len(instruction.documents) > 1 and not slash:
            raise instruction.target.error(
                f"When using {instruction.keyword} with more than one source file, the destination "
                "must be a directory and end with a /"
            )
        return slash

    def _layer_of(self, plan: Plan, text: str, step: Step) -> None:
        if not plan.items:
            self._meta(text)
            return
        epoch = self.builder.epoch
        key = keys.copy(digest=plan.digest(), epoch=epoch)
        limit = None if epoch is None else epoch * 10**9
        self.result(key, text, "copy", step, lambda: plan.tar(limit))

    # --- results

    def result(
        self,
        key: str,
        text: str,
        kind: str,
        step: Step,
        make: Callable[[], Iterator[bytes]],
    ) -> None:
        """The layer remembered for `key`, else the one that `make` gives the tar of."""
        with self.builder.once(key):
            known = self.recall(key)
            if known is None:
                layer = self.builder.host.store.ingest(make(), compression="", keep_blob=False)
                diff_id = layer.diff_id if layer.entries else ""
                known = self.remember(key, diff_id, layer.size, text, kind)
            else:
                step.cached = True
        self.append(known, text, step)

    def recall(self, key: str) -> Remembered | None:
        """A result that may be used."""
        if self.builder.options.no_cache and key not in self.builder.made:
            return None
        known = self.builder.cache.get(key)
        if known is None:
            return None
        if known.diff_id and self.builder.host.store.layer(known.diff_id) is None:
            self.builder.cache.forget(key)
            return None
        self.builder.made.add(key)
        return known

    def remember(self, key: str, diff_id: str, size: int, text: str, kind: str) -> Remembered:
        """Write a result down."""
        step = Remembered(key, diff_id, size if diff_id else 0, self._stamp(), _flat(text), kind)
        self.builder.cache.put(step)
        self.builder.made.add(key)
        return step

    def _stamp(self) -> str:
        epoch = self.builder.epoch
        return now() if epoch is None else of_nanoseconds(epoch * 10**9)

    def append(self, known: Remembered, text: str, step: Step) -> None:
        """Add a result to the stage."""
        state = self.state
        state.created = max(state.created, known.created)
        entry = History(known.created, text, comment="bulkhead build")
        if self.builder.inline:
            entry.comment += f" {known.key}"
        if known.diff_id:
            state.layers.append(known.diff_id)
            state.descriptors.append(assemble.tar_layer(known.diff_id, known.size))
            step.layer = known.diff_id
        else:
            entry.empty_layer = True
        state.history.append(entry)

    def _meta(self, text: str) -> None:
        """An instruction that changes no files."""
        entry = History(None, text, comment="bulkhead build", empty_layer=True)
        self.state.history.append(entry)


class _Sources:
    """The sources of one COPY or ADD, put into its plan."""

    def __init__(
        self,
        build: StageBuild,
        instruction: Copy,
        plan: Plan,
        place: str,
        undo: contextlib.ExitStack,
    ) -> None:
        self._build = build
        self._instruction = instruction
        self._plan = plan
        self._place = place
        self._undo = undo

    def add(self, *, directory: bool) -> None:
        """All of them; NotFound if nothing matches at all."""
        build, plan, found = self._build, self._plan, False
        for document in self._instruction.documents:
            text = document.body
            if document.expand:
                spanned = Spanned(build.stage.head.line.whole.source, text, (0,), (document.at,))
                text = expand.body(spanned, build.scope.names, build.escape)
            data = text.encode("utf-8", "surrogateescape")
            plan.document(data, document.name, self._place, directory=directory)
            found = True
        for spanned in self._instruction.sources:
            source = build.word(spanned)
            try:
                self._one(source, spanned, directory=directory)
                found = True
            except NotFound as error:
                if not is_pattern(source):
                    what = f"failed to calculate checksum of ref: {error.message}"
                    raise spanned.error(what) from error
        if not found:
            raise self._instruction.error(f"{self._instruction.keyword}: no source files found")

    def _one(self, source: str, at: Spanned, *, directory: bool) -> None:
        build = self._build
        if self._instruction.keyword == "ADD":
            if git.is_git(source):
                self._repository(source, at)
                return
            if fetch.is_url(source):
                self._url(source, at, directory=directory)
                return
            if self._instruction.keep_git:
                raise at.error("--keep-git-dir is for git sources only")
            if self._instruction.checksum is not None:
                raise at.error("checksum can't be specified for local sources")
        if self._instruction.origin is not None:
            name = build.word(self._instruction.origin)
            tree = build.builder.origin(build, name, self._instruction.origin, self._undo)
        else:
            tree = build.builder.context_tree(at)
        if self._instruction.keyword == "ADD" and self._instruction.unpack is not False:
            archive = self._archive(tree, source)
            if archive is not None:
                self._plan.archive(archive, self._place)
                return
        self._plan.add(tree, source, self._place, directory=directory)

    def _archive(self, tree: Tree, source: str) -> ArchiveTree | None:
        """The tree of a local archive, None if the source is none."""
        if is_pattern(source):
            return None
        _, node = tree.resolve(source)
        if node is None or not node.is_file or node.size < 32:
            return None
        return self._unpacked(tree, node)

    def _unpacked(self, tree: Tree, node: Node) -> ArchiveTree | None:
        first = next(iter(tree.read(node)), b"")
        if not may_be_archive(first):
            return None
        try:
            archive = ArchiveTree.read_from(tree.read(node), self._build.builder.directory)
        except (Invalid, Corrupt):
            if first[257:262] == b"ustar":
                raise
            return None
        self._undo.callback(archive.close)
        return archive if archive.count else None

    def _repository(self, url: str, at: Spanned) -> None:
        """What is in a git repository, into the directory that is the target."""
        build, checksum = self._build, self._instruction.checksum
        wanted = build.word(checksum) if checksum is not None else ""
        if wanted and not re.fullmatch(r"[0-9a-f]{7,40}", wanted):
            raise at.error(f"invalid checksum {wanted!r}: of a git source it is a commit")
        fetcher, keep = build.builder.fetcher(), self._instruction.keep_git
        try:
            found = fetcher.checkout(git.parse(url), keep=keep)
            place, commit = self._undo.enter_context(found)
        except BulkheadError as error:
            raise at.error(error.message) from error
        if wanted and not commit.startswith(wanted):
            raise at.error(f"digest mismatch for {git.redacted(url)}: {commit}, expected: {wanted}")
        fd = os.open(place, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self._undo.callback(os.close, fd)
        self._plan.add(DirectoryTree(fd, owners=False), ".", self._place, directory=True)

    def _url(self, url: str, at: Spanned, *, directory: bool) -> None:
        build, checksum = self._build, self._instruction.checksum
        wanted = build.word(checksum) if checksum is not None else ""
        file, modified, _ = fetch.download(url, build.builder.directory, wanted, at)
        self._undo.callback(file.close)
        size = file.tell()
        node = Node("", 0o100600, size=size, mtime_ns=modified or build.now_ns)
        stored = _StoredFile(file.fileno(), node)
        if self._instruction.unpack:
            archive = self._unpacked(stored, node)
            if archive is not None:
                self._plan.archive(archive, self._place)
                return
        node.path = fetch.file_name(url, at) if directory else "file"
        self._plan.add(stored, node.path, self._place, directory=directory)


class _StoredFile(Tree):
    """One fetched file."""

    keeps_owners = False

    def __init__(self, fd: int, file: Node) -> None:
        self._fd = fd
        self._file = file

    def node(self, path: str) -> Node | None:
        """As `Tree` says."""
        return self._file if path == self._file.path else Node("", 0o40755) if not path else None

    def children(self, node: Node) -> list[Node]:
        """As `Tree` says."""
        return [] if node is self._file else [self._file]

    def read(self, node: Node) -> Iterator[bytes]:
        """As `Tree` says."""
        at = 0
        while piece := os.pread(self._fd, 1 << 20, at):
            at += len(piece)
            yield piece


def _flat(text: str) -> str:
    """One line for progress and history."""
    return " ".join(text.split()) if "\n" in text else text
