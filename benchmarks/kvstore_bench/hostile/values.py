"""Edits of documents: of the values in a msgpack or JSON document, and of their encoded bytes."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgpack  # type: ignore[import-untyped]

from kvstore_bench.fuzz.edits import edit_bytes

_MARK = "<fragment>"
"""Stands for encoded bytes that no value has; see `_fragment`."""
_FRAGMENT_SHARE, _BYTES_SHARE = 0.08, 0.08
_BOMB_SHARE = 0.02
"""Of all fragments. A bomb is as large as the parser accepts."""
_SMALL_FRAGMENT_BYTES = 2048
_NUMBERS: tuple[Any, ...] = (
    0, 1, -1, 2, 7, 63, 64, 65, 255, 256, 65_535, 65_536, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1,
    -(2**31), -(2**63), 0.0, -0.5, 1e-320, 1e300, float("inf"), float("-inf"), float("nan"),
)  # fmt: skip
_OTHERS: tuple[Any, ...] = (
    None,
    True,
    False,
    "",
    "x",
    "0",
    "\0",
    "ä" * 300,
    "a/../b",
    [],
    {},
    [[]],
    {"": 0},
    [1, 2, 3],
)


@dataclass(frozen=True, slots=True)
class Format:
    """A format of documents. `pack` encodes a value; `atoms` are encoded values that take much more memory than their
    bytes, `opening` and `closing` those of an array of one element, and `array` encodes an array of such atoms."""

    pack: Callable[[Any], bytes]
    extremes: tuple[Any, ...]
    atoms: tuple[bytes, ...]
    nesting: tuple[tuple[bytes, bytes], ...]
    array: Callable[[bytes, int], bytes]


def _json_array(atom: bytes, count: int) -> bytes:
    return b"[" + b",".join([atom] * count) + b"]"


def _msgpack_array(atom: bytes, count: int) -> bytes:
    return b"\xdd" + count.to_bytes(4, "big") + atom * count


MSGPACK = Format(
    msgpack.packb,
    (b"", b"\xff" * 32, b"x" * 300, msgpack.ExtType(5, b"abc"), msgpack.Timestamp(2**33, 5)),
    (b"\x80", b"\x90", b"\xc0", b"\x91\x90", b"\xa0", b"\xcb" + bytes(8)),
    ((b"\x91", b""), (b"\x81\xa0", b""), (b"\x81\xc0", b"")),
    _msgpack_array,
)
JSON = Format(
    lambda value: json.dumps(value).encode(),
    (10**400, -(10**30), "\ud800", "9" * 5000),
    (b"{}", b"[]", b"0", b'""', b"1e5", b"9" * 5000, b"1e999"),
    ((b"[", b"]"), (b'{"":', b"}")),
    _json_array,
)


def mutated_document(rng: random.Random, form: Format, value: Any, most_bytes: int) -> bytes:
    """The document of `value`, an array or map, after some edits. At most `most_bytes` long, if that of `value` is."""
    edited = json_like_copy(value)
    with_fragment = rng.random() < _FRAGMENT_SHARE
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        edited = edit_value(rng, edited, form.extremes)
    if with_fragment:
        edited = _replaced(rng, edited, lambda _: _MARK)
    packed = form.pack(edited)
    if with_fragment:
        room = most_bytes - len(packed)
        limit = room if rng.random() < _BOMB_SHARE else min(room, _SMALL_FRAGMENT_BYTES)
        packed = packed.replace(form.pack(_MARK), _fragment(rng, form, max(8, limit - 8)), 1)
    if rng.random() < _BYTES_SHARE:
        data = bytearray(packed)
        edit_bytes(rng, data)
        packed = bytes(data)
    return packed[:most_bytes]


def edit_value(rng: random.Random, value: Any, extremes: tuple[Any, ...]) -> Any:
    """`value` with one part of it changed, removed, added, repeated or exchanged."""
    match rng.randrange(10):
        case 0:
            return _replaced(rng, value, lambda _: rng.choice(_NUMBERS))
        case 1:
            return _replaced(rng, value, lambda _: json_like_copy(rng.choice((*_OTHERS, *extremes))))
        case 2:
            return _replaced(
                rng, value, lambda old: [json_like_copy(old) for _ in range(rng.choice((0, 1, 2, 20)))]
            )
        case 3:
            parts = _parts(value)
            if not parts:
                return value
            donor = rng.choice(parts)
            return _replaced(rng, value, lambda _: json_like_copy(donor[0][donor[1]]))
        case 4 | 5:
            return _changed_container(rng, value, extremes)
        case _:
            return _replaced(rng, value, lambda old: _near(rng, old, extremes))


def json_like_copy(value: Any) -> Any:
    """A deep copy of nested lists and dicts."""
    if isinstance(value, dict):
        return {key: json_like_copy(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [json_like_copy(part) for part in value]
    return value


def _near(rng: random.Random, old: Any, extremes: tuple[Any, ...]) -> Any:
    """Something of the kind of `old`."""
    match old:
        case bool():
            return not old
        case int():
            return rng.choice((old + 1, old - 1, -old, old * 2, old << 16, *_NUMBERS)) % (1 << 64)
        case float():
            return rng.choice((-old, old * 1e300, old + 1, *_NUMBERS))
        case str():
            data = bytearray(old.encode(errors="replace"))
            edit_bytes(rng, data)
            return data.decode(errors="replace" if rng.random() < 0.7 else "ignore")
        case bytes():
            data = bytearray(old)
            edit_bytes(rng, data)
            return bytes(data)
    return json_like_copy(rng.choice((*_OTHERS, *_NUMBERS, *extremes)))


def _changed_container(rng: random.Random, value: Any, extremes: tuple[Any, ...]) -> Any:
    containers = [
        part for part in (value, *(c[k] for c, k in _parts(value))) if isinstance(part, list | dict)
    ]
    found = rng.choice(containers)
    new = json_like_copy(rng.choice((*_NUMBERS, *_OTHERS, *extremes)))
    if isinstance(found, list):
        match rng.randrange(4):
            case 0 if found:
                del found[rng.randrange(len(found))]
            case 1:
                found.insert(rng.randint(0, len(found)), new)
            case 2 if found:
                found.append(json_like_copy(rng.choice(found)))
            case _:
                rng.shuffle(found)
        return value
    match rng.randrange(3):
        case 0 if found:
            del found[rng.choice(list(found))]
        case 1 if found:
            key = rng.choice(list(found))
            found[rng.choice((key + "x" if isinstance(key, str) else "x", ""))] = found.pop(key)
        case _:
            found[rng.choice(("more", "", "\0", "tenant", "model"))] = new
    return value


def _replaced(rng: random.Random, value: Any, new: Callable[[Any], Any]) -> Any:
    parts = _parts(value)
    if parts:
        container, key = rng.choice(parts)
        container[key] = new(container[key])
    return value


def _parts(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every part of the value. Of a long list only the first 8 parts."""
    found: list[tuple[Any, Any]] = []
    keys = (
        list(value)
        if isinstance(value, dict)
        else range(min(8, len(value)))
        if isinstance(value, list)
        else ()
    )
    for key in keys:
        found.append((value, key))
        found += _parts(value[key])
    return found


def _fragment(rng: random.Random, form: Format, most_bytes: int) -> bytes:
    """One encoded value: nested as deeply as fits, or an array of as many atoms as fit."""
    if rng.random() < 0.5:
        opening, closing = rng.choice(form.nesting)
        depth = most_bytes // (len(opening) + len(closing) + 1)
        return opening * depth + rng.choice(form.atoms[:2]) + closing * depth
    atom = rng.choice(form.atoms)
    return form.array(atom, max(1, (most_bytes - 8) // (len(atom) + 1)))
