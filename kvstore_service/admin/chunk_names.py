"""Chunks as a person writes them: `<content>+<prefix>` in hexadecimal digits, each as far as it is needed."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kvstore_codec.errors import ConfigurationError, ServiceError
from kvstore_codec.identity import ChunkId, ContentId, PrefixId

_DIGITS = 64
_FEWEST_DIGITS = 4
_SHOWN = 5


@dataclass(frozen=True, slots=True)
class ChunkPattern:
    """Beginnings of a content_id and of a prefix_id, in lower-case digits. A whole content_id without a prefix_id
    stands for the chunk in all of its contexts."""

    content: str
    prefix: str

    @classmethod
    def parse(cls, text: str) -> "ChunkPattern":
        """Raises ConfigurationError."""
        match = re.fullmatch(
            rf"([0-9a-f]{{{_FEWEST_DIGITS},{_DIGITS}}})(?:\+([0-9a-f]{{0,{_DIGITS}}}))?", text.lower()
        )
        if match is None:
            raise ConfigurationError(
                f"{text!r} names no chunk; write {_FEWEST_DIGITS} to {_DIGITS} hexadecimal digits of its content_id, "
                "and after a + those of its prefix_id, as `kvstore ls` shows them"
            )
        return cls(match[1], match[2] or "")

    @property
    def content_prefix(self) -> bytes:
        """What any content_id that fits begins with."""
        return bytes.fromhex(self.content[: len(self.content) // 2 * 2])

    @property
    def chunk_id(self) -> ChunkId | None:
        """The chunk, when the pattern is a whole name."""
        if len(self.content) < _DIGITS or len(self.prefix) < _DIGITS:
            return None
        return ChunkId(ContentId(bytes.fromhex(self.content)), PrefixId(bytes.fromhex(self.prefix)))

    def choose(self, known: Iterable[ChunkId]) -> list[ChunkId]:
        """The one of `known` that is meant. Raises ServiceError when none is, or more than one could be."""
        fitting = {chunk for chunk in known if self._fits(chunk)}
        if not fitting:
            raise ServiceError(f"there is no chunk {self}")
        if len(fitting) > 1 and (len(self.content) < _DIGITS or self.prefix):
            names = sorted(name(chunk, digits=16) for chunk in fitting)
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            raise ServiceError(f"{self} could be {', '.join(names[:_SHOWN])}{more}; write more digits")
        return sorted(fitting, key=name)

    def _fits(self, chunk: ChunkId) -> bool:
        return chunk.content_id.hex().startswith(self.content) and chunk.prefix_id.hex().startswith(
            self.prefix
        )

    def __str__(self) -> str:
        return f"{self.content}+{self.prefix}" if self.prefix else self.content


def name(chunk: ChunkId, digits: int = _DIGITS) -> str:
    """`digits` of each id."""
    return f"{chunk.content_id.hex()[:digits]}+{chunk.prefix_id.hex()[:digits]}"


def unique(chunks: Iterable[ChunkId]) -> Sequence[ChunkId]:
    return list(dict.fromkeys(chunks))
