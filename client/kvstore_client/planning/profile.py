"""What this machine needs for a model: seconds of decoding, of restoring, and of computing instead.

Measured on first use (by the engine's adapter, which has the model), kept in a file per model and machine.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvstore_client.kept_file import UNUSABLE, replace_file
from kvstore_codec import canonical
from kvstore_codec.encoding import Encoding
from kvstore_codec.errors import UnknownEncodingError

if TYPE_CHECKING:
    from kvstore_codec.model_spec import ModelSpec

_DOMAIN = b"kvstore.Profile.v1"
_FORMAT = 2
_KEY = re.compile(r"[0-9a-f]{64}")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CodecCost:
    """What one thread needs for a token of an encoding, all layers, while nothing else computes: `decode_s` from bytes
    to KV, `restore_s` to rotate its keys."""

    decode_s: float
    restore_s: float


UNMEASURED = CodecCost(decode_s=150e-6, restore_s=10e-6)
"""Where nothing at all is measured: a small model's KV at some 150 MB/s. The first chunks correct it."""


@dataclass(frozen=True, slots=True)
class PrefillCost:
    """Of one forward pass: what every pass costs, what every token costs, and what attention costs for each token and
    token before it."""

    fixed_s: float
    per_token_s: float
    per_pair_s: float

    def seconds(self, first_token: int, tokens: int) -> float:
        """Of a pass over `tokens` tokens behind `first_token` others; 0 tokens are no pass."""
        if not tokens:
            return 0.0
        pairs = tokens * (first_token + tokens / 2)
        return self.fixed_s + self.per_token_s * tokens + self.per_pair_s * pairs


@dataclass(frozen=True, slots=True)
class Profile:
    codecs: Mapping[str, CodecCost]
    """By name of the encoding."""
    prefill: PrefillCost
    interference: float
    """0: decoding does not slow computing. 1: they take turns. What takes A alone and B alone takes
    max(A, B) + interference * min(A, B) at once."""
    decode_threads: int
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Which model, machine and versions, and when: for people."""
    receive_s_per_byte: float = 0.0
    """What receiving takes from decoding and computing. Not measured but learned, because it is not the client's alone:
    the processor, memory, and whatever else sends or forwards on this machine."""

    def codec(self, encoding: str) -> CodecCost:
        """The measured cost, else that of the most similar encoding that was measured."""
        if encoding in self.codecs:
            return self.codecs[encoding]
        wanted = Encoding.parse(encoding)
        similar = max(self.codecs, key=lambda name: _similarity(wanted, Encoding.parse(name)), default=None)
        return UNMEASURED if similar is None else self.codecs[similar]


def _similarity(one: Encoding, other: Encoding) -> tuple[bool, bool, bool]:
    return one.layout == other.layout, one.coder == other.coder, one.rate == other.rate


def profile_key(spec: ModelSpec, machine: Mapping[str, str | int]) -> str:
    """64 hex digits: blake3 over the model's digest and all that the speed depends on (processor, cores, accelerator,
    threads, versions of libraries...)."""
    named = (part for name in sorted(machine) for part in (name.encode(), str(machine[name]).encode()))
    return canonical.digest(_DOMAIN, spec.digest, *named).hex()


class ProfileStore:
    """The profiles of this machine: `<cache_dir>/profiles/<key>.json`. Processes may share the folder."""

    def __init__(self, cache_dir: Path) -> None:
        self._folder = cache_dir / "profiles"

    def load(self, key: str) -> Profile | None:
        """None when there is none, and when the file cannot be used: it is then measured anew, and replaced."""
        path = self._folder / f"{key}.json"
        try:
            return _from_json(json.loads(path.read_bytes()))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (*UNUSABLE, UnknownEncodingError) as error:
            _log.warning("profile %s cannot be used and is measured anew: %.200r", path, error)
            return None

    def save(self, key: str, profile: Profile) -> None:
        """Raises OSError when it cannot be written."""
        text = json.dumps({"format": _FORMAT, **asdict(profile)}, indent=2)
        replace_file(self._folder / f"{key}.json", text.encode())

    def list(self) -> dict[str, Profile]:
        """All that can be used, by key."""
        keys = sorted(path.stem for path in self._folder.glob("*.json") if _KEY.fullmatch(path.stem))
        return {key: profile for key in keys if (profile := self.load(key)) is not None}


def _from_json(data: dict[str, Any]) -> Profile:
    """Raises ValueError, TypeError, KeyError, AttributeError or UnknownEncodingError for what is not a profile."""
    if data["format"] != _FORMAT:
        raise ValueError(f"format {data['format']!r} is not {_FORMAT}")
    for name in data["codecs"]:
        Encoding.parse(name)
    profile = Profile(
        codecs={
            name: CodecCost(_cost(cost["decode_s"]), _cost(cost["restore_s"]))
            for name, cost in data["codecs"].items()
        },
        prefill=PrefillCost(
            *(_cost(data["prefill"][name]) for name in ("fixed_s", "per_token_s", "per_pair_s"))
        ),
        interference=_cost(data["interference"]),
        decode_threads=int(data["decode_threads"]),
        provenance=dict(data["provenance"]),
    )
    if profile.interference > 1 or profile.decode_threads < 1:
        raise ValueError(f"interference {profile.interference}, {profile.decode_threads} decode threads")
    return profile


def _cost(value: Any) -> float:
    cost = float(value)
    if not 0 <= cost < math.inf:
        raise ValueError(f"{value!r} is not a cost")
    return cost
