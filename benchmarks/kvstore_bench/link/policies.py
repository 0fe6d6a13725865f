"""The compared policies: how a worker uses KV that is stored behind a slow link."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from kvstore_codec.encoding import Encoding, Rate
from kvstore_codec.errors import ConfigurationError, UnknownEncodingError

KVFETCHER = ("high-hevc-cpu", "high-hevc-cpu@128", "high-hevc-cpu@256")
"""Encodings of KVFetcher, as published: one precision, coded token by token as pictures, in three resolutions."""
STORED = (
    "exact-zstd",
    "high-klt-pco",
    "medium-klt-pco",
    "medium-klt-pco@256",
    "low-klt-pco",
    "medium-klt-hevc-cpu",
    "medium-klt-hevc-cpu@128",
    "medium-klt-hevc-cpu@256",
)
"""Encodings that documents are stored in for `adaptive`, in addition to those of the other measured policies."""
_NO_DEADLINE_S = 600.0
"""Fetch timeout of policies that cannot compute instead: their fetches are measured to the end."""

Kind = Literal["cold", "cachegen", "fixed", "kvfetcher", "adaptive"]


@dataclass(frozen=True, slots=True)
class Policy:
    name: str
    kind: Kind
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of its client (`connect_policy`), as JSON values."""
    encodings: tuple[str, ...] = ()
    """Encodings that the document must be stored in."""

    @property
    def chooses(self) -> bool:
        """Whether the delivered encodings depend on the link."""
        return self.kind == "adaptive"

    def meets(self, floor: Rate | None) -> bool | None:
        """Whether all its encodings are at least as precise as `floor`. None if only the measurement can tell."""
        if floor is None or self.kind == "cold":
            return True
        if not self.encodings or self.chooses:
            return None
        return all(is_at_least(name, floor) for name in self.encodings)


def is_at_least(encoding: str, floor: Rate) -> bool:
    rate = Encoding.parse(encoding).rate
    return isinstance(rate, Rate) and rate.is_at_least(floor)


_ADAPTIVE: dict[str, dict[str, Any]] = {
    "adaptive": {},
    "adaptive-kept": {"replan": False},
    "adaptive-serial": {"pipelined": False},
}
_NOT_ENCODINGS = ("cold", "raw", "cachegen", "kvfetcher", *_ADAPTIVE)
POLICIES = (*_NOT_ENCODINGS, "any encoding")
"""Policies, as listed in the help."""
DEFAULT_POLICIES = (
    "cold",
    "raw",
    "cachegen",
    "exact-zstd",
    "high-klt-pco",
    "medium-klt-pco",
    "low-klt-pco",
    "medium-klt-hevc-cpu",
    "kvfetcher",
    "adaptive",
)


def policy_named(name: str, floor: Rate | None, adaptive: Mapping[str, Any]) -> Policy:
    """The policy of this name. `adaptive` are further settings of the adaptive policies. KVSTORE_FLOOR has no effect on
    any policy. Raises ConfigurationError for an unknown name."""
    if name in ("cold", "cachegen"):
        return Policy(name, name)  # type: ignore[arg-type]
    if name == "kvfetcher":
        settings: dict[str, Any] = {
            "fetch_policy": "kvfetcher",
            "accept": KVFETCHER,
            "floor": None,
            "fetch_timeout_s": _NO_DEADLINE_S,
        }
        return Policy(name, "kvfetcher", settings, KVFETCHER)
    if name in _ADAPTIVE:
        chosen: dict[str, Any] = {"floor": floor.value} if floor else {"accept": STORED, "floor": None}
        return Policy(
            name, "adaptive", {"fetch_policy": "adaptive"} | chosen | dict(adaptive) | _ADAPTIVE[name], STORED
        )
    encoding = "exact-raw" if name == "raw" else name
    try:
        Encoding.parse(encoding)
    except UnknownEncodingError as error:
        raise _unknown(name) from error
    settings = {
        "fetch_policy": "fixed",
        "accept": (encoding,),
        "floor": None,
        "fetch_timeout_s": _NO_DEADLINE_S,
    }
    return Policy(name, "fixed", settings, (encoding,))


def policies_named(
    names: Sequence[str], floor: Rate | None, adaptive: Mapping[str, Any]
) -> tuple[Policy, ...]:
    """The policies of these names, after `cold`, which all others are compared with. Raises ConfigurationError for an
    unknown name."""
    return tuple(policy_named(name, floor, adaptive) for name in dict.fromkeys(("cold", *names)))


def stored_encodings(policies: Sequence[Policy]) -> tuple[str, ...]:
    """All encodings that the document must be stored in, without duplicates."""
    return tuple(dict.fromkeys(name for policy in policies for name in policy.encodings))


def _unknown(name: str) -> ConfigurationError:
    return ConfigurationError(
        f"there is no policy {name!r}; policies are {', '.join(_NOT_ENCODINGS)}, and encodings such as medium-klt-pco"
    )
