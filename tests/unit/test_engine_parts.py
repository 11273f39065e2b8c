"""Pure parts of the engine: specification, users, restarts, health, events, tables."""

import asyncio
import contextlib

import msgspec
import pytest

from bulkhead.engine import archive, describe, lifecycle, restart, specgen, table, users
from bulkhead.engine.body import Config, Healthcheck, HostConfig, RestartPolicy, Ulimit
from bulkhead.engine.events import BACKLOG, Events, _event, matches
from bulkhead.engine.health import State
from bulkhead.engine.merge import host as complete
from bulkhead.engine.records import MountPoint, Record
from bulkhead.errors import Invalid
from bulkhead.oci import runtime as oci

PASSWD = """root:x:0:0:root:/root:/bin/sh
web:x:33:44:Web:/srv/web:/bin/false
broken:x:a:b::/:
# comment:x:1:1::/:
"""
GROUP = "root:x:0:\nweb:x:44:\nlogs:x:55:web,other\nextra:x:66:\n"
ACCOUNTS = users.Accounts(PASSWD, GROUP)


@pytest.mark.parametrize(
    ("user", "ids", "home"),
    [
        ("", (0, 0), "/root"),
        ("web", (33, 44), "/srv/web"),
        ("33", (33, 44), "/srv/web"),
        ("web:logs", (33, 55), "/srv/web"),
        ("1000", (1000, 0), "/"),
        ("1000:2000", (1000, 2000), "/"),
        ("0:extra", (0, 66), "/root"),
    ],
)
def test_users_are_resolved_in_the_image(user: str, ids: tuple[int, int], home: str) -> None:
    found = users.resolve(user, ACCOUNTS)
    assert (found.uid, found.gid) == ids
    assert found.home == home


def test_groups_of_a_user_are_added() -> None:
    assert users.resolve("web", ACCOUNTS).groups == (44, 55)
    assert users.resolve("web", ACCOUNTS, ["extra", "77"]).groups == (44, 55, 66, 77)
    assert users.resolve("web:web", ACCOUNTS).groups == (44,)


@pytest.mark.parametrize("user", ["nobody", "web:nogroup", "99999999999"])
def test_unknown_users_are_refused(user: str) -> None:
    with pytest.raises(Invalid):
        users.resolve(user, ACCOUNTS)


def test_accounts_are_found_in_the_topmost_layer(tmp_path: object) -> None:
    import os

    low, high = f"{tmp_path}/low", f"{tmp_path}/high"
    for layer in (low, high):
        os.makedirs(f"{layer}/etc")
    for place, text in ((f"{low}/etc/passwd", "low"), (f"{high}/etc/passwd", "high")):
        with open(place, "w") as file:
            file.write(text)
    with open(f"{low}/etc/group", "w") as file:
        file.write("low")
    found = users.read((high, low))
    assert found == users.Accounts("high", "low")
    os.unlink(f"{high}/etc/passwd")
    os.mkfifo(f"{high}/etc/passwd")
    assert users.read((high, low)).passwd == ""
    os.unlink(f"{high}/etc/passwd")
    os.symlink("/etc/shadow", f"{high}/etc/passwd")
    assert users.read((high,)).passwd == ""


# --- specification


def record(host: HostConfig | None = None, config: Config | None = None, **more: object) -> Record:
    host = host or HostConfig()
    complete(host, "container")
    return Record(
        id="a" * 64, name="x", created_ns=1, boundary="container", image="i", image_id="sha256:0",
        config=config or Config(), host=host, args=["true"], **more,  # type: ignore[arg-type]
    )  # fmt: skip


def facts(**more: object) -> specgen.Facts:
    base: dict[str, object] = {
        "identity": users.Identity(0, 0, (0,), "/root", "root"),
        "cgroup": "/bulkhead/x",
        "netns": "/proc/1/ns/net",
        "hostname": "box",
    }
    return specgen.Facts(**{**base, **more})  # type: ignore[arg-type]


def test_a_plain_workload_has_dockers_mounts_and_namespaces() -> None:
    spec = specgen.generate(record(), facts(files={"/etc/hosts": "/run/hosts"}))
    assert [m.destination for m in spec.mounts] == [
        "/proc", "/dev", "/sys", "/dev/pts", "/dev/mqueue", "/dev/shm", "/etc/hosts",
        "/sys/fs/cgroup",
    ]  # fmt: skip
    kinds = {n.type_ for n in spec.linux.namespaces}
    assert kinds == {"mount", "network", "pid", "ipc", "uts", "cgroup"}
    oci.validate(spec)
    assert spec.linux.seccomp is not None
    assert oci.decode(oci.encode(spec)) == spec


def test_the_environment_has_what_docker_adds() -> None:
    config = Config(env=["A=1", "PATH=/own", "GONE", "A=2"], tty=True)
    found = specgen.environment(config, users.Identity(1, 1, (1,), "/home/u", "u"), "box")
    assert found == ["PATH=/own", "HOSTNAME=box", "TERM=xterm", "A=2", "HOME=/home/u"]


def test_private_variables_are_in_no_record() -> None:
    workload = record(config=Config(env=["A=1", "B=2"]))
    spec = specgen.generate(workload, facts(private=["B=secret", "C=secret"]))
    assert spec.process is not None
    assert {"A=1", "B=secret", "C=secret"} <= set(spec.process.env)
    assert b"secret" not in msgspec.json.encode(workload)


def test_host_namespaces_are_not_listed() -> None:
    host = HostConfig(pid_mode="host", uts_mode="host", ipc_mode="host", cgroupns_mode="host")
    spec = specgen.generate(record(host), facts(netns=None))
    assert {n.type_ for n in spec.linux.namespaces} == {"mount"}
    sources = {m.destination: m.source for m in spec.mounts}
    assert sources["/sys"] == "/sys"
    assert sources["/dev/shm"] == "/dev/shm"


def test_limits_are_translated() -> None:
    host = HostConfig(
        memory=64 << 20, nano_cpus=500_000_000, pids_limit=50, cpu_shares=512,
        ulimits=[Ulimit(name="nofile", soft=10, hard=-1)],
    )  # fmt: skip
    spec = specgen.generate(record(host), facts())
    limits = spec.linux.resources
    assert limits is not None
    assert limits.memory is not None
    assert (limits.memory.limit, limits.memory.swap) == (64 << 20, 128 << 20)
    assert limits.cpu is not None
    assert (limits.cpu.quota, limits.cpu.period, limits.cpu.shares) == (50_000, 100_000, 512)
    assert limits.pids == oci.Pids(limit=50)
    assert spec.process is not None
    assert spec.process.rlimits == [oci.Rlimit(type_="RLIMIT_NOFILE", soft=10, hard=2**64 - 1)]


def test_mounts_of_the_user_replace_ours_and_keep_their_order() -> None:
    mounts = [
        MountPoint(type_="bind", destination="/dev/shm", source="/s", rw=False),
        MountPoint(type_="tmpfs", destination="/run", options=["size=1m"]),
    ]
    spec = specgen.generate(record(mounts=mounts), facts(sources=["/s", ""]))
    by_place = {m.destination: m for m in spec.mounts}
    assert by_place["/dev/shm"].source == "/s"
    assert "rro" in by_place["/dev/shm"].options
    assert by_place["/run"].type_ == "tmpfs"
    places = [m.destination for m in spec.mounts]
    assert places.index("/dev") < places.index("/dev/shm")


def test_privileged_has_neither_filter_nor_masks() -> None:
    spec = specgen.generate(record(HostConfig(privileged=True)), facts())
    assert spec.linux.seccomp is None
    assert spec.linux.masked_paths == []
    assert "ro" not in {o for m in spec.mounts if m.destination == "/sys" for o in m.options}


def test_id_mappings() -> None:
    assert specgen.id_mappings("host") == []
    assert specgen.id_mappings("100000:65536") == [
        oci.IDMapping(container_id=0, host_id=100000, size=65536)
    ]


# --- decisions


@pytest.mark.parametrize(
    ("name", "limit", "code", "restarts", "by_hand", "again"),
    [
        ("no", 0, 1, 0, False, False),
        ("always", 0, 0, 9, False, True),
        ("always", 0, 0, 0, True, False),
        ("unless-stopped", 0, 1, 0, False, True),
        ("on-failure", 0, 0, 0, False, False),
        ("on-failure", 0, 1, 99, False, True),
        ("on-failure", 3, 1, 2, False, True),
        ("on-failure", 3, 1, 3, False, False),
    ],
)
def test_restart_policies(
    name: str, limit: int, code: int, restarts: int, by_hand: bool, again: bool
) -> None:
    policy = RestartPolicy(name=name, maximum_retry_count=limit)
    assert restart.wanted(policy, exit_code=code, restarts=restarts, by_hand=by_hand) is again


@pytest.mark.parametrize(
    ("name", "by_hand", "was_up", "again"),
    [
        ("always", True, False, True),
        ("unless-stopped", True, False, False),
        ("unless-stopped", False, True, True),
        ("on-failure", False, True, True),
        ("on-failure", False, False, False),
        ("no", False, True, False),
    ],
)
def test_restart_policies_after_a_boot(name: str, by_hand: bool, was_up: bool, again: bool) -> None:
    found = restart.wanted_at_boot(
        RestartPolicy(name=name), exit_code=255, restarts=0, by_hand=by_hand, was_up=was_up
    )
    assert found is again


def test_the_delay_doubles_up_to_a_minute_and_begins_anew() -> None:
    delays, delay = [], 0.0
    for _ in range(12):
        delay = restart.next_delay_s(delay, ran_s=0.5)
        delays.append(delay)
    assert delays[:4] == [0.1, 0.2, 0.4, 0.8]
    assert delays[-1] == 60.0
    assert restart.next_delay_s(60.0, ran_s=11.0) == 0.1


def test_exit_codes() -> None:
    assert lifecycle.exit_code(7 << 8) == 7
    assert lifecycle.exit_code(9) == 137
    assert lifecycle.exit_code(None) == 255


SECOND = 10**9


def test_health_becomes_unhealthy_after_its_retries_and_healthy_at_once() -> None:
    state = State(Healthcheck(test=["CMD", "x"], retries=2), started_ns=0)
    assert state.status == "starting"
    assert state.add(1, "no", 0, SECOND) is False
    assert state.add(1, "no", 0, 2 * SECOND) is True
    assert (state.status, state.streak) == ("unhealthy", 2)
    assert state.add(0, "yes", 0, 3 * SECOND) is True
    assert (state.status, state.streak) == ("healthy", 0)
    for _ in range(9):
        state.add(0, "y" * 9000, 0, SECOND)
    described = state.describe()
    assert len(described["Log"]) == 5
    assert len(described["Log"][0]["Output"]) == 4096


def test_failures_in_the_start_period_do_not_count() -> None:
    check = Healthcheck(test=["CMD", "x"], retries=1, start_period=10 * SECOND)
    state = State(check, started_ns=0)
    assert state.add(1, "", 0, 5 * SECOND) is False
    assert state.status == "starting"
    assert state.add(1, "", 0, 11 * SECOND) is True
    assert state.status == "unhealthy"


# --- events


def test_events_are_filtered_like_dockers() -> None:
    events = Events()
    events.emit("container", "exec_start: sh", "abc123", {"name": "web", "image": "i:1", "l": "v"})
    event = _event(*events._kept)
    for filters, passes in (
        ({"type": ["container"]}, True),
        ({"type": ["image"]}, False),
        ({"event": ["exec_start"]}, True),
        ({"container": ["web"]}, True),
        ({"container": ["abc"]}, True),
        ({"container": ["xyz"]}, False),
        ({"image": ["i"]}, True),
        ({"image": ["j"]}, False),
        ({"label": ["l=v"]}, True),
        ({"label": ["l=w"]}, False),
        ({"type": ["container"], "event": ["die"]}, False),
    ):
        assert matches(event, filters) is passes, filters


def test_a_listener_sees_kept_events_then_new_ones() -> None:
    async def scenario() -> list[str]:
        events = Events()
        events.emit("container", "create", "1")
        seen: list[str] = []

        async def listen() -> None:
            async with contextlib.aclosing(events.stream(0, None, {})) as stream:
                async for event in stream:
                    seen.append(event["Action"])
                    if event["Action"] == "stop":
                        return

        task = asyncio.create_task(listen())
        while not events.listeners:
            await asyncio.sleep(0)
        events.emit("container", "start", "1")
        events.emit("container", "stop", "1")
        await task
        assert events.listeners == 0
        return seen

    assert asyncio.run(scenario()) == ["create", "start", "stop"]


def test_a_listener_that_does_not_listen_is_cut_off() -> None:
    async def scenario() -> int:
        events = Events()
        stream = events.stream(None, None, {})
        first = asyncio.ensure_future(anext(stream))
        while not events.listeners:
            await asyncio.sleep(0)
        for number in range(BACKLOG + 10):
            events.emit("container", "x", str(number))
        await first
        count = 1
        async for _ in stream:
            count += 1
        return count

    assert asyncio.run(scenario()) <= BACKLOG + 1


# --- for people


def test_spans_of_time_have_dockers_words() -> None:
    for seconds, words in (
        (0, "Less than a second"), (1, "1 second"), (59, "59 seconds"), (70, "About a minute"),
        (600, "10 minutes"), (3600, "About an hour"), (7300, "2 hours"), (86400 * 3, "3 days"),
        (86400 * 20, "2 weeks"), (86400 * 70, "2 months"), (86400 * 800, "2 years"),
    ):  # fmt: skip
        assert describe.human(seconds) == words


def test_columns_of_top() -> None:
    assert table.columns("")[0] == "uid"
    assert table.columns("-o pid,comm") == ["pid", "comm"]
    assert table.columns("aux")[0] == "user"
    for wrong in ("-o", "-o nope", "--frobnicate"):
        with pytest.raises(Invalid):
            table.columns(wrong)


def test_modes_are_gos() -> None:
    assert archive.go_mode(0o040755) == 1 << 31 | 0o755
    assert archive.go_mode(0o104755) == 1 << 23 | 0o755
    assert archive.go_mode(0o120777) == 1 << 27 | 0o777


def test_records_survive_json() -> None:
    made = record(mounts=[MountPoint(type_="volume", destination="/x", name="v")])
    assert msgspec.json.decode(msgspec.json.encode(made), type=Record) == made
