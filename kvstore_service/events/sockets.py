"""The ZeroMQ sockets of a publisher."""

import os
import socket
from contextlib import suppress
from typing import Any

import zmq

from kvstore_codec.errors import AddressInUseError
from kvstore_service.events.keys import SubscriberKeys
from kvstore_service.listen import Address

MAX_WAITING = 10_000
"""Batches that wait for one subscriber. A slower one misses batches, and asks for them."""
MAX_REQUEST_BYTES = 4096
HANDSHAKE_S = 10.0
"""Time limit for a connection to say what it is, and with credentials, whose it is."""
_OK, _REFUSED = b"200", b"400"


class EventSockets:
    """The publishing socket at `address`, and the one that answers requests for missed batches at the next port. With
    `keys` both are encrypted (CURVE), and connect only subscribers whose keys are known. Used by one thread, except for
    `wake`. Raises AddressInUseError."""

    def __init__(self, address: Address, keys: SubscriberKeys | None) -> None:
        self._keys = keys
        self._context = zmq.Context()
        self._waking = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.public_key, self._secret_key = zmq.curve_keypair() if keys is not None else (b"", b"")
        self._bound = address
        self._poller = zmq.Poller()
        self._poller.register(self._waking, zmq.POLLIN)
        self._zap: Any = None
        if keys is not None:
            self._zap = self._context.socket(zmq.REP)
            self._zap.bind("inproc://zeromq.zap.01")
            self._poller.register(self._zap, zmq.POLLIN)
        self._open: list[Any] = []
        self.publishing: Any = None
        self.replaying: Any = None
        try:
            self.open()
        except AddressInUseError:
            self.close()
            raise

    @property
    def addresses(self) -> tuple[Address, Address]:
        """Where the two sockets listen."""
        return self._bound, Address(self._bound.host, self._bound.port + 1)

    def open(self) -> None:
        """Binds the sockets, unless they are. Raises AddressInUseError."""
        if self._open:
            return
        first, second = self.addresses
        publishing, replaying = self._context.socket(zmq.XPUB), self._context.socket(zmq.ROUTER)
        publishing.setsockopt(zmq.XPUB_MANUAL, 1)  # the publisher decides about each subscription
        replaying.setsockopt(zmq.ROUTER_MANDATORY, 1)  # otherwise answers to slow subscribers would be lost
        for made, where in ((publishing, first), (replaying, second)):
            made.setsockopt(zmq.SNDHWM, MAX_WAITING)
            made.setsockopt(zmq.LINGER, 0)
            made.setsockopt(zmq.HANDSHAKE_IVL, round(1000 * HANDSHAKE_S))
            made.setsockopt(zmq.MAXMSGSIZE, MAX_REQUEST_BYTES)
            made.setsockopt(zmq.IPV6, int(":" in where.host))
            made.setsockopt(zmq.TCP_KEEPALIVE, 1)
            made.setsockopt(zmq.HEARTBEAT_IVL, 5_000)  # detects subscribers whose machine is gone
            made.setsockopt(zmq.HEARTBEAT_TIMEOUT, 15_000)
            if self._keys is not None:
                made.setsockopt(zmq.CURVE_SERVER, 1)
                made.setsockopt(zmq.CURVE_SECRETKEY, self._secret_key)
                made.setsockopt(zmq.CURVE_PUBLICKEY, self.public_key)
                made.setsockopt(zmq.ZAP_DOMAIN, b"kvstore")
            try:
                made.bind(f"tcp://{Address(_numeric(where.host), where.port)}")
            except zmq.ZMQError as error:
                for each in (publishing, replaying):
                    each.close()
                raise AddressInUseError(
                    f"cannot publish KV events on {where}: {error.strerror}; choose another --events"
                ) from error
        self.publishing, self.replaying, self._open = publishing, replaying, [publishing, replaying]
        for made in self._open:
            self._poller.register(made, zmq.POLLIN)

    def disconnect(self) -> None:
        """Disconnects all subscribers. They connect again once `open` was called, which may fail for a moment."""
        for made in self._open:
            self._poller.unregister(made)
            made.close()
        self._open = []

    def wake(self) -> None:
        """Ends a `wait`. May be called by any thread."""
        with suppress(BlockingIOError, OSError):
            os.eventfd_write(self._waking, 1)

    def wait(self, timeout_s: float) -> set[Any]:
        """Waits for requests, for at most `timeout_s`. Returns the sockets that have some. Answers which subscribers
        may connect."""
        ready = {of for of, _ in self._poller.poll(round(1000 * timeout_s))}
        if self._waking in ready:
            with suppress(BlockingIOError):
                os.eventfd_read(self._waking)
        if self._zap is not None and self._zap in ready:
            self._admit()
        return ready

    def close(self) -> None:
        self.disconnect()
        if self._zap is not None:
            self._zap.close(0)
        self._context.destroy(0)
        os.close(self._waking)

    def _admit(self) -> None:
        """Answers one request of the ZeroMQ authentication protocol (https://rfc.zeromq.org/spec/27)."""
        frames = self._zap.recv_multipart()
        readable = None
        if len(frames) == 7 and frames[5] == b"CURVE" and self._keys is not None:
            readable = self._keys.readable(frames[6])
        status, text = (_REFUSED, b"unknown key") if readable is None else (_OK, b"OK")
        self._zap.send_multipart([b"1.0", frames[1], status, text, (readable or "").encode(), b""])


def user_of(frame: Any) -> str:
    """What `SubscriberKeys.readable` said of the sender of a received frame."""
    try:
        return str(frame.get("User-Id"))
    except zmq.ZMQError:
        return ""


def _numeric(host: str) -> str:
    """ZeroMQ binds only to addresses and names of interfaces."""
    try:
        return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    except (OSError, UnicodeError):
        return host
