"""`kvstore selftest`."""

import secrets
import time
from typing import Annotated

import typer

from kvstore_api.address import DEFAULT_ADDRESS
from kvstore_codec.errors import ServiceError
from kvstore_service.cli import options


def selftest(
    pages: Annotated[int, typer.Option(min=1, max=4096, help="Number of pages.")] = 64,
    page_kib: Annotated[int, typer.Option(min=1, max=1024, help="Size of a page, KiB.")] = 64,
    address: options.Address = DEFAULT_ADDRESS,
) -> None:
    """Store some pages, read them back, compare, and delete them: does the cluster work from here? Needs a credential
    with the scope data. Exits with status 1 if it does not."""
    from kvstore_client import connect
    from kvstore_client.pages import PageNamespace
    from kvstore_service.admin import ClusterAdmin
    from kvstore_service.listen import Address

    where = str(Address.parse(address))
    # A new namespace each time, so that no earlier run has stored these pages.
    namespace = PageNamespace(b"kvstore selftest " + secrets.token_bytes(16), "random", 0, 1)
    keys = [b"%d" % number for number in range(pages)]
    stored = [secrets.token_bytes(page_kib << 10) for _ in keys]
    views = [bytearray(page_kib << 10) for _ in keys]
    with ClusterAdmin(where) as cluster, connect(where) as client:
        nodes = cluster.nodes()
        store = client.pages(namespace)
        try:
            began_s = time.monotonic()
            put = store.put(keys, stored)
            put_s = time.monotonic() - began_s
            began_s = time.monotonic()
            got = store.get_into(keys, views)
            get_s = time.monotonic() - began_s
        finally:
            chunks = namespace.chunk_ids(keys, client.settings.tenant_salt.get_secret_value().encode())
            for node in nodes:
                node.delete(chunks)
    for done, result in (("stored", put), ("read", got)):
        if not all(result.ok):
            raise ServiceError(f"{sum(result.ok)} of {pages} pages were {done}: {dict(result.reasons)}")
    if any(view != page for view, page in zip(views, stored, strict=True)):
        raise ServiceError("a page came back with other bytes than were stored")
    size_mb = pages * (page_kib << 10) / 1e6
    typer.echo(
        f"{pages} pages, {size_mb:.1f} MB, on {len(nodes)} nodes: stored in {put_s:.2f} s, read back in {get_s:.2f} s"
    )
