"""Reading single frames of many chunks, for re-prefill: one request per node, completed range by range."""

from kvstore_client.frames.read import FrameRead, FrameResult

__all__ = ["FrameRead", "FrameResult"]
