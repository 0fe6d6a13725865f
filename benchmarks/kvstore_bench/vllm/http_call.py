"""Requests to HTTP servers on this machine."""

import http.client
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any

_ERROR_BYTES = 500
"""How much of an error's text is shown."""


class RequestError(Exception):
    """A request failed, or nothing arrived in time. The message says what."""


@contextmanager
def answering(
    port: int, method: str, path: str, body: Mapping[str, Any] | None, silence_s: float
) -> Iterator[http.client.HTTPResponse]:
    """The response of a server, to be read inside the context. Each request has a connection of its own.

    Raises RequestError for a status other than 200, for a connection that fails, and when nothing arrives for
    `silence_s`, also while the response is read.
    """
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=silence_s)
    headers = {"Content-Type": "application/json"}
    try:
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        response = connection.getresponse()
        if response.status != HTTPStatus.OK:
            text = response.read(_ERROR_BYTES).decode(errors="replace")
            raise RequestError(f"{path}: status {response.status}: {text}")
        yield response
    except TimeoutError as error:
        raise RequestError(f"{path}: nothing arrived for {silence_s:.0f} s") from error
    except (OSError, http.client.HTTPException) as error:
        raise RequestError(f"{path}: the connection failed: {error!r}") from error
    finally:
        connection.close()


def call(
    port: int, method: str, path: str, body: Mapping[str, Any] | None = None, silence_s: float = 30.0
) -> bytes:
    """The whole response of a server. Raises RequestError as `answering` does."""
    with answering(port, method, path, body, silence_s) as response:
        return response.read()
