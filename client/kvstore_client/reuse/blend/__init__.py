"""Selective recompute: most of a segmented prompt is reused, and only some tokens pass through the model."""

from kvstore_client.reuse.blend.executor import Blend
from kvstore_client.reuse.blend.plan import SegmentPlan, exact_beginning
from kvstore_client.reuse.blend.request import BlendedPrompt, SegmentFetch, SegmentReuse
from kvstore_client.reuse.blend.store import blended_chunks, prefilled_chunks

__all__ = [
    "Blend",
    "BlendedPrompt",
    "SegmentFetch",
    "SegmentPlan",
    "SegmentReuse",
    "blended_chunks",
    "exact_beginning",
    "prefilled_chunks",
]
