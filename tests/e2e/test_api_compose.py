"""Compose v2 of a newer Debian suite on our socket: a whole stack, its builds, its end."""

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.helpers.api_rig import Api, api, newer
from tests.helpers.images import has_busybox
from tests.helpers.installation import TIMEOUT_S, Done
from tests.helpers.residue import residue


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    if os.geteuid() != 0:
        pytest.skip("engines want root")
    if not has_busybox():
        pytest.skip("no static busybox here (apt-get install busybox-static)")
    newer("compose")
    folder = tmp_path_factory.mktemp("compose")
    with residue(str(folder)), api(folder) as made:
        yield made


Compose = Callable[..., Done]


@pytest.fixture
def compose(here: Api, tmp_path: Path) -> Iterator[Compose]:
    """Compose in a folder of its own; nothing of its project remains."""
    program = newer("compose")

    def run(*argv: str, **more: str) -> Done:
        done = subprocess.run(
            [program, "--project-name", "stack", *argv], capture_output=True, text=True,
            env=here.environment(COMPOSE_ANSI="never", **more), cwd=tmp_path, timeout=TIMEOUT_S,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        return Done(argv, done.returncode, done.stdout, done.stderr)

    yield run
    run("down", "-v", "-t", "0", "--rmi", "local").ok()
    with here.client() as client:
        assert client.containers.list(all=True) == []
        assert client.volumes.list() == []
        assert {net.name for net in client.networks.list()} == {"bridge", "host", "none"}


HEALTH = "interval: 1s, timeout: 60s, retries: 60"
STACK = f"""
services:
  db:
    image: busybox
    command: ["sh", "-c", "echo stored > /www/value; exec httpd -f -p 5432 -h /www"]
    healthcheck: {{test: ["CMD", "wget", "-qO-", "http://127.0.0.1:5432/value"], {HEALTH}}}
    volumes: ["data:/www"]
    networks: [back]
  seed:
    image: busybox
    command: ["sh", "-c", "wget -qO- http://db:5432/value"]
    depends_on: {{db: {{condition: service_healthy}}}}
    networks: [back]
  api:
    image: busybox
    init: true
    command: ["sh", "-c", "mkdir /w; wget -qO /w/index.html http://store:5432/value; httpd -fh /w"]
    links: ["db:store"]
    depends_on: {{seed: {{condition: service_completed_successfully}}}}
    healthcheck: {{test: ["CMD", "wget", "-qO-", "http://127.0.0.1/"], {HEALTH}}}
    networks: [back]
    configs: [{{source: words, target: /etc/words}}]
    secrets: [word]
  web:
    image: busybox
    command: ["sh", "-c", "wget -qO- http://api/; exec sleep 1000"]
    stop_signal: SIGKILL
    depends_on: {{api: {{condition: service_healthy}}}}
    networks: {{back: {{}}, front: {{aliases: [shop], ipv4_address: 10.99.7.5}}}}
    ports: ["127.0.0.1::80"]
    ulimits: {{nofile: 1000}}
    deploy: {{resources: {{limits: {{memory: 64m, cpus: "0.5"}}}}}}
networks:
  back: {{internal: true}}
  front: {{ipam: {{config: [{{subnet: 10.99.7.0/24}}]}}}}
volumes: {{data: {{}}}}
configs: {{words: {{file: ./words}}}}
secrets: {{word: {{file: ./word}}}}
"""


def test_a_stack_from_up_to_down(here: Api, tmp_path: Path, compose: Compose) -> None:
    (tmp_path / "compose.yaml").write_text(STACK)
    (tmp_path / "words").write_text("told\n")
    (tmp_path / "word").write_text("kept\n")
    compose("up", "-d", "--wait").ok()
    found = {one["Service"]: one for one in _lines(compose("ps", "--all", "--format", "json").ok())}
    assert {name: one["State"] for name, one in found.items()} == {
        "db": "running", "api": "running", "web": "running", "seed": "exited",
    }  # fmt: skip
    assert (found["db"]["Health"], found["api"]["Health"]) == ("healthy", "healthy")
    assert found["seed"]["ExitCode"] == 0
    logs = compose("logs", "--no-color").ok().out
    assert "seed-1  | stored" in logs
    told = compose("exec", "-T", "api", "cat", "/etc/words", "/run/secrets/word").ok()
    assert told.out == "told\nkept\n"
    assert compose("exec", "-T", "web", "wget", "-qO-", "http://api/").ok().out == "stored\n"
    compose("exec", "-T", "web", "sh", "-c", "exit 7").failed(7)
    limits = compose("exec", "-T", "web", "sh", "-c", "ulimit -n; ip address").ok().out
    assert "1000" in limits
    assert "10.99.7.5" in limits
    assert compose("port", "web", "80").ok().out.startswith("127.0.0.1:")
    assert "httpd" in compose("top", "db").ok().out
    compose("cp", "web:/etc/hostname", "copied").ok()
    assert (tmp_path / "copied").read_text().strip()
    compose("pause", "web").ok()
    compose("unpause", "web").ok()
    compose("restart", "-t", "0", "web").ok()
    # Nothing has changed: the second `up` makes nothing new.
    before = compose("ps", "-q").ok().out
    compose("up", "-d", "--wait").ok()
    assert set(compose("ps", "-q").ok().out.split()) == set(before.split())
    assert compose("run", "--rm", "--no-deps", "api", "echo", "ran").ok().out == "ran\n"
    compose("stop", "-t", "0").ok()
    assert compose("ps", "-q").ok().out == ""
    compose("start").ok()
    assert "stack" in compose("ls").ok().out


def _lines(done: Done) -> list[dict[str, object]]:
    """`ps --format json`: an object a line, in older versions one list."""
    found = [json.loads(line) for line in done.out.splitlines()]
    return found[0] if len(found) == 1 and isinstance(found[0], list) else found


def test_up_follows_its_services_to_their_end(tmp_path: Path, compose: Compose) -> None:
    (tmp_path / "compose.yaml").write_text(
        "services:\n"
        "  one: {image: busybox, command: [sh, -c, 'echo said; exit 5']}\n"
        "  two: {image: busybox, command: [sleep, '1000'], stop_signal: SIGKILL}\n"
    )
    done = compose("up", "--exit-code-from", "one")
    done.failed(5)
    assert "one-1  | said" in done.out


BUILT = """
services:
  one:
    build: {context: ., args: {WORD: given}, target: last, labels: {a: b}}
    command: ["sh", "-c", "cat /word; exec sleep 1000"]
    stop_signal: SIGKILL
"""
DOCKERFILE = """
FROM busybox AS first
ARG WORD
RUN echo $WORD > /word
FROM busybox AS last
COPY --from=first /word /word
"""


@pytest.fixture
def buildable(tmp_path: Path) -> Path:
    (tmp_path / "compose.yaml").write_text(BUILT)
    (tmp_path / "Dockerfile").write_text(DOCKERFILE)
    return tmp_path


def test_up_builds_without_buildkit(here: Api, buildable: Path, compose: Compose) -> None:
    compose("up", "-d", "--wait", "--build").ok()
    assert compose("exec", "-T", "one", "cat", "/word").ok().out == "given\n"
    with here.client() as client:
        assert client.images.get("stack-one").labels["a"] == "b"
    (buildable / "Dockerfile").write_text(DOCKERFILE.replace("$WORD", "other"))
    compose("up", "-d", "--wait", "--build").ok()
    assert compose("exec", "-T", "one", "cat", "/word").ok().out == "other\n"
    (buildable / "Dockerfile").write_text("FROM busybox AS last\nRUN exit 3\n")
    done = compose("build")
    assert done.code != 0
    assert "Dockerfile:2" in done.out + done.err


def test_buildkit_is_refused_in_one_line(here: Api, buildable: Path, compose: Compose) -> None:
    for argv in (("build",), ("up", "-d", "--build")):
        done = compose(*argv, DOCKER_BUILDKIT="1")
        assert done.code != 0
        lines = [line for line in done.err.splitlines() if "DOCKER_BUILDKIT=0" in line]
        assert lines, done.err
    with here.client() as client:
        # No BuildKit was started in a container instead.
        assert client.containers.list(all=True) == []
