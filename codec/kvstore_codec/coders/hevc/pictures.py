"""Pictures of 8-bit samples for a video coder, with one plane or the three planes of 4:4:4."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvstore_codec.coders.base import Plane

# [count, planes, height, width]; planes is 1 or 3, sides are even and at least SMALLEST_SIDE.
Pictures = npt.NDArray[np.uint8]

# NVDEC requires HEVC pictures with even sides of at least 144 samples.
SMALLEST_SIDE = 144
# Sample value of unused areas: the middle of the range, which represents the integer 0.
PADDING = 128


def picture_side(samples: int) -> int:
    """The smallest allowed side for a picture that is `samples` wide or high."""
    return max(SMALLEST_SIDE, samples + samples % 2)


@dataclass(frozen=True, slots=True)
class Fold:
    """Folding of a [rows, cols] plane into one picture that is about square. The plane is cut into strips of `height`
    rows, which are placed side by side; the rest of the picture is padding."""

    width: int
    height: int

    @classmethod
    def of(cls, rows: int, cols: int) -> Fold:
        strips = max(1, round(math.sqrt(rows / cols)), -(-SMALLEST_SIDE // cols))
        return cls(width=picture_side(min(strips, rows) * cols), height=picture_side(-(-rows // strips)))

    def fold(self, plane: Plane) -> Pictures:
        """[rows, cols] -> [1, 1, height, width]"""
        pictures = np.full((1, 1, self.height, self.width), PADDING, np.uint8)
        for part, place in self._pairs(plane, pictures[0, 0]):
            place[...] = part
        return pictures

    def unfold(self, picture: Plane, out: Plane) -> None:
        """Inverse of `fold`: fills `out`, [rows, cols], from `picture`, [height, width]."""
        for part, place in self._pairs(out, picture):
            part[...] = place

    def _pairs(self, plane: Plane, picture: Plane) -> list[tuple[Plane, Plane]]:
        rows, cols = plane.shape
        parts = [plane[first : first + self.height] for first in range(0, rows, self.height)]
        return [
            (part, picture[: len(part), strip * cols : (strip + 1) * cols])
            for strip, part in enumerate(parts)
        ]
