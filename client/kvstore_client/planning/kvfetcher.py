"""Adaptive resolution as published by KVFetcher (arXiv 2602.09725).

The precision is fixed, and every chunk is fetched. The resolution (number of tokens tiled into a picture) of the next
chunk is chosen from a table of decoding times and the bandwidth of the previous chunk, so that receiving and decoding
wait least for each other.
"""

from kvstore_client.planning.base import COMPUTE, ChunkWork, Option, Order, Plan, Work
from kvstore_client.planning.predict import bandwidth_of, predict
from kvstore_codec.encoding import Encoding


class KVFetcherPlanner:
    """Computes only chunks that cannot be fetched. When it replans during a fetch, it sees the last chunks'
    bandwidth."""

    def __init__(self, order: Order = "layers") -> None:
        self._order: Order = order

    def plan(self, work: Work) -> Plan:
        return predict(work, {chunk.index: _resolution(work, chunk) for chunk in work.chunks}, self._order)


def _resolution(work: Work, chunk: ChunkWork) -> int:
    if not chunk.options:
        return COMPUTE
    bandwidth = bandwidth_of(work, chunk.endpoint)

    def slower_stage_s(choice: int) -> float:
        option = chunk.options[choice]
        return max(option.size_bytes / bandwidth, option.work_s / work.decode_threads)

    return min(_one_precision(chunk.options), key=slower_stage_s)


def _one_precision(options: tuple[Option, ...]) -> list[int]:
    """The resolutions of the most faithful token-wise video; without such video, the most faithful option."""
    encodings = [Encoding.parse(option.encoding) for option in options]
    videos = [encoding for encoding in encodings if encoding.is_video and encoding.layout == "token_frames"]
    if not videos:
        return [0]
    same = [(encoding.rate, encoding.coder, encoding.layout) for encoding in encodings]
    return [
        index for index, one in enumerate(same) if one == (videos[0].rate, videos[0].coder, videos[0].layout)
    ]
