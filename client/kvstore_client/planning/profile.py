"""Profile of a model on this machine: seconds of decoding, of restoring, and of computing instead.

The engine's adapter, which has the model, measures it at first use. It is kept in a file per model and machine.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvstore_client.kept_file import UNUSABLE, read_file, replace_file
from kvstore_codec import canonical
from kvstore_codec.encoding import Encoding
from kvstore_codec.errors import UnknownEncodingError

if TYPE_CHECKING:
    from kvstore_codec.model_spec import ModelSpec

_DOMAIN = b"kvstore.Profile.v1"
_FORMAT = 2
_MOST_SECONDS, _MOST_THREADS = 1e6, 1 << 16
_KEY = re.compile(r"[0-9a-f]{64}")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CodecCost:
    """Seconds that one undisturbed thread needs per token of an encoding, all layers: `decode_s` from bytes to KV,
    `restore_s` to rotate its keys."""

    decode_s: float
    restore_s: float


UNMEASURED = CodecCost(decode_s=150e-6, restore_s=10e-6)
"""Default when nothing is measured: a small model's KV at about 150 MB/s. The first chunks correct it."""


@dataclass(frozen=True, slots=True)
class PrefillCost:
    """Costs of forward passes: per pass, per token, and for attention per token and preceding token."""

    fixed_s: float
    per_token_s: float
    per_pair_s: float

    def seconds(self, first_token: int, tokens: int) -> float:
        """Seconds of a pass over `tokens` tokens behind `first_token` others; 0 for no tokens."""
        if not tokens:
            return 0.0
        pairs = tokens * (first_token + tokens / 2)
        return self.fixed_s + self.per_token_s * tokens + self.per_pair_s * pairs


@dataclass(frozen=True, slots=True)
class Profile:
    codecs: Mapping[str, CodecCost]
    """By encoding name."""
    prefill: PrefillCost
    interference: float
    """0: decoding does not slow computing. 1: they take turns. Work that takes A and B alone takes max(A, B) +
    interference * min(A, B) in parallel."""
    decode_threads: int
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Model, machine, versions and time of the measurement: for people."""
    receive_s_per_byte: float = 0.0
    """Slowdown of decoding and computing per received byte. Learned, not measured, because it does not depend on the
    client alone: processor, memory, and other senders on this machine count."""
    unmeasured: CodecCost = UNMEASURED
    """Cost of an encoding while none of its layout is measured."""

    def codec(self, encoding: str) -> CodecCost:
        """The measured cost, else that of the most similar measured encoding of the same layout, else `unmeasured`."""
        if encoding in self.codecs:
            return self.codecs[encoding]
        wanted = Encoding.parse(encoding)
        alike = [name for name in self.codecs if Encoding.parse(name).layout == wanted.layout]
        similar = max(alike, key=lambda name: _similarity(wanted, Encoding.parse(name)), default=None)
        return self.unmeasured if similar is None else self.codecs[similar]


def _similarity(one: Encoding, other: Encoding) -> tuple[bool, bool]:
    return one.coder == other.coder, one.rate == other.rate


def profile_key(spec: ModelSpec, machine: Mapping[str, str | int]) -> str:
    """64 hex digits: blake3 over the model's digest and everything that its speed depends on (processor, cores,
    accelerator, threads, library versions...)."""
    named = (part for name in sorted(machine) for part in (name.encode(), str(machine[name]).encode()))
    return canonical.digest(_DOMAIN, spec.digest, *named).hex()


class ProfileStore:
    """Profiles of this machine: `<cache_dir>/profiles/<key>.json`. Processes may share the folder."""

    def __init__(self, cache_dir: Path) -> None:
        self._folder = cache_dir / "profiles"

    def load(self, key: str) -> Profile | None:
        """The profile of this key. None when there is none or its file is unusable: it is then measured again and
        replaced."""
        path = self._folder / f"{key}.json"
        try:
            return _from_json(read_file(path))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (*UNUSABLE, UnknownEncodingError) as error:
            _log.warning("profile %s cannot be used and is measured again: %.200r", path, error)
            return None

    def save(self, key: str, profile: Profile) -> None:
        """Write a profile. Raises OSError when that fails."""
        text = json.dumps({"format": _FORMAT, **asdict(profile)}, indent=2)
        replace_file(self._folder / f"{key}.json", text.encode())

    def list(self) -> dict[str, Profile]:
        """All usable profiles, by key."""
        keys = sorted(path.stem for path in self._folder.glob("*.json") if _KEY.fullmatch(path.stem))
        return {key: profile for key in keys if (profile := self.load(key)) is not None}


def _from_json(data: dict[str, Any]) -> Profile:
    """Parse a profile. Raises ValueError, TypeError, KeyError, AttributeError or UnknownEncodingError for invalid
    data."""
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
    if profile.interference > 1 or not 1 <= profile.decode_threads <= _MOST_THREADS:
        raise ValueError(f"interference {profile.interference}, {profile.decode_threads} decode threads")
    return profile


def _cost(value: Any) -> float:
    cost = float(value)
    if not 0 <= cost <= _MOST_SECONDS:
        raise ValueError(f"{value!r} is not a cost")
    return cost
