"""Interface of an HEVC coder. It codes pictures as one stream, and folds the planes of `Coder` into pictures."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from enum import Enum

from kvstore_codec.coders.base import Coder, Data, Plane
from kvstore_codec.coders.hevc.bitstream import Chroma
from kvstore_codec.coders.hevc.pictures import Fold, Pictures


class Prediction(Enum):
    """INTRA: every picture is independent (IDR). INTER: every picture but the first may refer to the previous one."""

    INTRA = "intra"
    INTER = "inter"


class HevcCoder(Coder):
    """Coder of raw Annex-B streams. A stream is exactly VPS, SPS, PPS and then slices, so any HEVC decoder that
    supports the chroma format decodes it without any other stream. Pictures with three planes are 4:4:4. Pictures with
    one plane are monochrome or 4:2:0 with constant chroma; `decoded` accepts both."""

    @abstractmethod
    def encode_pictures(self, pictures: Pictures, prediction: Prediction = Prediction.INTRA) -> bytes:
        """Codes `pictures`, [count, planes, height, width] with any strides, as one stream."""

    @abstractmethod
    def decoded(self, data: Data, shape: tuple[int, int, int, int]) -> Iterator[list[Plane]]:
        """Decodes `data` as pictures of `shape`, [count, planes, height, width]. Yields the planes of each picture,
        [height, width or more], which are valid until the next picture is requested.

        Yields exactly `count` pictures, or raises ChunkFormatError.
        """

    def decode_pictures(self, data: Data, out: Pictures) -> None:
        """Fills `out`, [count, planes, height, width] with any strides. Raises ChunkFormatError if `data` does not
        hold such pictures; `out` may then contain the first of them."""
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


# Chroma format by number of planes. For one plane, a stream without chroma is smallest.
MONOCHROME_OR_FULL = {1: Chroma.MONOCHROME, 3: Chroma.FULL}
# The same for hardware decoders, all of which support 4:2:0.
QUARTER_OR_FULL = {1: Chroma.QUARTER, 3: Chroma.FULL}
