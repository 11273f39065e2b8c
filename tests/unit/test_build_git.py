"""Git URLs of builds: which are, what they say, and what no process is given."""

import pytest

from bulkhead.build.git import Repository, is_git, parse, redacted
from bulkhead.errors import Invalid


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("https://h/a.git", True),
        ("https://h/a.git#main:sub", True),
        ("https://h/a.git?ref=main", True),
        ("http://h/a.git/info", False),
        ("https://h/a.tar.gz", False),
        ("git://h/a", True),
        ("ssh://git@h/a", True),
        ("git@h:a/b", True),
        ("me@h.example:a", True),
        ("github.com/a/b", True),
        ("a.git", False),
        ("./git@h", False),
        ("/a/b@c:d", False),
    ],
)
def test_which_are(text: str, wanted: bool) -> None:
    assert is_git(text) is wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("https://h/a.git", Repository("https://h/a.git")),
        ("https://h/a.git#v1", Repository("https://h/a.git", "v1")),
        ("https://h/a.git#v1:x/y", Repository("https://h/a.git", "v1", "x/y")),
        ("https://h/a.git#:x/./y/", Repository("https://h/a.git", "", "x/y")),
        ("https://h/a.git?branch=b&subdir=x", Repository("https://h/a.git", "b", "x")),
        ("https://h/a.git?tag=t", Repository("https://h/a.git", "t")),
        ("git@h:a/b.git#r", Repository("git@h:a/b.git", "r")),
        ("github.com/a/b#r", Repository("https://github.com/a/b", "r")),
    ],
)
def test_what_they_say(text: str, wanted: Repository) -> None:
    assert parse(text) == wanted


@pytest.mark.parametrize(
    "text",
    [
        "https://h/a.git#--upload-pack=touch",
        "https://h/a.git#main:../x",
        "https://h/a.git#main:x/../../y",
        "ssh://-oProxyCommand=x/a",
        "https://h/a b.git",
        "https://h/a.git#x\ny",
        "https://h/a.git?depth=1",
        "-x@h:a",
    ],
)
def test_what_no_process_is_given(text: str) -> None:
    with pytest.raises(Invalid):
        parse(text)


def test_passwords_are_not_shown() -> None:
    assert redacted("ADD https://me:s@t@h/a.git /x") == "ADD https://xxxxx:xxxxx@h/a.git /x"
    assert redacted("https://token@h/a.git") == "https://xxxxx@h/a.git"
    assert redacted("ssh://git@h/a https://i/@x") == "ssh://git@h/a https://i/@x"
    assert redacted("ssh://git:secret@h/a") == "ssh://git:xxxxx@h/a"
    assert redacted("https://h:80/a@b") == "https://h:80/a@b"
    assert parse("https://h/x/app.git#a").name == parse("git@h:x/app.git").name == "app"
