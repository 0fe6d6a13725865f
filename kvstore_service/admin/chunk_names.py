"""Names of chunks on the command line: `<content>+<prefix>` in hexadecimal digits. Both ids may be abbreviated."""

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
    """The first digits of a content_id and of a prefix_id, in lower case. A complete content_id without a prefix_id
    matches the chunk in all its contexts."""

    content: str
    prefix: str

    @classmethod
    def parse(cls, text: str) -> "ChunkPattern":
        """Parses `<content>` or `<content>+<prefix>`. Raises ConfigurationError."""
        match = re.fullmatch(
            rf"([0-9a-f]{{{_FEWEST_DIGITS},{_DIGITS}}})(?:\+([0-9a-f]{{0,{_DIGITS}}}))?", text.lower()
        )
        if match is None:
            raise ConfigurationError(
                f"{text!r} is not the name of a chunk; write {_FEWEST_DIGITS} to {_DIGITS} hexadecimal digits of its "
                "content_id, then optionally + and digits of its prefix_id, as `kvstore ls` shows them"
            )
        return cls(match[1], match[2] or "")

    @property
    def content_prefix(self) -> bytes:
        """Bytes that every matching content_id begins with. An odd last digit is left out."""
        return bytes.fromhex(self.content[: len(self.content) // 2 * 2])

    @property
    def chunk_id(self) -> ChunkId | None:
        """The chunk, if the pattern is a complete name."""
        if len(self.content) < _DIGITS or len(self.prefix) < _DIGITS:
            return None
        return ChunkId(ContentId(bytes.fromhex(self.content)), PrefixId(bytes.fromhex(self.prefix)))

    def choose(self, known: Iterable[ChunkId]) -> list[ChunkId]:
        """Chunks of `known` that the pattern names: one, or all contexts of a complete content_id. Raises ServiceError
        if none matches, or if an abbreviated name matches several."""
        fitting = {chunk for chunk in known if self._fits(chunk)}
        if not fitting:
            raise ServiceError(f"there is no chunk {self}")
        if len(fitting) > 1 and (len(self.content) < _DIGITS or self.prefix):
            names = sorted(name(chunk, digits=16) for chunk in fitting)
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            raise ServiceError(f"{self} matches {', '.join(names[:_SHOWN])}{more}; write more digits")
        return sorted(fitting, key=name)

    def _fits(self, chunk: ChunkId) -> bool:
        return chunk.content_id.hex().startswith(self.content) and chunk.prefix_id.hex().startswith(
            self.prefix
        )

    def __str__(self) -> str:
        return f"{self.content}+{self.prefix}" if self.prefix else self.content


def name(chunk: ChunkId, digits: int = _DIGITS) -> str:
    """The name of `chunk`, with `digits` digits of each id."""
    return f"{chunk.content_id.hex()[:digits]}+{chunk.prefix_id.hex()[:digits]}"


def unique(chunks: Iterable[ChunkId]) -> Sequence[ChunkId]:
    return list(dict.fromkeys(chunks))
