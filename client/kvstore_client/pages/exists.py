"""Lookup and locking of stored pages."""

from __future__ import annotations

from collections.abc import Sequence

from kvstore_client.lookup import release, report_use
from kvstore_client.pages.base import PageResult
from kvstore_client.pages.context import PageContext
from kvstore_client.pages.find import PageSearch
from kvstore_client.pages.jobs import Job
from kvstore_codec.identity import ChunkId


def lock_run(context: PageContext, job: Job, chunk_ids: Sequence[ChunkId]) -> PageResult:
    """Lock the leading run of stored pages. The leases on pages behind it end."""
    search = PageSearch(context.view, context.settings, context.metrics, context.namespace, chunk_ids)
    search.look(range(len(chunk_ids)), job.left_s)
    run = 0
    while run in search.found:
        run += 1
    leases = search.uses(range(run))
    report_use(context.view, leases)
    for lease in leases:
        locked = {
            chunk_ids[index]: search.found[index]
            for index in lease.asked
            if index < run and search.found[index].member == lease.member
        }
        if locked:
            release(context.view, context.locks.add(lease, locked, context.settings.fetch.lease_s))
    behind = [
        "behind_missing" if index in search.found else search.why_not for index in range(run, len(chunk_ids))
    ]
    return PageResult.of([*[None] * run, *behind])
