"""The table of limits, against the page and the constants of the ports."""

from pathlib import Path
from types import ModuleType

import pytest

from kvstore_service import grpc_server, metrics_server, unary_requests, verifications, wire
from kvstore_service.bulk_server import server as bulk
from kvstore_service.events import publisher, sockets
from kvstore_service.limits import LIMITS, table

PAGE = (Path(__file__).parents[2] / "docs" / "security.md").read_text()


def test_the_page_shows_the_limits() -> None:
    assert table() in PAGE, table()


@pytest.mark.parametrize(
    "module", [bulk, publisher, sockets, grpc_server, metrics_server, unary_requests, verifications, wire]
)
def test_each_limit_of_a_port_is_in_the_table(module: ModuleType) -> None:
    own = {name: value for name, value in vars(module).items() if name.startswith("MAX_")}
    assert own
    assert set(own.values()) <= {limit.value for limit in LIMITS}, own
