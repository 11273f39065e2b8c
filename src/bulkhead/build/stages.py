"""The stages of a Dockerfile, which of them a build needs, and the variables each one sees."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from bulkhead.build import expand
from bulkhead.build.instructions import Arg, Copy, From, Instruction, Run, parse
from bulkhead.build.parser import Document
from bulkhead.build.text import Spanned
from bulkhead.errors import Invalid
from bulkhead.oci import platform as platforms
from bulkhead.oci.image import Platform

PROXIES = frozenset(
    name
    for word in ("http_proxy", "https_proxy", "ftp_proxy", "no_proxy", "all_proxy")
    for name in (word, word.upper())
)
"""Arguments a RUN sees without ARG, which take no part in cache keys."""
EPOCH = "SOURCE_DATE_EPOCH"
_BUILDKIT = "BUILDKIT_"


@dataclass(slots=True)
class Stage:
    """One FROM and what follows. `name` "" if it has none; `base` is expanded."""

    index: int
    name: str
    base: str
    head: From
    platform: str
    instructions: list[Instruction] = field(default_factory=list)
    parent: "Stage | None" = None
    needs: set[int] = field(default_factory=set)
    """Indexes of the stages that must be ready before (parts of) this one."""

    @property
    def label(self) -> str:
        """How progress names it."""
        return self.name or f"stage-{self.index}"


@dataclass(slots=True)
class Plan:
    """All stages, the wanted one, and the arguments before the first FROM."""

    document: Document
    stages: list[Stage]
    target: Stage
    globals_: dict[str, str]
    used_arguments: set[str]

    def needed(self) -> list[Stage]:
        """The stages the target needs, in the file's order."""
        wanted: set[int] = set()

        def visit(index: int) -> None:
            if index not in wanted:
                wanted.add(index)
                for other in self.stages[index].needs:
                    visit(other)

        visit(self.target.index)
        return [stage for stage in self.stages if stage.index in wanted]

    def find(self, name: str, before: int) -> Stage | None:
        """The stage called so, or with that number, among those before `before`."""
        lowered = name.lower()
        for stage in reversed(self.stages[:before]):
            if stage.name and stage.name == lowered:
                return stage
        if name.isdecimal() and int(name) < before:
            return self.stages[int(name)]
        return None


def platform_arguments(build: Platform, target: Platform) -> dict[str, str]:
    """The predefined arguments of the global scope."""
    found: dict[str, str] = {}
    for prefix, one in (("BUILD", build), ("TARGET", target)):
        found[f"{prefix}PLATFORM"] = str(one)
        found[f"{prefix}OS"] = one.os
        found[f"{prefix}ARCH"] = one.architecture
        found[f"{prefix}VARIANT"] = one.variant
    return found


def plan(
    document: Document,
    *,
    arguments: Mapping[str, str],
    target: str,
    build: Platform,
    platform: Platform,
) -> Plan:
    """Read the stages; DockerfileError, and Invalid for a target there is not."""
    predefined = platform_arguments(build, platform)
    predefined["TARGETSTAGE"] = target or "default"
    globals_: dict[str, str] = {}
    scope: dict[str, str] = dict(predefined)
    used: set[str] = set()
    stages: list[Stage] = []
    for line in document.lines:
        instruction = parse(line)
        if isinstance(instruction, From):
            stages.append(_stage(document, instruction, stages, scope))
        elif not stages:
            if not isinstance(instruction, Arg):
                raise instruction.error(
                    f"no build stage in current context: {line.keyword} before the first FROM"
                )
            _globals(document, instruction, arguments, globals_, scope, used)
        else:
            stages[-1].instructions.append(instruction)
    if not stages:
        raise document.source.error("no FROM: an image must begin somewhere", document.lines[0].at)
    made = Plan(document, stages, stages[-1], {**predefined, **globals_}, used)
    for stage in stages:
        _needs(made, stage)
    made.target = _target(made, target)
    return made


def _globals(
    document: Document,
    instruction: Arg,
    arguments: Mapping[str, str],
    globals_: dict[str, str],
    scope: dict[str, str],
    used: set[str],
) -> None:
    for name, default in instruction.pairs:
        if name in arguments:
            value: str | None = arguments[name]
            used.add(name)
        else:
            value = expand.word(default, scope, document.escape) if default is not None else None
        if value is not None:
            globals_[name] = scope[name] = value
        elif name in scope:
            globals_[name] = scope[name]


def _stage(
    document: Document, head: From, before: Sequence[Stage], scope: Mapping[str, str]
) -> Stage:
    base = expand.word(head.image, scope, document.escape)
    if not base:
        raise head.image.error(f"base name ({head.image.text}) should not be blank")
    platform = ""
    if head.platform is not None:
        platform = expand.word(head.platform, scope, document.escape)
        if not platform:
            raise head.platform.error("empty platform value from expression")
        try:
            platforms.parse(platform)
        except Invalid as error:
            raise head.platform.error(error.message) from None
    if head.name and any(stage.name == head.name for stage in before):
        raise head.error(f"duplicate name {head.name}")
    stage = Stage(len(before), head.name, base, head, platform)
    for other in reversed(before):
        if other.name and other.name == base.lower():
            stage.parent = other
            stage.needs.add(other.index)
            break
    return stage


def _needs(plan_: Plan, stage: Stage) -> None:
    for instruction in stage.instructions:
        for origin in origins(instruction):
            name = origin.text
            if "$" in name:
                continue
            other = plan_.find(name, len(plan_.stages))
            if other is None:
                continue
            if other.index >= stage.index:
                raise origin.error(
                    f"stage {name!r} is not available here: only stages before this one are"
                )
            stage.needs.add(other.index)


def origins(instruction: Instruction) -> list[Spanned]:
    """The stages or images it takes files from."""
    if isinstance(instruction, Copy):
        return [instruction.origin] if instruction.origin is not None else []
    if isinstance(instruction, Run):
        return [m.values["from"] for m in instruction.mounts if m.text("from")]
    return []


def _target(plan_: Plan, name: str) -> Stage:
    if not name:
        return plan_.stages[-1]
    found = plan_.find(name, len(plan_.stages))
    if found is None:
        known = ", ".join(stage.name or str(stage.index) for stage in plan_.stages)
        raise Invalid(f'target stage "{name}" could not be found; there are: {known}')
    return found


class Scope:
    """The variables of one stage while it is built: its ENV, and the ARGs it has declared."""

    def __init__(
        self, globals_: Mapping[str, str], arguments: Mapping[str, str], env: Sequence[str]
    ) -> None:
        self._globals = globals_
        self._arguments = arguments
        self.env: dict[str, str] = {}
        for entry in env:
            name, _, value = entry.partition("=")
            self.env[name] = value
        self.args: dict[str, str] = {}
        self.declared: set[str] = set()

    def declare(self, instruction: Arg, escape: str) -> set[str]:
        """Run an ARG; the build arguments that it took."""
        taken = set()
        for name, default in instruction.pairs:
            self.declared.add(name)
            if name in self._arguments:
                self.args[name] = self._arguments[name]
                taken.add(name)
            elif default is not None:
                self.args[name] = expand.word(default, self.names, escape)
            elif name in self._globals:
                self.args[name] = self._globals[name]
        return taken

    @property
    def names(self) -> dict[str, str]:
        """What words are expanded with: ENV wins over ARG."""
        return {**self.args, **self.env}

    def run_arguments(self) -> dict[str, str]:
        """What a RUN sees of the arguments, and its cache key depends on."""
        return {name: value for name, value in self.args.items() if name not in self.env}

    def proxies(self) -> dict[str, str]:
        """Predefined proxy arguments that were given but not declared."""
        return {
            name: value
            for name, value in self._arguments.items()
            if name in PROXIES and name not in self.declared and name not in self.env
        }


def unknown(plan_: Plan, arguments: Mapping[str, str]) -> list[str]:
    """Build arguments that no ARG of the file asks for."""
    asked = set(plan_.used_arguments) | PROXIES | {EPOCH}
    for stage in plan_.stages:
        for instruction in stage.instructions:
            if isinstance(instruction, Arg):
                asked.update(name for name, _ in instruction.pairs)
    return sorted(n for n in arguments if n not in asked and not n.startswith(_BUILDKIT))
