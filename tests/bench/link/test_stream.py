"""Bytes that are moved for a system that no service of ours serves."""

import socket
import threading
import time

import pytest

from kvstore_bench.link.links import UserSpaceLinks
from kvstore_bench.link.stream import ByteSource, ByteStream


def test_as_many_bytes_come_as_were_asked_for_again_and_again() -> None:
    with ByteSource("127.0.0.1") as source:
        stream = ByteStream(source.address)
        for size_bytes in (1, 3 << 20, 0, 17):
            stream.receive(size_bytes)
        with pytest.raises(BlockingIOError):  # and not one more
            stream._connected.recv(1, socket.MSG_DONTWAIT)
        stream.close()


def test_behind_a_link_they_take_their_time() -> None:
    with ByteSource("127.0.0.1") as source, UserSpaceLinks() as links:
        stream = ByteStream(links.routes([source.address])[source.address])
        links.set_bandwidth(20e6)
        began_s = time.monotonic()
        stream.receive(500_000)
        assert time.monotonic() - began_s >= (500_000 - (16 << 10)) * 8 / 20e6
        stream.close()


def test_nothing_stays_behind() -> None:
    before = set(threading.enumerate())
    with ByteSource("127.0.0.1") as source, UserSpaceLinks() as links:
        stream = ByteStream(links.routes([source.address])[source.address])
        stream.receive(10)
    with pytest.raises(ConnectionError):
        stream.receive(10)
    stream.close()
    assert set(threading.enumerate()) <= before
