"""docker's command line and ours, the same lines: output, errors and exit codes."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import parity
from tests.helpers.dockerd import Dockerd, dockerd
from tests.helpers.images import Blobs, build, busybox_tar, docker_archive, has_busybox
from tests.helpers.installation import NATIVE, Installation, installation
from tests.helpers.residue import residue

SCENES = {
    "run": """
        D run --rm busybox true
        D run --rm busybox sh -c 'echo out; echo err >&2; exit 7'
        D run --rm busybox nope
        D run --rm busybox /etc
        D run --rm busybox sh -c 'kill -9 $$'
        echo in | D run --rm -i busybox cat
        D run --rm -e A=1 -e B busybox sh -c 'echo $A$B'
        D run --rm -w /tmp busybox pwd
        D run --rm -w /new/dir busybox pwd
        D run --rm -u alice busybox id
        D run --rm -u 5:6 busybox id
        D run --rm -u nope busybox id
        D run --rm --hostname box busybox hostname
        D run --rm --entrypoint echo busybox a b
        D run --rm --read-only busybox touch /x
        D run --rm --tmpfs /t busybox sh -c 'touch /t/x; echo $?'
        D run --rm --network none busybox ls /sys/class/net
        D run --rm --cap-drop all busybox chown 1 /tmp
        D run --rm --cap-drop nope busybox true
        D run --rm --cap-add sys_time --cap-drop net_raw busybox grep CapEff /proc/self/status
        D run --rm busybox grep -E 'Cap|Seccomp:|NoNewPrivs' /proc/self/status
        D run --rm --security-opt no-new-privileges busybox grep NoNewPrivs /proc/self/status
        D run --rm --init busybox ps
        D run --rm --ulimit nofile=100:200 busybox sh -c 'ulimit -n; ulimit -Hn'
        D run --rm --sysctl net.core.somaxconn=77 busybox cat /proc/sys/net/core/somaxconn
        D run --rm --add-host one:1.2.3.4 busybox grep one /etc/hosts
        D run --rm --dns 9.9.9.9 --dns-search x.y busybox cat /etc/resolv.conf
        D run --rm -m 1k busybox true
        D run --rm --cpus 900 busybox true
        D run --rm --name 'a b' busybox true
        D run --rm -p 1:2:3:4 busybox true
        D run --rm -v relative/x:/y busybox true
        D run --rm -v /nope:/x:zz busybox true
        D run --rm --mount type=bind,src=/nope/no,dst=/x busybox true
        D run --rm --network nope busybox true
        D run --rm --nonsense busybox true
        D run
        D run --rm --restart nope busybox true
        D run --rm --rm=false --restart always --rm busybox true
        D run --rm --env-file nope busybox true
        D run --rm --pull never nope:1 true
        D run --rm -d busybox true >/dev/null
        D run -it --rm busybox true
    """,
    "life": """
        D create --name one busybox sh -c 'echo begun; sleep 1000'
        D ps -a --format '{{.Names}} {{.Image}} {{.Command}} {{.Status}}'
        D start one
        D start one
        D ps --no-trunc --format '{{.Names}} {{.Image}} {{.Command}} {{.Ports}}'
        D ps
        D logs one
        D exec one echo in
        D exec one sh -c 'exit 4'
        D exec one nope
        D exec -u 5 -w /tmp -e X=y one sh -c 'id -u; pwd; echo $X'
        D exec nope true
        D pause one
        D exec one true
        D pause one
        D ps --format '{{.Status}}'
        D unpause one
        D unpause one
        D rename one two
        D rename two two
        D inspect -f '{{.Name}} {{.State.Status}} {{json .Config.Cmd}}' two
        D inspect -f '{{.HostConfig.NetworkMode}}' two
        D inspect -f '{{.Nope}}' two
        D inspect nope
        D rm two
        D kill -s NOPE two
        D update -m 64m --memory-swap 64m two
        D inspect -f '{{.HostConfig.Memory}}' two
        D top two -o pid,args | tail -1 | sed 's/[0-9]*//'
        D restart -t 0 two
        D stop -t 0 two
        D kill two
        D exec two true
        D wait two
        D inspect -f '{{.State.Status}} {{.State.ExitCode}} {{.State.OOMKilled}}' two
        D logs --tail 1 two
        D start -a nope
        D rm two
        D rm two
        D rm -f two
        D stop nope
        D wait nope
        D logs nope
        D port nope
        D cp nope:/x .
        D diff nope
        D stats --no-stream nope
        D attach nope
    """,
    "files": """
        D run --name box -d busybox sleep 1000
        echo text > file; D cp file box:/tmp/copy
        D exec box cat /tmp/copy
        D cp box:/tmp/copy back; cat back
        D cp box:/nope x
        D cp nope box:/tmp/
        D cp file box:/no/such/
        D cp box:/tmp/copy - | tar t
        D exec box rm /bin/yes; D diff box | sort
        D export box | tar t | grep -E '^(bin/sh|tmp/copy|bin/yes)$'
        D commit -m said box made:1
        D history --format '{{.Comment}} {{.CreatedBy}}' made:1 | head -2
        D images --format '{{.Repository}}:{{.Tag}}' | sort
        D run --rm --pull never made:1 cat /tmp/copy
        D tag made:1 made:2
        D rmi made:2
        D tag busybox:latest UPPER:x
        D rm -f box
        D rmi made:1
        D rmi nope
        D tag nope x
        D image inspect nope
        D history nope
        D save nope -o x.tar
        D pull UPPER 2>&1 >/dev/null
        echo nonsense | D load
    """,
    "network": """
        D network create net
        D network create net
        D network ls --format '{{.Name}} {{.Driver}} {{.Scope}}' | sort
        D network inspect -f '{{.Name}} {{.Driver}} {{.Internal}} {{len .Containers}}' net
        D run -d --name web --network net --network-alias www -p 127.0.0.1::80 busybox sleep 1000
        D port web | sed 's/:[0-9]*$//'
        D port web 80/tcp | sed 's/:[0-9]*$//'
        D port web 81
        D run --rm --network net busybox sh -c 'ping -c1 -W5 www >/dev/null; echo $?'
        D run --rm --network container:web busybox hostname -i
        D run --rm --network host -p 80:80 busybox true
        D run --rm -p "$(D port web 80)":80 busybox true 2>/dev/null
        D network rm net
        D network disconnect net web
        D network disconnect net web
        D network connect net web
        D network connect net web
        D network connect nope web
        D rm -f web
        D network rm net
        D network rm net
        D network rm bridge
        D network create --subnet 1.2.3.4/99 bad
        D network create --driver nope bad
        D network inspect nope
    """,
    "volumes": """
        D volume create vol
        D volume create vol
        D volume ls --format '{{.Name}} {{.Driver}}'
        D volume inspect -f '{{.Name}} {{.Driver}} {{.Scope}}' vol
        D run --rm -v vol:/v busybox sh -c 'echo kept > /v/f'
        D run --rm -v vol:/v:ro busybox sh -c 'cat /v/f; touch /v/x'
        D run --name user -v vol:/v busybox true
        D volume rm vol
        D rm user
        D volume rm vol
        D volume rm vol
        D volume inspect nope
        D volume create 'a b'
        D volume prune -f
    """,
    "words": """
        D nonsense
        D ps --nonsense
        D ps extra
        D rm
        D network nonsense
        D ps --filter nope=1
        D ps --format '{{.Nope}}'
        D ps --format '{{.ID'
        D images -q nope
        D logs
        D exec
        D inspect
        D stop --time x nope
        D version --format '{{.Client.Os}}'
        D info --format '{{.OSType}}'
        D container ls -q
        D image ls -q nope
        D container prune -f
        D image prune -f
        D network prune -f
        D -v | cut -d' ' -f2
    """,
}

NEWER = "as newer versions of docker say it"
MORE = "ours says what to do, or what exactly is wrong"
ORDER = "another mistake of the line is found first"

KNOWN = {
    "D run --rm --init busybox ps": "our init is another program",
    "D run --rm --dns 9.9.9.9 --dns-search x.y busybox cat /etc/resolv.conf": "another order",
    "D run --rm -p 1:2:3:4 busybox true": MORE,
    "D run --rm -v /nope:/x:zz busybox true": MORE,
    "D run --rm --restart nope busybox true": ORDER,
    "D run --rm --rm=false --restart always --rm busybox true": NEWER,
    "D run --rm --env-file nope busybox true": MORE,
    "D run -it --rm busybox true": MORE,
    "D exec one nope": NEWER + ", also the exit code",
    "D exec one true": "ours says the id",
    "D rename two two": "one line is enough",
    "D inspect -f '{{.HostConfig.NetworkMode}}' two": NEWER,
    "D inspect -f '{{.Nope}}' two": "no column",
    "D rm two": NEWER,
    "D cp nope:/x .": NEWER,
    "echo text > file; D cp file box:/tmp/copy": NEWER,
    "D cp box:/tmp/copy back; cat back": NEWER,
    "D cp box:/nope x": NEWER,
    "D cp nope box:/tmp/": "the path as it was given",
    "D cp file box:/no/such/": NEWER,
    "D tag busybox:latest UPPER:x": NEWER,
    "D tag nope x": "the name as it was given",
    "D history nope": "the name as it was given",
    "D pull UPPER 2>&1 >/dev/null": NEWER,
    "echo nonsense | D load": MORE,
    "D network create --subnet 1.2.3.4/99 bad": "a wrong flag: exit code 125",
    "D network create --driver nope bad": MORE,
    "D nonsense": NEWER,
    "D network nonsense": "one line instead of the help",
    "D ps --format '{{.Nope}}'": "without rows nothing is looked up",
    "D ps --format '{{.ID'": "in other words",
    "D stop --time x nope": "the flag as it was given",
}
"""Cases that differ, and why that is so."""

CODES = {
    "D exec one nope": 127,
    "D network create --subnet 1.2.3.4/99 bad": 125,
    "D ps --format '{{.Nope}}'": 0,
}
"""Those whose exit code differs; ours."""


class Pair:
    """Both programs, with the same image."""

    def __init__(self, docker: Dockerd, ours: Installation, folder: Path) -> None:
        self.docker, self.ours, self.folder = docker, ours, folder

    def both(self, line: str) -> tuple[parity.Answer, parity.Answer]:
        """docker's answer, and ours."""
        theirs = parity.ask(
            self.docker.command(), line,
            parity.plain_environment(DOCKER_CONFIG=str(self.docker.config)), self._place("docker"),
        )  # fmt: skip
        own = parity.ask(
            [str(NATIVE)], line, self.ours.environment(server=True), self._place("ours")
        )
        return theirs, own

    def _place(self, name: str) -> Path:
        place = self.folder / name
        place.mkdir(exist_ok=True)
        return place


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    if os.geteuid() != 0:
        pytest.skip("both want root here")
    if not has_busybox():
        pytest.skip("no static busybox here (apt-get install busybox-static)")
    folder = tmp_path_factory.mktemp("parity")
    archive = docker_archive(
        folder / "busybox.tar", build(Blobs(), [busybox_tar()]), ["busybox:latest"]
    )
    with (
        residue(str(folder)),
        dockerd(folder, network=True) as docker,
        installation(folder) as ours,
    ):
        docker("load", "-i", str(archive)).ok()
        ours.cli("load", "-i", str(archive)).ok()
        yield Pair(docker, ours, folder)


@pytest.mark.parametrize("scene", SCENES)
def test_the_same_lines(pair: Pair, scene: str) -> None:
    wrong = []
    for line in parity.lines_of(SCENES[scene]):
        theirs, own = pair.both(line)
        same_code = own.code == CODES.get(line, theirs.code)
        if not same_code or (theirs != own and line not in KNOWN):
            wrong.append(f"$ {line}\ndocker: {theirs}\nours:   {own}")
    assert not wrong, "\n".join(["", *wrong])


def test_what_is_known_to_differ_is_tried() -> None:
    tried = {line for scene in SCENES.values() for line in parity.lines_of(scene)}
    assert set(KNOWN) <= tried
    assert set(CODES) <= set(KNOWN)
    assert len(tried) >= 80
