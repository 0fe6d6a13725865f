"""Selective recompute: of a prompt in segments much is reused, and only some tokens pass through the model."""

from kvstore_client.engines.transformers.blend.decoder import Decoder
from kvstore_client.engines.transformers.blend.executor import Blend
from kvstore_client.engines.transformers.blend.plan import SegmentPlan, exact_beginning
from kvstore_client.engines.transformers.blend.request import Blended, SegmentFetch, SegmentReuse
from kvstore_client.engines.transformers.blend.store import blended_chunks, prefilled_chunks

__all__ = [
    "Blend",
    "Blended",
    "Decoder",
    "SegmentFetch",
    "SegmentPlan",
    "SegmentReuse",
    "blended_chunks",
    "exact_beginning",
    "prefilled_chunks",
]
