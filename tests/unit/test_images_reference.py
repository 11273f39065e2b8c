"""References, as Docker normalises them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bulkhead.errors import Invalid
from bulkhead.oci.reference import Reference, could_be_id, parse

DIGEST = "sha256:" + "a" * 64


@pytest.mark.parametrize(
    ("text", "canonical", "familiar"),
    [
        ("debian", "docker.io/library/debian:latest", "debian:latest"),
        ("debian:12", "docker.io/library/debian:12", "debian:12"),
        ("docker.io/debian", "docker.io/library/debian:latest", "debian:latest"),
        ("index.docker.io/library/debian", "docker.io/library/debian:latest", "debian:latest"),
        ("a/b", "docker.io/a/b:latest", "a/b:latest"),
        ("localhost/x", "localhost/x:latest", "localhost/x:latest"),
        ("localhost:5000/x/y:1", "localhost:5000/x/y:1", "localhost:5000/x/y:1"),
        ("registry.lan/x", "registry.lan/x:latest", "registry.lan/x:latest"),
        ("Upper/x", "Upper/x:latest", "Upper/x:latest"),
        ("127.0.0.1:5000/x", "127.0.0.1:5000/x:latest", "127.0.0.1:5000/x:latest"),
        ("[::1]:5000/x", "[::1]:5000/x:latest", "[::1]:5000/x:latest"),
        (f"debian@{DIGEST}", f"docker.io/library/debian@{DIGEST}", f"debian@{DIGEST}"),
        (f"d:1@{DIGEST}", f"docker.io/library/d:1@{DIGEST}", f"d:1@{DIGEST}"),
        ("a__b/c-d.e", "docker.io/a__b/c-d.e:latest", "a__b/c-d.e:latest"),
        ("library/x", "docker.io/library/x:latest", "x:latest"),
    ],
)
def test_a_reference_is_normalised(text: str, canonical: str, familiar: str) -> None:
    reference = parse(text).tagged()
    assert (str(reference), reference.familiar) == (canonical, familiar)
    assert parse(canonical) == reference
    assert parse(familiar) == reference


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "invalid reference format"),
        ("Debian", "must be lowercase"),
        ("a//b", "invalid reference format"),
        ("/a", "invalid reference format"),
        ("a:", "invalid reference format"),
        ("a:.x", "invalid reference format"),
        ("a:" + "x" * 129, "invalid reference format"),
        ("a@", "invalid reference format"),
        ("a@sha256:12", "is not a digest"),
        ("a@sha512:" + "a" * 128, "not sha256"),
        ("a b", "invalid reference format"),
        ("-a", "invalid reference format"),
        ("x.y:port/a", "invalid reference format"),
        ("../../etc", "invalid reference format"),
        ("a" * 64, "cannot specify 64-byte hexadecimal strings"),
        ("a/" + "b" * 300, "longer than 255"),
        ("x" * 2000, "more than 1024"),
        ("a\n", "invalid reference format"),
    ],
)
def test_nonsense_is_refused_in_words(text: str, words: str) -> None:
    with pytest.raises(Invalid, match=words):
        parse(text)


@given(st.text(max_size=80))
def test_any_text_parses_or_is_invalid(text: str) -> None:
    try:
        reference = parse(text)
    except Invalid:
        return
    assert parse(str(reference)) == reference
    assert parse(reference.familiar) == reference


_component = st.from_regex(r"[a-z0-9]{1,8}((\.|_|__|-{1,3})[a-z0-9]{1,4}){0,2}", fullmatch=True)


@given(
    st.sampled_from(["docker.io", "localhost", "r.example:5000", "10.0.0.1"]),
    st.lists(_component, min_size=1, max_size=3),
    st.none() | st.from_regex(r"[\w][\w.-]{0,20}", fullmatch=True).filter(str.isascii),
    st.sampled_from([None, DIGEST]),
)
def test_what_is_written_is_read_back(
    domain: str, path: list[str], tag: str | None, digest: str | None
) -> None:
    joined = "/".join(path)
    if domain == "docker.io" and len(path) == 1:
        joined = "library/" + joined
    reference = Reference(domain, joined, tag, digest)
    assert parse(str(reference)) == reference


def test_an_id_is_told_from_a_name() -> None:
    assert could_be_id("abc123")
    assert could_be_id("sha256:" + "f" * 64)
    assert not could_be_id("xyz")
    assert not could_be_id("abc:1")
