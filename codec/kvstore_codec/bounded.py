"""Parsing JSON and msgpack in memory that the bytes cannot multiply.

A stranger can make every value of a document as short as a byte, and a parser makes an object of 60 bytes of it. So the
number of values is limited before they are made: by that of honest documents, which the caller knows.
"""

import itertools
import json
import re
from typing import Any

import msgpack  # type: ignore[import-untyped]
from typing_extensions import Buffer

# A string, also one that does not end, so that no text is searched twice; or what precedes each value but the first.
_TOKEN = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)|[\[{,]', re.DOTALL)
_TOKENS_OF_VALUE = 3
_MOST_FIELDS = 32
_MOST_CONTAINERS = 8


def loads(text: str, most_values: int) -> Any:
    """Parses a JSON document of about `most_values` values or fewer, those in arrays and maps included. Raises
    ValueError for any other text."""
    most_tokens = _TOKENS_OF_VALUE * most_values  # a separator, a key, and a string
    if sum(1 for _ in itertools.islice(_TOKEN.finditer(text), most_tokens + 1)) > most_tokens:
        raise ValueError(f"it has more than {most_values} values")
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def unpack_fields(data: Buffer) -> Any:
    """Parses a msgpack map of a few fields, with up to 7 small arrays and maps in it. Raises ValueError or
    msgpack.UnpackException for any other bytes."""
    containers = 0

    def counted(container: Any) -> Any:
        nonlocal containers
        containers += 1
        if containers > _MOST_CONTAINERS:
            raise ValueError(f"more than {_MOST_CONTAINERS} arrays and maps")
        return container

    return msgpack.unpackb(
        data,
        object_hook=counted,
        list_hook=counted,
        max_array_len=_MOST_FIELDS,
        max_map_len=_MOST_FIELDS,
        max_ext_len=0,
    )
