"""Messages for people about failed gRPC calls."""

import grpc

from kvstore_codec.errors import NodeUnavailableError

_MOST_CHARACTERS = 240


def predicate_of(error: grpc.RpcError) -> str:
    """A predicate for a sentence that begins with an address: `refused the connection`, `did not answer in time`."""
    code, details = error.code(), (error.details() or "")[-_MOST_CHARACTERS:]
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return "did not answer in time"
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return "is not a kvstore service"
    if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
        return f"refused this client: {details}"
    if code is not grpc.StatusCode.UNAVAILABLE:
        return f"answered {code.name}: {details}"
    if "handshake" in details.lower():
        return f"does not complete the TLS handshake; check KVSTORE_TLS_CA and the certificates: {details}"
    if "Socket closed" in details:
        return "closed the connection; if it uses TLS, set KVSTORE_TLS_CA"
    if "refused" in details:
        return "refused the connection"
    if "resolution failed" in details:
        return "cannot be found: no host has that name"
    return f"cannot be reached: {details}"


def unreachable(error: NodeUnavailableError, address: str) -> str:
    """Message for people when nothing can be reused or stored."""
    return (
        f"{error}: KV is computed, and not shared. Check that `kvstore serve` runs and that KVSTORE_ADDRESS "
        f"({address}) is its address; `kvstore status --address {address}` asks it"
    )
