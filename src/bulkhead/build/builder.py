"""A whole build: stages in threads, base images, the context, and the image at the end."""

import contextlib
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import msgspec

from bulkhead.build import attest, configure, fetch, git, keys, outputs, squash, transport
from bulkhead.build.cache import Cache
from bulkhead.build.cache import Step as Remembered
from bulkhead.build.host import Host
from bulkhead.build.ignore import Ignore
from bulkhead.build.instructions import Arg
from bulkhead.build.options import ENTITLEMENTS, Options
from bulkhead.build.parser import Document, parse
from bulkhead.build.report import Reporter, Sink, Step
from bulkhead.build.stages import Stage, plan, unknown
from bulkhead.build.steps import StageBuild, State
from bulkhead.build.text import Source, Spanned
from bulkhead.build.trees import (
    ArchiveTree,
    Context,
    Digests,
    DirectoryTree,
    EmptyTree,
    Tree,
    may_be_archive,
)
from bulkhead.errors import BulkheadError, Invalid, NotFound, Unavailable
from bulkhead.images import assemble
from bulkhead.images.catalog import Image, host_platform
from bulkhead.images.timestamps import now, of_nanoseconds
from bulkhead.oci import platform as platforms
from bulkhead.oci.image import ImageConfig, Platform, RootFS
from bulkhead.oci.reference import Reference
from bulkhead.oci.reference import parse as parse_reference

_MOST_STAGES = 256
_KEEP = "BUILDKIT_CONTEXT_KEEP_GIT_DIR"
_HEAD = 512
_LARGEST = 4 << 20


class Canceled(Unavailable):
    """The client left, or another stage failed."""


@dataclass(slots=True)
class Built:
    """The outcome."""

    image: str
    names: list[str] = field(default_factory=list)
    digest: str = ""


class Builder:
    """One build. `run` in a thread of its own; `stop` may be set by another."""

    def __init__(
        self,
        host: Host,
        cache: Cache,
        digests: Digests,
        options: Options,
        directory: str,
        sink: Sink,
    ) -> None:
        """`directory`: for nameless files."""
        self.host = host
        self.cache = cache
        self.options = options
        self.directory = directory
        self.reporter = Reporter(sink)
        self.stop = threading.Event()
        self.epoch = options.epoch
        self.inline = any(transport.is_inline(text) for text in options.cache_to)
        """Whether the image's history names the keys of its layers, for others' --cache-from."""
        self.made: set[str] = set()
        """Keys of results that this build made or used."""
        self.bases: dict[tuple[str, str], Image] = {}
        """What FROM and --from named, for provenance."""
        self._digests = digests
        self._context: Tree | None = None
        self._futures: dict[int, Future[State]] = {}
        self._locks: dict[str, threading.Lock] = {}
        self._mutex = threading.Lock()
        self._failure: BaseException | None = None
        self._slots = threading.Semaphore(max(2, os.cpu_count() or 1))

    # --- the whole

    def run(self, context: int | None, fds: Sequence[int] = ()) -> Built:
        """Build; `context` is the descriptor of a directory or of an archive's stream.

        `fds`: where the options' outputs go.
        """
        outputs.check(self.options.outputs, fds)
        for name in self.options.allow:
            if name not in ENTITLEMENTS:
                raise Invalid(f"cannot allow {name!r}: there are {', '.join(ENTITLEMENTS)}")
        references = [self._reference(tag) for tag in self.options.tags]
        with contextlib.ExitStack() as undo:
            undo.enter_context(self.host.store.lease())
            tree = undo.enter_context(self._opened(context))
            document = self._document(tree)
            self._ignore(tree)
            self._context = tree
            build = host_platform()
            self.plan = plan(
                document,
                arguments=self.options.args,
                target=self.options.target,
                build=build,
                platform=self.platform(""),
            )
            if len(self.plan.stages) > _MOST_STAGES:
                raise Invalid(f"more than {_MOST_STAGES} stages")
            if names := unknown(self.plan, self.options.args):
                self.reporter.warn(
                    f"One or more build-args {names} were not consumed".replace("'", "")
                )
            for source in self.options.cache_from:
                transport.load(self, source)
            state = self._stages()
            built = self._finish(state, references, fds)
            for target in self.options.cache_to:
                transport.save(self, target, state.layers)
            if self.options.push:
                self._push(references)
        return built

    def check(self) -> None:
        """Canceled once the build is to end."""
        if self.stop.is_set():
            raise Canceled("the build was canceled")

    def _reference(self, text: str) -> Reference:
        reference = parse_reference(text).tagged()
        if reference.digest is not None:
            raise Invalid(f"invalid tag {text!r}: a digest cannot be given to an image")
        return reference

    # --- context and file

    @contextlib.contextmanager
    def _opened(self, context: int | None) -> Iterator[Context]:
        kind = self.options.context
        if kind == "remote":
            with self._remote() as tree:
                yield tree
        elif kind == "none" or context is None:
            yield EmptyTree()
        elif kind == "directory":
            yield DirectoryTree(context, owners=False, digests=self._digests)
        else:
            step = self.reporter.step("[internal] load build context", stage=-1, text="", line=0)
            archive = ArchiveTree.read_from(_chunks(context), self.directory)
            archive.keeps_owners = False
            step.done()
            try:
                yield archive
            finally:
                archive.close()

    def fetcher(self) -> git.Fetcher:
        """What checks git repositories out for this build."""
        return git.Fetcher(
            self.directory,
            self.check,
            agent=self.options.ssh.get("default", ""),
            token=self.options.secrets.get(git.TOKEN, b""),
        )

    @contextlib.contextmanager
    def _remote(self) -> Iterator[Context]:
        """A context that the engine fetches: a repository, an archive, or a Dockerfile alone."""
        url = self.options.remote
        text = f"[internal] load remote build context {git.redacted(url)}"
        step = self.reporter.step(text, stage=-1, text="", line=0)
        with contextlib.ExitStack() as undo:
            if git.is_git(url):
                keep = self.options.args.get(_KEEP, "").lower() in ("1", "true")
                place, _ = undo.enter_context(self.fetcher().checkout(git.parse(url), keep=keep))
                fd = os.open(place, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
                undo.callback(os.close, fd)
                tree: Context = DirectoryTree(fd, owners=False)
            else:
                tree = undo.enter_context(self._downloaded(url))
            step.done()
            yield tree

    @contextlib.contextmanager
    def _downloaded(self, url: str) -> Iterator[Context]:
        if not fetch.is_url(url):
            raise Invalid(f"unable to prepare context: {url!r} is neither a git nor an HTTP URL")
        at = Spanned(Source(url, (url,)), url)
        file, _, _ = fetch.download(url, self.directory, "", at)
        with file:
            file.seek(0)
            head = file.read(_HEAD)
            file.seek(0)
            if may_be_archive(head):
                archive = ArchiveTree.read_from(_chunks(file.fileno()), self.directory)
                archive.keeps_owners = False
                with contextlib.closing(archive):
                    yield archive
                return
            data = file.read(_LARGEST + 1)
            if len(data) > _LARGEST:
                raise Invalid(f"{url} is no archive, and too large for a Dockerfile")
            self.options.dockerfile_data = data
            yield EmptyTree()

    def _document(self, tree: Tree) -> Document:
        name = self.options.dockerfile or "Dockerfile"
        data = self.options.dockerfile_data
        if data is None:
            data = tree.text(name)
            if data is None and not self.options.dockerfile:
                data = tree.text("dockerfile")
        if data is None:
            raise NotFound(f"Cannot locate specified Dockerfile: {name}")
        if not data.strip():
            raise Invalid(f"the Dockerfile ({name}) cannot be empty")
        return parse(name, data)

    def _ignore(self, tree: Context) -> None:
        name = self.options.dockerfile or "Dockerfile"
        data = self.options.ignore_data
        if data is None:
            data = tree.text(f"{name}.dockerignore") or tree.text(".dockerignore")
        if data:
            tree.ignoring(Ignore.read(data))

    def context_tree(self, at: Spanned) -> Tree:
        """The context."""
        assert self._context is not None
        if isinstance(self._context, EmptyTree):
            raise at.error("there is no build context: the Dockerfile came alone")
        return self._context

    def platform(self, text: str) -> Platform:
        """The platform that is built for; `text` is a stage's own."""
        wanted = text or self.options.platform
        return platforms.parse(wanted) if wanted else host_platform()

    # --- stages

    def _stages(self) -> State:
        needed = self.plan.needed()
        total = sum(
            1 + sum(not isinstance(one, Arg) for one in stage.instructions) for stage in needed
        )
        self.reporter.send(event="plan", total=total)
        with ThreadPoolExecutor(len(needed), thread_name_prefix="build") as pool:
            for stage in needed:
                self._futures[stage.index] = Future()
            for stage in needed:
                pool.submit(self._stage, stage)
        if self._failure is not None:
            raise self._failure
        return self._futures[self.plan.target.index].result()

    def _stage(self, stage: Stage) -> None:
        future = self._futures[stage.index]
        try:
            state = StageBuild(self, stage).run()
            self.reporter.send(event="stage", stage=stage.index)
            future.set_result(state)
        except BaseException as error:
            with self._mutex:
                if self._failure is None:  # what comes after it is its consequence
                    self._failure = error
            self.stop.set()
            future.set_exception(error)

    def stage(self, stage: Stage) -> State:
        """The finished stage; Canceled if it failed."""
        try:
            return self._futures[stage.index].result()
        except BulkheadError as error:
            raise Canceled(f"stage {stage.label} failed") from error

    @contextlib.contextmanager
    def once(self, key: str) -> Iterator[None]:
        """One step at a time that has this key: the second finds what the first made."""
        with self._mutex:
            lock = self._locks.setdefault(key, threading.Lock())
        with lock:
            yield

    @contextlib.contextmanager
    def slot(self) -> Iterator[None]:
        """One of the steps that may run at the same time."""
        with self._slots:
            self.check()
            yield

    # --- images

    def base(self, name: str, platform: str, step: Step) -> State:
        """A stage's state at its beginning: that of an image, pulled if it must be."""
        image = self.image(name, platform, step)
        manifest = self.host.images.catalog.manifest(image.manifest_digest)
        for descriptor, diff_id in zip(manifest.layers, image.diff_ids, strict=True):
            self.host.store.has(descriptor.digest)  # within the lease: stays
            if self.host.store.layer(diff_id) is None:
                raise NotFound(f"layer {diff_id} of {name} is not stored: pull it again")
        return State(
            layers=list(image.diff_ids),
            descriptors=list(manifest.layers),
            config=configure.copied(image.config.container),
            history=list(image.config.history or ()),
            image=image.id,
            author=image.config.author,
            created=image.created,
            platform=str(image.config.platform),
            inherited=len(image.diff_ids),
        )

    def image(self, name: str, platform: str, step: Step | None) -> Image:
        """The image called so for the platform, pulled if it must be."""
        wanted = platform or self.options.platform
        key = (name, wanted)
        with self.once(f"image {name} {wanted}"):
            if key not in self.bases:
                self.bases[key] = self._find(name, wanted, step)
            return self.bases[key]

    def _find(self, name: str, wanted: str, step: Step | None) -> Image:
        images = self.host.images
        target = platforms.parse(wanted) if wanted else None
        if not self.options.pull:
            with contextlib.suppress(NotFound):
                found = images.resolve(name)
                config = found.config
                if target is None or not config.architecture:
                    return found
                if platforms.suits(config.platform, target, exact=True):
                    return found
        auth = self.options.auths.get(parse_reference(name).domain)
        self.check()

        def progress(message: dict[str, object]) -> None:
            self.check()
            if step is not None:
                step.status(message)

        return images.pull(name, wanted or None, auth, progress=progress)

    def origin_layers(self, build: StageBuild, name: str, at: Spanned) -> list[str]:
        """The layers of the stage or image that --from names."""
        stage = self.plan.find(name, len(self.plan.stages))
        if stage is not None:
            if stage.index >= build.stage.index:
                raise at.error(f"stage {name!r} is not available here")
            return self.stage(stage).layers
        if name == "scratch":
            return []
        try:
            return list(self.image(name, build.stage.platform, None).diff_ids)
        except BulkheadError as error:
            raise at.error(error.message) from error

    def origin(self, build: StageBuild, name: str, at: Spanned, undo: contextlib.ExitStack) -> Tree:
        """The files of the stage or image that --from names."""
        return undo.enter_context(self.layers_tree(self.origin_layers(build, name, at)))

    @contextlib.contextmanager
    def layers_tree(self, layers: Sequence[str]) -> Iterator[Tree]:
        """The union of layers, bottom first."""
        if not layers:
            yield EmptyTree()
            return
        with self.host.root(layers) as root:
            yield DirectoryTree(root)

    # --- the end

    def _finish(self, state: State, references: Sequence[Reference], fds: Sequence[int]) -> Built:
        step = self.reporter.step("exporting to image", stage=-1, text="", line=0)
        if self.options.squash:
            squash.squash(self, state)
        configure.set_labels(state.config, self.options.labels)
        config = self._config(state)
        images = self.host.images
        stored = assemble.put_config(images.catalog, config, state.descriptors)
        if self.options.provenance or self.options.sbom:
            stored = attest.attach(self, state, config, stored)
        names = [reference.familiar for reference in references]
        digest = stored.index or stored.manifest.digest
        if self.options.store:
            assemble.name(images.catalog, stored, references)
        else:
            names = []
        step.done()
        outputs.write(self, state, stored, references, fds)
        self.reporter.send(event="image", id=stored.image, names=names, digest=digest)
        return Built(stored.image, names, digest)

    def _push(self, references: Sequence[Reference]) -> None:
        """The image to its registries, under each of its names."""
        if not references:
            raise Invalid("a build that is pushed needs a name: -t NAME")
        for reference in references:
            step = self.reporter.step(f"pushing {reference}", stage=-1, text="", line=0)
            auth = self.options.auths.get(reference.domain)
            self.host.images.push(str(reference), auth)
            step.done()

    def _config(self, state: State) -> ImageConfig:
        platform = platforms.parse(state.platform) if state.platform else host_platform()
        made = ImageConfig(
            architecture=platform.architecture,
            os=platform.os,
            variant=platform.variant,
            config=state.config,
            rootfs=RootFS(diff_ids=list(state.layers)),
            history=list(state.history),
            author=state.author,
        )
        made.created = self._created(made)
        last = made.created if self.epoch is not None else None
        for entry in made.history or ():
            if entry.created is None:
                entry.created = last or state.created or made.created
            last = last if self.epoch is not None else entry.created
        return made

    def _created(self, made: ImageConfig) -> str:
        """When the same image was first built: an unchanged rebuild gives the same id."""
        if self.epoch is not None:
            return of_nanoseconds(self.epoch * 10**9)
        key = keys.key("image", config=msgspec.to_builtins(made))
        known = None if self.options.no_cache else self.cache.get(key)
        if known is None:
            known = Remembered(key, "", 0, now(), "image", "image")
            self.cache.put(known)
        return known.created


def _chunks(fd: int) -> Iterator[bytes]:
    while piece := os.read(fd, 1 << 20):
        yield piece
