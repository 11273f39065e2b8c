"""Docker's credentials: config.json, helpers, and what is refused; registries.json."""

import base64
import json
from pathlib import Path

import pytest

from bulkhead.errors import Invalid, Unavailable
from bulkhead.registry import config as configuration
from bulkhead.registry import credentials
from bulkhead.registry.credentials import Credentials


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    return tmp_path


def write(home: Path, **document: object) -> None:
    (home / "config.json").write_text(json.dumps(document))


def helper(home: Path, monkeypatch: pytest.MonkeyPatch, name: str, script: str) -> Path:
    """A docker-credential-NAME in PATH; what it is asked is noted beside it."""
    program = home / f"docker-credential-{name}"
    program.write_text(f'#!/bin/sh\necho "$1" >> {home}/asked\ncat > {home}/input\n{script}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{home}:/usr/bin:/bin")
    return home / "input"


def encoded(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def test_nothing_is_filed(home: Path) -> None:
    assert credentials.lookup("x.lan") is None
    write(home, auths={"other.lan": {"auth": encoded("a:b")}, "x.lan": {}})
    assert credentials.lookup("x.lan") is None


@pytest.mark.parametrize("key", ["x.lan:5000", "https://x.lan:5000", "http://x.lan:5000/v1/"])
def test_a_basic_entry_under_every_spelling(home: Path, key: str) -> None:
    write(home, auths={key: {"auth": encoded("user:pass:word")}})
    assert credentials.lookup("x.lan:5000") == Credentials("user", "pass:word")


def test_docker_hub_has_a_key_of_its_own(home: Path) -> None:
    write(home, auths={"https://index.docker.io/v1/": {"username": "u", "password": "p"}})
    assert credentials.lookup("docker.io") == Credentials("u", "p")


def test_tokens(home: Path) -> None:
    write(home, auths={"a.lan": {"identitytoken": "i"}, "b.lan": {"registrytoken": "r"}})
    assert credentials.lookup("a.lan") == Credentials(identity_token="i")
    assert credentials.lookup("b.lan") == Credentials(registry_token="r")


def test_a_helper_for_one_registry(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = helper(home, monkeypatch, "one", """echo '{"Username": "u", "Secret": "s"}'""")
    write(home, credHelpers={"x.lan": "one"})
    assert credentials.lookup("x.lan") == Credentials("u", "s")
    assert asked.read_text() == "x.lan"
    assert credentials.lookup("y.lan") is None


def test_a_helper_for_the_rest(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    helper(home, monkeypatch, "all", """echo '{"Username": "<token>", "Secret": "s"}'""")
    write(home, credsStore="all")
    assert credentials.lookup("docker.io") == Credentials(identity_token="s")


def test_a_helper_that_knows_nothing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    helper(home, monkeypatch, "all", "echo 'credentials not found in native keychain'; exit 1")
    write(home, credsStore="all", auths={"x.lan": {"auth": encoded("a:b")}})
    assert credentials.lookup("x.lan") == Credentials("a", "b")
    assert credentials.lookup("y.lan") is None


@pytest.mark.parametrize("script", ["echo locked; exit 2", "echo '[]'", "echo '{}'", "echo x"])
def test_a_helper_that_fails_is_named(
    home: Path, monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    helper(home, monkeypatch, "all", script)
    write(home, credsStore="all")
    with pytest.raises(Unavailable, match="docker-credential-all"):
        credentials.lookup("x.lan")


def test_a_helper_that_is_missing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(home, credsStore="nowhere")
    with pytest.raises(Unavailable, match="not in PATH"):
        credentials.lookup("x.lan")
    write(home, credsStore="../../bin/sh")
    with pytest.raises(Invalid, match="not a name"):
        credentials.lookup("x.lan")


@pytest.mark.parametrize("text", ["{", "[]", '{"auths": 5}', '{"auths": {"x.lan": {"auth": "%"}}}'])
def test_a_broken_file_is_named(home: Path, text: str) -> None:
    (home / "config.json").write_text(text)
    with pytest.raises(Invalid):
        credentials.lookup("x.lan")


def test_login_and_logout_keep_the_rest_of_the_file(home: Path) -> None:
    write(home, HttpHeaders={"a": "b"}, auths={"y.lan": {"auth": encoded("c:d")}})
    place = credentials.save("x.lan", Credentials("u", "p"))
    assert credentials.lookup("x.lan") == Credentials("u", "p")
    assert Path(place).stat().st_mode & 0o777 == 0o600
    assert credentials.erase("x.lan")
    assert not credentials.erase("x.lan")
    document = json.loads((home / "config.json").read_text())
    assert document == {"HttpHeaders": {"a": "b"}, "auths": {"y.lan": {"auth": encoded("c:d")}}}


def test_login_with_a_helper(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = helper(home, monkeypatch, "all", "exit 0")
    write(home, credsStore="all")
    assert credentials.save("docker.io", Credentials("u", "p")) == "docker-credential-all"
    assert json.loads(stored.read_text()) == {
        "ServerURL": "https://index.docker.io/v1/",
        "Username": "u",
        "Secret": "p",
    }


def test_secrets_are_not_shown() -> None:
    assert "hidden" not in repr(Credentials("u", "hidden", "hidden", "hidden"))


def test_the_shape_of_dockers_header() -> None:
    given = {"username": "u", "password": "p", "serveraddress": "x"}
    found = credentials.from_auth(given)
    assert found == Credentials("u", "p")
    assert credentials.to_auth(found) == {"username": "u", "password": "p"}
    assert credentials.from_auth(None) is None
    assert credentials.from_auth({}) == credentials.ANONYMOUS


def test_registries_json(tmp_path: Path) -> None:
    file = tmp_path / "registries.json"
    assert configuration.load(str(file)) == configuration.Registries()
    file.write_text('{"insecure": ["a:5000"], "mirrors": {"docker.io": ["https://m"]}}')
    loaded = configuration.load(str(file))
    assert [e.host for e in configuration.endpoints("docker.io", loaded)] == [
        "m",
        "registry-1.docker.io",
    ]
    for text in ("{", '{"unknown": 1}', '{"downloads": 0}', '{"insecure": "x"}'):
        file.write_text(text)
        with pytest.raises(Invalid, match=r"registries\.json"):
            configuration.load(str(file))
    for mirror in ("m", "ftp://m", "https://m/path", "http://m"):
        bad = configuration.Registries(mirrors={"docker.io": (mirror,)})
        with pytest.raises(Invalid, match="mirror"):
            configuration.endpoints("docker.io", bad)


def test_where_registries_json_is_looked_for() -> None:
    assert configuration.path({"BULKHEAD_REGISTRIES": "/x"}) == "/x"
    assert configuration.path({"XDG_CONFIG_HOME": "/nowhere"}) == "/etc/bulkhead/registries.json"
