"""Adaptive resolution as KVFetcher publishes it (arXiv 2602.09725).

The precision is fixed, and so is what is fetched: everything. For the next chunk a table of decoding times and the
bandwidth that the chunk before it saw choose the resolution (how many tokens are tiled into a picture) at which
receiving and decoding, one behind the other, wait least for each other.
"""

from kvstore_client.planning.base import COMPUTE, ChunkWork, Option, Plan, Work
from kvstore_client.planning.predict import bandwidth_of, predict
from kvstore_codec.encoding import Encoding


class KVFetcherPlanner:
    """Never computes a chunk that can be fetched. Asked again in mid-fetch, it sees the last chunks' bandwidth."""

    def plan(self, work: Work) -> Plan:
        return predict(work, {chunk.index: _resolution(work, chunk) for chunk in work.chunks}, "layers")


def _resolution(work: Work, chunk: ChunkWork) -> int:
    if not chunk.options:
        return COMPUTE
    bandwidth = bandwidth_of(work, chunk.endpoint)

    def slower_stage_s(choice: int) -> float:
        option = chunk.options[choice]
        return max(option.size_bytes / bandwidth, option.work_s / work.decode_threads)

    return min(_one_precision(chunk.options), key=slower_stage_s)


def _one_precision(options: tuple[Option, ...]) -> list[int]:
    """The resolutions of the most faithful token-wise video; without one, what is most faithful."""
    encodings = [Encoding.parse(option.encoding) for option in options]
    videos = [encoding for encoding in encodings if encoding.is_video and encoding.layout == "token_frames"]
    if not videos:
        return [0]
    same = [(encoding.rate, encoding.coder, encoding.layout) for encoding in encodings]
    return [
        index for index, one in enumerate(same) if one == (videos[0].rate, videos[0].coder, videos[0].layout)
    ]
