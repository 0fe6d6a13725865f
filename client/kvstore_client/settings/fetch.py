"""How a client plans and runs a fetch."""

import os
from enum import StrEnum

from pydantic import Field

from kvstore_client.settings.group import SettingsGroup


class FetchPolicy(StrEnum):
    """How a fetch is planned. `adaptive` goes by the speed of the link, the decoder and the engine: each chunk is read
    in the encoding that serves best, or computed where that is sooner. `fixed` reads every chunk in the best encoding
    that is accepted. `kvfetcher` reads in one precision and chooses the resolution (KVFetcher, arXiv 2602.09725)."""

    ADAPTIVE = "adaptive"
    FIXED = "fixed"
    KVFETCHER = "kvfetcher"


class FetchSettings(SettingsGroup):
    """How a fetch is planned and run, and the memory it may use."""

    policy: FetchPolicy = Field(default=FetchPolicy.ADAPTIVE, alias="fetch_policy")
    """How a fetch is planned. `adaptive`: each chunk in the encoding that serves best on this link, or computed where
    that is sooner. `fixed`: every chunk in the best accepted encoding. `kvfetcher`: as in arXiv 2602.09725."""

    replan: bool = True
    """Whether a running fetch is planned again when the bandwidth of the link has changed."""

    lease_s: float = Field(default=60.0, gt=0)
    """How long nodes protect looked-up chunks from eviction, in seconds. Longer than a fetch takes."""

    decode_threads: int = Field(default=0, ge=0)
    """Threads that decode one fetch. 0: half the cores, at most four, because the engine computes at the same time."""

    inflight_bytes: int = Field(default=64 << 20, gt=0)
    """Received bytes that may wait for decoding. Beyond it the sender is slowed down. A fetch also holds what it is
    receiving and decoding (about 1 MiB for each owner and decoder), and a client keeps 64 MiB of receive memory: with
    the default a fetch's buffers stay below 256 MB, apart from its destination."""

    pool_bytes: int = Field(default=256 << 20, ge=0)
    """Memory for fetched KV that is kept between fetches. A fetch that needs more allocates its own."""

    @property
    def decoders(self) -> int:
        """Threads that decode one fetch. Measured on 2 cores: a second one takes more from the engine than it gives."""
        return self.decode_threads or min(4, max(1, (os.cpu_count() or 1) // 2))
