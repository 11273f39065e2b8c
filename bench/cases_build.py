"""Builds beside docker's classic builder: ten Dockerfiles, cold and unchanged."""

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tests.helpers.building import BASE, base_archive
from tests.helpers.dockerfiles import NODE, ONBUILD, PYTHON, SITE, STATIC, USERS, Project

from bench.measure import output

if TYPE_CHECKING:
    from bench.cases import Result, Rig

_NEWER = (
    "# syntax=docker/dockerfile:1\n", "--mount=type=cache,target=/root/.npm ", "--chmod=644 ",
    "--chmod=u=rwX,go= ",
)  # fmt: skip
"""What the classic builder does not know; both builders do without."""

_STEPS = Project(
    "steps",
    {"Dockerfile": "FROM @BASE@\n" + "".join(
        f"ENV STEP_{n}={n}\nRUN echo {n} > /step-{n}\n" for n in range(10)
    )}, (),
)  # fmt: skip
_FILES = Project(
    "files",
    {
        "Dockerfile": "FROM @BASE@\nWORKDIR /app\nCOPY . .\nRUN find . -type f | wc -l > /count\n",
        **{f"src/{n % 20}/{n}.txt": f"{n}\n" * 50 for n in range(1000)},
    },
    (),
)
_STAGES = Project(
    "stages",
    {"Dockerfile": "".join(
        f"FROM @BASE@ AS s{n}\nRUN i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done; echo > /{n}\n"
        for n in range(2)
    ) + "FROM @BASE@\nCOPY --from=s0 /0 /\nCOPY --from=s1 /1 /\n"}, (),
)  # fmt: skip
_ARGUMENTS = Project(
    "arguments",
    {"Dockerfile": "ARG V=1\nFROM @BASE@\nARG V\nARG W=w$V\nLABEL v=$V\nRUN echo $V $W > /v\n"
                   "USER nobody\nEXPOSE 80\nCMD [\"cat\", \"/v\"]\n"}, (),
)  # fmt: skip
PROJECTS = (PYTHON, NODE, STATIC, SITE, ONBUILD, USERS, _STEPS, _FILES, _STAGES, _ARGUMENTS)


def _seconds(command: Sequence[str], env: Mapping[str, str]) -> float:
    began = time.perf_counter()
    output(command, env)
    return time.perf_counter() - began


def builds(rig: "Rig") -> "Result":
    """Sums over ten Dockerfiles, the builders taking turns."""
    archive = str(base_archive())
    rig.ours("load", "-i", archive)
    rig.docker("load", "-i", archive)
    theirs = {**os.environ, "DOCKER_BUILDKIT": "0"}
    cold = {"ours": 0.0, "docker": 0.0}
    again = dict(cold)
    for project in PROJECTS:
        context = _write(rig, project)
        ours = [rig.ours.program, "build", "-q", "-t", project.name, str(context)]
        docker = rig.docker.command("build", "-q", "-t", project.name, str(context))
        for who, command, env in (("ours", ours, rig.ours.env), ("docker", docker, theirs)):
            if project.before:
                before = [*command[:-2], f"{project.name}-before", f"{context}-before"]
                output(before, env)
            cold[who] += _seconds([*command[:-1], "--no-cache", command[-1]], env)
            output(command, env)
            again[who] += min(_seconds(command, env) for _ in range(3))
    for name, found in (("cold", cold), ("unchanged", again)):
        rig.facts[f"ten Dockerfiles, {name}"] = (
            f"ours {found['ours']:.2f} s, docker's classic builder {found['docker']:.2f} s"
        )
    return {
        "build.cold": cold["docker"] / cold["ours"],
        "build.again": again["docker"] / again["ours"],
    }


def _write(rig: "Rig", project: Project) -> Path:
    folder = rig.folder / "builds" / project.name
    for place, files in ((folder, project.files), (Path(f"{folder}-before"), project.before)):
        if files:
            text = files["Dockerfile"]
            for word in _NEWER:
                text = text.replace(word, "")
            project.write(place, {**files, "Dockerfile": text})
    assert BASE in (folder / "Dockerfile").read_text() or project.before
    return folder


CASES = {"builds": builds}
