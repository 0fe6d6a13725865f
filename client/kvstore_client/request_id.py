"""The id of the request that a thread works for. It stands in log lines and in the metadata of gRPC calls, so that the
lines of an engine, a client and the nodes about one request can be found together."""

import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from typing import ParamSpec, TypeVar

METADATA_KEY = "x-request-id"
LONGEST_ID = 128
"""An id of more characters is cut."""
_NOT_PLAIN = re.compile(r"[^A-Za-z0-9._:/-]")

_CURRENT: ContextVar[str] = ContextVar("kvstore_request_id", default="")

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def current_request_id() -> str:
    """The id of the request that this thread works for. Empty: for none."""
    return _CURRENT.get()


@contextmanager
def request_scope(request_id: str = "") -> Iterator[str]:
    """Inside the block this thread works for a request, whose id is yielded. An engine gives its own id. Without one
    the id of a surrounding block stays, or a new one is made."""
    name = plain_id(request_id) or _CURRENT.get() or secrets.token_hex(8)
    token = _CURRENT.set(name)
    try:
        yield name
    finally:
        _CURRENT.reset(token)


def in_request(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """The function, which works for the present request wherever it is called. For threads and queues; the calls may
    not overlap."""
    context = copy_context()

    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        return context.run(function, *args, **kwargs)

    return call


def plain_id(text: str) -> str:
    """The id as it may stand in metadata and logs: other characters than letters, digits and `._:/-` become `_`."""
    return _NOT_PLAIN.sub("_", text[:LONGEST_ID])
