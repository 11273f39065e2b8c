"""The link of a machine: frames taken apart, greetings, garbage."""

import contextlib
import socket
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bulkhead.engine import inside
from bulkhead.errors import Invalid
from bulkhead.machines import link, payload
from bulkhead.machines.link import Kind

NONCE = bytes(range(link.NONCE))
FRAMES = [
    link.Frame(Kind.OUTPUT, 1, b"hello"),
    link.Frame(Kind.ERROR, 2, b""),
    link.Frame(Kind.EXIT, 1, link.number(7)),
]
BYTES = b"".join(link.frame(one.kind, one.channel, one.payload) for one in FRAMES)


def split(splitter: link.Splitter, data: bytes, step: int) -> list[link.Frame]:
    found = []
    for at in range(0, len(data), step):
        found += splitter.feed(data[at : at + step])
    return found


@pytest.mark.parametrize("step", [1, 7, 1000])
def test_what_comes_before_the_greeting_is_not_believed(step: int) -> None:
    old = link.MARK + b"\1" * link.NONCE + link.frame(Kind.EXIT, 1, link.number(0))
    host = link.Splitter(NONCE)
    assert split(host, old + link.MARK + NONCE + BYTES, step) == FRAMES


@pytest.mark.parametrize("step", [1, 7, 1000])
def test_an_agent_begins_anew_with_every_greeting(step: int) -> None:
    agent = link.Splitter()
    assert split(agent, link.MARK + NONCE + BYTES, step) == FRAMES
    other = bytes(reversed(NONCE))
    cut = link.frame(Kind.INPUT, 1, b"x" * 100)[:50]
    assert split(agent, cut + link.MARK + other + BYTES, step)[-3:] == FRAMES
    assert agent.greeting == other


def test_impossible_frames_end_it() -> None:
    for bad in (b"\xff" * 9, link._HEADER.pack(link.MOST + 1, Kind.OUTPUT, 1), b"\0" * 9):
        with pytest.raises(Invalid):
            link.Splitter(NONCE).feed(link.MARK + NONCE + bad)
    with pytest.raises(Invalid):
        link.number_in(b"123")


def test_what_takes_no_window_is_not_kept() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        connection = inside.Link(ours, NONCE)
        channel = connection._channels[1] = inside._Channel()
        for _ in range(100):
            connection._take(link.Frame(Kind.OUTPUT, 1, b""))
        for _ in range(100):
            connection._take(link.Frame(Kind.EXIT, 1, link.number(7)))
        assert channel.out.qsize() == 1


@given(st.lists(st.binary(max_size=64), max_size=8))
def test_garbage_is_refused_or_waited_for(pieces: list[bytes]) -> None:
    host = link.Splitter(NONCE)
    with contextlib.suppress(Invalid):
        host.feed(link.MARK + NONCE)
        for piece in pieces:
            for frame in host.feed(piece):
                assert len(frame.payload) <= link.MOST


def test_a_machines_seed_is_a_script() -> None:
    done = subprocess.run(["sh", "-n"], input=payload.SEED, text=True, capture_output=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert payload.SEED.startswith("#!/bin/sh\n")
    assert "bulkhead.machines.agent" in payload.SEED
