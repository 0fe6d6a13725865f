"""The contract of an HEVC coder: pictures in, one stream out, and the planes of `Coder` folded into pictures."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from enum import Enum

from kvstore_codec.coders.base import Coder, Data, Plane
from kvstore_codec.coders.hevc.bitstream import Chroma
from kvstore_codec.coders.hevc.pictures import Fold, Pictures


class Prediction(Enum):
    """INTRA: every picture stands alone (IDR). INTER: every picture but the first may point at the one before."""

    INTRA = "intra"
    INTER = "inter"


class HevcCoder(Coder):
    """A stream is raw Annex-B of exactly VPS, SPS, PPS and then slices, so that any HEVC decoder that takes its
    chroma format reads it without having seen another one. Pictures of three planes are 4:4:4; those of one
    plane are monochrome or 4:2:0 with constant chroma, and decoders take both."""

    @abstractmethod
    def encode_pictures(self, pictures: Pictures, prediction: Prediction = Prediction.INTRA) -> bytes:
        """`pictures` is [count, planes, height, width], any strides."""

    @abstractmethod
    def decoded(self, data: Data, shape: tuple[int, int, int, int]) -> Iterator[list[Plane]]:
        """Decodes `data` as pictures of `shape`, [count, planes, height, width]: yields the planes of each,
        [height, width or more], valid until the next one is asked for.

        Exactly `count` of them, or ChunkFormatError.
        """

    def decode_pictures(self, data: Data, out: Pictures) -> None:
        """Fills `out`, [count, planes, height, width], any strides. Raises ChunkFormatError when `data` cannot
        be such pictures; `out` may then hold the first of them."""
        count, planes, height, width = out.shape
        for picture, decoded in zip(out, self.decoded(data, (count, planes, height, width)), strict=True):
            for into, samples in zip(picture, decoded, strict=True):
                into[...] = samples[:, :width]

    def encode(self, plane: Plane) -> bytes:
        return self.encode_pictures(Fold.of(*plane.shape).fold(plane))

    def decode(self, data: Data, out: Plane) -> None:
        fold = Fold.of(*out.shape)
        for (picture,) in self.decoded(data, (1, 1, fold.height, fold.width)):
            fold.unfold(picture, out)


# What one plane becomes when it is encoded on its own: without chroma it is smallest.
MONOCHROME_OR_FULL = {1: Chroma.MONOCHROME, 3: Chroma.FULL}
# 4:2:0 is what every hardware decoder reads.
QUARTER_OR_FULL = {1: Chroma.QUARTER, 3: Chroma.FULL}
