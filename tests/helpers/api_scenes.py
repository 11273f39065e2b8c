"""Command lines of docker's own client, for dockerd and for us behind the same socket protocol.

Every line is one case; `D` is the client. Lines of a scene build on each other. What is random is
made equal before comparing; what names the program below the daemon (a shim, runc) is left out.
"""

import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

TIMEOUT_S = 300.0

RULES = [
    (r"\r", ""),
    (r"(?m)^time=.*[Ee]rror waiting for container.*\n?", ""),
    (r"sha256:[0-9a-f]{64}", "<digest>"),
    (r"\b[0-9a-f]{64}\b", "<id>"),
    (r"\b[0-9a-f]{12}\b", "<short>"),
    (r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(\.\d+)?( [+-]\d{4} [A-Z]+|Z|[+-]\d\d:\d\d)?", "<time>"),
    (r"(Less than a second|About an? \w+|\d+ (second|minute|hour|day|week|month|year)s?)( ago)?",
     "<span>"),
    (r"\b\d+(\.\d+)?(e[+-]\d+)?(B|kB|MB|GB|KiB|MiB|GiB)\b", "<size>"),
    (r"\b(10|172|192)\.\d+\.\d+\.\d+(/\d+)?", "<address>"),
    (r"\b\d+\.\d+%", "<percent>"),
    (r"(failed to create shim task: )?OCI runtime (create|exec) failed: ", ""),
    (r"(runc create|exec) failed: unable to start container process: ", ""),
    (r"(?m): unknown\.?$", ""),
    (r"(?m)\.$", ""),
    (r" {2,}", "  "),
    (r"(?m) +$", ""),
]  # fmt: skip

LONG = "sh -c 'echo begun; echo odd >&2; sleep 1000'"
DOCKERFILE = 'FROM busybox\\nRUN echo hello > /x\\nENV A=b\\nCMD ["cat", "/x"]\\n'
SCENES = {
    "run": """
        D run --rm busybox true
        D run --rm busybox sh -c 'echo out; echo err >&2; exit 7'
        D run --rm busybox nope
        D run --rm busybox /etc
        D run --rm busybox sh -c 'kill -9 $$'
        echo in | D run --rm -i busybox cat
        D run --rm -e A=1 busybox sh -c 'echo $A'
        D run --rm -w /new/dir -u 5:6 busybox sh -c 'pwd; id'
        D run --rm -u nope busybox id
        D run --rm --hostname box --entrypoint echo busybox a b
        D run --rm --read-only --tmpfs /t busybox sh -c 'touch /t/x; echo $?; touch /x'
        D run --rm --network none busybox ls /sys/class/net
        D run --rm --cap-drop nope busybox true
        D run --rm --cap-add sys_time --cap-drop net_raw busybox grep Cap /proc/self/status
        D run --rm --ulimit nofile=100:200 busybox sh -c 'ulimit -n'
        D run --rm --sysctl net.core.somaxconn=77 busybox cat /proc/sys/net/core/somaxconn
        D run --rm --add-host one:1.2.3.4 busybox grep one /etc/hosts
        D run --rm -m 1k busybox true
        D run --rm --cpus 900 busybox true
        D run --rm --name 'a b' busybox true
        D run --rm -v /nope:/x:zz busybox true
        D run --rm --mount type=bind,src=/nope/no,dst=/x busybox true
        D run --rm --network nope busybox true
        D run --rm --runtime nope busybox true
        D run --rm --pull never nope:1 true
        D rm -f $(D run -d busybox true) | wc -l
        D run --rm --log-driver none busybox echo unlogged
        D run -d --name tty -t busybox sh -c 'tty; echo seen'
        D wait tty
        D logs tty
        D rm tty
    """,
    "life": """
        D create --name one --label a=b -p 127.0.0.1::80 busybox LONG
        D ps -a
        D start one
        D start one
        D ps --format '{{.Names}} {{.Image}} {{.Command}} {{.Labels}} {{.State}}'
        D ps -a --no-trunc --filter label=a --format '{{.ID}} {{.Status}}'
        D ps --filter name=on --filter status=running -q
        D ps --filter nope=1
        D port one | sed 's/:[0-9]*$//'
        D port one 81
        D logs one
        D logs --tail 2 one
        D logs -t one
        D logs --since 1h --until 2100-01-01T00:00:00 one
        D exec one echo in
        D exec one sh -c 'exit 4'
        D exec one nope
        D exec -u 5 -w /tmp -e X=y one sh -c 'id -u; pwd; echo $X'
        echo in | D exec -i one cat
        D exec -d one touch /tmp/made
        D exec nope true
        D pause one
        D exec one true
        D pause one
        D ps --format '{{.Status}}'
        D attach one
        D unpause one
        D unpause one
        D rename one two
        D rename two two
        D inspect -f '{{.Name}} {{.State.Status}} {{json .Config.Cmd}} {{.RestartCount}}' two
        D inspect -f '{{.HostConfig.RestartPolicy.Name}} {{.Platform}}' two
        D inspect -f '{{json .Config.ExposedPorts}} {{json .HostConfig.Binds}} {{json .Mounts}}' two
        D inspect nope
        D rm two
        D kill -s NOPE two
        D update -m 64m --memory-swap 64m --restart on-failure:3 two
        D inspect -f '{{.HostConfig.Memory}} {{json .HostConfig.RestartPolicy}}' two
        D top two -o pid,args | tail -1 | sed 's/[0-9]*//'
        D stats --no-stream --format '{{.Name}}' two
        D restart -t 0 two
        D stop -t 0 two
        D stop two
        D kill two
        D exec two true
        D wait two
        D inspect -f '{{.State.Status}} {{.State.ExitCode}} {{.State.OOMKilled}}' two
        D start -a nope
        D rm two
        D rm two
        D rm -f two
        D stop nope
        D wait nope
        D logs nope
        D cp nope:/x .
        D diff nope
        D stats --no-stream nope
        D attach nope
        D container prune -f
    """,
    "files": """
        D run --name box -d busybox sleep 1000
        echo text > file; D cp file box:/tmp/copy
        D exec box cat /tmp/copy
        D cp box:/tmp/copy back; cat back
        D cp box:/nope x
        D cp file box:/no/such/
        D cp box:/tmp/copy - | tar t
        D exec box rm /bin/yes; D diff box | sort
        D export box | tar t | grep -E '^(bin/sh|tmp/copy|bin/yes)$'
        D commit -m said -a me -c 'ENV A=b' box made:1
        D history --format '{{.Comment}} {{.CreatedBy}}' made:1 | head -2
        D image inspect -f '{{.Author}} {{json .Config.Env}} {{.Os}}' made:1
        D images --format '{{.Repository}}:{{.Tag}}' | sort
        D images --filter reference='ma*' --format '{{.Repository}}'
        D run --rm --pull never made:1 cat /tmp/copy
        D tag made:1 made:2
        D rmi made:2
        D tag busybox:latest UPPER:x
        D save made:1 -o made.tar; tar tf made.tar | grep -c manifest.json
        D rmi made:1
        D load -i made.tar
        D load -q -i made.tar
        D export box | D import -c 'CMD ["true"]' -m imported - flat:1
        D image inspect -f '{{json .Config.Cmd}} {{.Comment}} {{len .RootFS.Layers}}' flat:1
        D rmi busybox
        D rm -f box
        D rmi made:1 flat:1 | grep -c .
        D rmi nope
        D tag nope x
        D image inspect nope
        D history nope
        D save nope -o x.tar
        echo nonsense | D load
        D image prune -f
    """,
    "network": """
        D network create --label x=y net
        D network create net
        D network ls --format '{{.Name}} {{.Driver}} {{.Scope}}' | sort
        D network ls --filter label=x --format '{{.Name}}'
        D network inspect -f '{{.Driver}} {{.Internal}} {{len .Containers}} {{json .Labels}}' net
        D run -d --name web --network net --network-alias www -p 127.0.0.1::80 busybox sleep 1000
        D network inspect -f '{{range .Containers}}{{.Name}}{{end}}' net
        D inspect -f '{{range $k, $v := .NetworkSettings.Networks}}{{$k}} {{$v.Gateway}}{{end}}' web
        D run --rm --network net busybox sh -c 'ping -c1 -W5 www >/dev/null; echo $?'
        D run --rm --network container:web busybox hostname -i
        D run --rm --network host -p 80:80 busybox true
        D network rm net
        D network disconnect net web
        D network disconnect net web
        D network connect --alias again net web
        D network connect net web
        D network connect nope web
        D rm -f web
        D network rm net
        D network rm net
        D network rm bridge
        D network create --driver nope bad
        D network create --subnet 10.77.0.0/24 --gateway 10.77.0.9 --internal sub
        D network inspect -f '{{json .IPAM.Config}} {{.Internal}}' sub
        D network inspect nope
        D network prune -f
    """,
    "volumes": """
        D volume create --label l=1 vol
        D volume create vol
        D volume ls
        D volume ls -q --filter label=l
        D volume inspect -f '{{.Name}} {{.Driver}} {{.Scope}} {{json .Labels}}' vol
        D run --rm -v vol:/v busybox sh -c 'echo kept > /v/f'
        D run --rm -v vol:/v:ro busybox sh -c 'cat /v/f; touch /v/x'
        D run --name user -v vol:/v busybox true
        D inspect -f '{{range .Mounts}}{{.Type}} {{.Name}} {{.Destination}} {{.RW}}{{end}}' user
        D volume rm vol
        D rm user
        D volume rm vol
        D volume rm vol
        D volume inspect nope
        D volume create 'a b'
        D volume create --driver nope other
        D volume prune -f
    """,
    "words": """
        D version --format '{{.Server.Os}} {{.Client.APIVersion}}'
        D info --format '{{.OSType}} {{.Swarm.LocalNodeState}} {{.NCPU}} {{.CgroupDriver}}'
        D info --format '{{.Containers}} {{.Images}} {{.Architecture}}'
        D system df --format '{{.Type}} {{.TotalCount}} {{.Active}}'
        D system df -v | head -3
        sleep 1.1; D events --since 1h --until 0s -f event=destroy | grep -c vol
        D plugin ls
        D plugin inspect nope
        D node ls
        D service ls
        D stack ls
        D secret ls
        D config ls
        D swarm leave
        D container ls -q
        D image ls -q nope
        D images -a --no-trunc --format '{{.ID}} {{.Tag}}' busybox
        D builder prune -f
        D system prune -f
    """,
    "build": """
        mkdir ctx; printf 'DOCKERFILE' > ctx/Dockerfile; D build -q -t built:1 ctx
        D run --rm built:1
        D history --format '{{.CreatedBy}}' built:1 | head -3
        printf 'FROM busybox\\nRUN exit 3\\n' | D build - 2>&1 | tail -1
        D rmi -f built:1 | grep -c Untagged
    """,
}  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """What one command said, made comparable."""

    code: int
    out: str
    err: str

    def __str__(self) -> str:
        lines = [f"exit code {self.code}"]
        lines += [f"  out| {line}" for line in self.out.splitlines()]
        return "\n".join(lines + [f"  err| {line}" for line in self.err.splitlines()])


def comparable(text: str) -> str:
    """`text` without what is different at every call."""
    for pattern, by in RULES:
        text = re.sub(pattern, by, text)
    # Newer daemons begin their messages in lower case.
    text = re.sub(r": [A-Z](?=[a-z])", lambda match: match[0].lower(), text)
    return text.rstrip("\n")


def ask(program: Sequence[str], line: str, environment: Mapping[str, str], folder: Path) -> Answer:
    """Run one line with `program` as `D`, in `folder`."""
    words = " ".join(f"'{word}'" for word in program)
    done = subprocess.run(
        ["sh", "-c", f'D() {{ {words} "$@"; }}\n{line}'], env={**environment, "TZ": "UTC"},
        cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, timeout=TIMEOUT_S,
    )  # fmt: skip
    out, err = (
        data.decode(errors="replace").replace(f"{folder}/", "")
        for data in (done.stdout, done.stderr)
    )
    return Answer(done.returncode, comparable(out), comparable(err))


def lines_of(scene: str) -> list[str]:
    """The cases of a scene."""
    scene = scene.replace("LONG", LONG).replace("DOCKERFILE", DOCKERFILE)
    return [line.strip() for line in scene.strip().splitlines() if line.strip()]
