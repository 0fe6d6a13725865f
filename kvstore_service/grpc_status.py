"""The gRPC status of each error of a request."""

from collections.abc import Iterator
from contextlib import contextmanager

import grpc

from kvstore_codec.errors import (
    AbandonedRequestError,
    BusyError,
    MalformedRequestError,
    PermissionDeniedError,
    RequestError,
    UnauthenticatedError,
)

_STATUS: dict[type[RequestError], grpc.StatusCode] = {
    MalformedRequestError: grpc.StatusCode.INVALID_ARGUMENT,
    BusyError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    AbandonedRequestError: grpc.StatusCode.CANCELLED,
    UnauthenticatedError: grpc.StatusCode.UNAUTHENTICATED,
    PermissionDeniedError: grpc.StatusCode.PERMISSION_DENIED,
}


@contextmanager
def reported(context: grpc.ServicerContext) -> Iterator[None]:
    """Ends the call with a gRPC status if the block refuses the request."""
    try:
        yield
    except RequestError as error:
        context.abort(_STATUS[type(error)], str(error))
