"""What a process keeps of a prefix between questions."""

import torch

from kvstore_client.contiguous.summaries import ChunkSummary
from kvstore_client.contiguous.summary_store import FoundSummaries, SummaryStore
from kvstore_client.pages import PageStore
from kvstore_codec.identity import PrefixId
from kvstore_codec.page import PageNamespace
from tests.client.chunks import SPEC
from tests.client.contiguous.test_summaries import SHAPE, keys

FIRST, SECOND = (PrefixId(bytes([number]) * 32) for number in (1, 2))


def no_pages(_namespace: PageNamespace) -> PageStore:
    raise AssertionError("nothing is read or stored")


def test_the_keys_of_the_prefix_that_was_asked_last_are_kept() -> None:
    store = SummaryStore(no_pages, timeout_s=1.0)
    made = {name: ChunkSummary.make(keys(seed), SHAPE) for seed, name in enumerate((FIRST, SECOND))}
    found = FoundSummaries(made, 0)
    both, one = (FIRST, SECOND), (FIRST,)
    told = store.joined(both, found, SHAPE)
    assert store.joined(both, found, SHAPE) is told
    alone = store.joined(one, found, SHAPE)
    queries = torch.randn(SPEC.kv_heads, 3, SPEC.head_dim, generator=torch.Generator().manual_seed(3))
    products, of_first = (keys_of.best_products(3, queries, 64) for keys_of in (told, alone))
    assert products.shape[1] == 2 * of_first.shape[1]
    torch.testing.assert_close(products[:, :4], of_first)
    assert store.joined(both, found, SHAPE) is not told
