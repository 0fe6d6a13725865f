"""The document and the questions of the demo."""

from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from kvstore_codec.errors import ConfigurationError

FIRST_QUESTION = "In one sentence, what is this document about?"
SECOND_QUESTION = "What is the difference between mutable and immutable objects? Answer in two sentences."


_DOCUMENT = ("objects", "types")


def calibration_text() -> str:
    """Text to fit the calibration to: the chapters of Python's language reference that are not the default document."""
    return "\n\n".join(text for name, text in sorted(topics.items()) if name not in _DOCUMENT)


def read_document(path: Path | None) -> str:
    """The text of a file, or Python's own documentation of its data model. Raises ConfigurationError for a file that
    cannot be read."""
    if path is None:
        return "\n\n".join(topics[name] for name in _DOCUMENT)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error  # without the path
        raise ConfigurationError(f"cannot read the document {path}: {reason}") from error


def prompt_tokens(tokenizer: Any, document: str, question: str, tokens: int) -> list[int]:
    """Token IDs of a chat prompt: the first `tokens` tokens of the document, then the question."""
    body = tokenizer(document, add_special_tokens=False).input_ids[:tokens]
    excerpt = tokenizer.decode(body)
    chat = [{"role": "user", "content": f"Read this document.\n\n{excerpt}\n\n---\n{question}"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return ids
