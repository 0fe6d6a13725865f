"""Documents that are stored behind a system prefix, and prompts made of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvstore_client import KVStoreClient
from kvstore_client.engines.transformers import CachedModel
from kvstore_client.recompute import Recompute
from tests.client.conftest import ServedCluster
from tests.client.models import random_prompt

GREEDY = {"do_sample": False, "max_new_tokens": 6}
ALL_LOGITS = GREEDY | {"return_dict_in_generate": True, "output_logits": True}
PATIENT = {"lookup_timeout_s": 20.0, "failover_s": 20.0, "stall_timeout_s": 60.0, "retry_after_s": 0.0}
"""On a busy machine."""
ALL = Recompute(ratio=1.0)
NONE = Recompute(ratio=0.0, drift=False)

SYSTEM = random_prompt(256, seed=1000)[0]
QUESTION = random_prompt(30, seed=1001)[0]
LENGTHS = (256, 300, 600, 512, 700)
DOCUMENTS = [random_prompt(tokens, seed=seed)[0] for seed, tokens in enumerate(LENGTHS)]
CHUNKS = 1 + sum(tokens // 256 for tokens in LENGTHS)


@dataclass
class Library:
    cluster: ServedCluster
    client: KVStoreClient
    cached: CachedModel

    def stock(self, *segments: torch.Tensor) -> None:
        """Have the cluster store these behind each other: all of them, when none are named."""
        pieces = segments or (SYSTEM, *DOCUMENTS, QUESTION)
        self.answer(*pieces)
        self.client.store.flush()

    def answer(
        self, *segments: torch.Tensor, recompute: Recompute | None = None, **arguments: object
    ) -> torch.Tensor:
        input_ids, lengths = joined(*segments)
        return self.cached.generate(input_ids, segments=lengths, recompute=recompute, **(arguments or GREEDY))

    def plain(self, *segments: torch.Tensor, **arguments: object) -> torch.Tensor:
        """The model's own answer."""
        return self.cached.model.generate(joined(*segments)[0], **(arguments or GREEDY))

    def asked(self, *segments: torch.Tensor, recompute: Recompute | None = None) -> torch.Tensor:
        input_ids, lengths = joined(*segments)
        return self.cached.question_log_probabilities(input_ids, segments=lengths, recompute=recompute)

    def plainly_asked(self, *segments: torch.Tensor) -> torch.Tensor:
        input_ids, lengths = joined(*segments)
        with torch.inference_mode():
            logits = self.cached.model(input_ids).logits[0, -max(lengths[-1], 1) :]
        return logits.log_softmax(-1)

    def counted(self, name: str) -> int:
        return self.client.metrics.snapshot().get(name, 0)


def joined(*segments: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
    return torch.cat(segments)[None], [len(segment) for segment in segments]


def text(tokens: int, seed: int) -> torch.Tensor:
    return random_prompt(tokens, seed=seed)[0]


def check_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def permuted(order: Sequence[int]) -> list[torch.Tensor]:
    return [DOCUMENTS[index] for index in order]
