"""What a worker may do about KV that is behind a link."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from kvstore_codec.encoding import Encoding, Rate
from kvstore_codec.errors import ConfigurationError, UnknownEncodingError

KVFETCHER = ("high-hevc-cpu", "high-hevc-cpu@128", "high-hevc-cpu@256")
"""As published: one precision, token by token in pictures, in three resolutions."""
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
"""What a document is stored as for `adaptive`, besides what other policies that are measured have it stored as."""
_PATIENCE_S = 600.0
"""Whoever has no choice is measured to its end."""

Kind = Literal["cold", "cachegen", "fixed", "kvfetcher", "adaptive"]


@dataclass(frozen=True, slots=True)
class Policy:
    name: str
    kind: Kind
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of its client (`connect_policy`), for JSON."""
    encodings: tuple[str, ...] = ()
    """That the document has to be stored as."""

    @property
    def chooses(self) -> bool:
        """Whether what it delivers depends on the link."""
        return self.kind == "adaptive"

    def meets(self, floor: Rate | None) -> bool | None:
        """Whether its names promise that fidelity; None where only what was fetched, or a measurement, can say."""
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
"""Names, for a person."""
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
    """`adaptive` are further settings of the adaptive ones. A floor that the environment has counts for none of them.
    Raises ConfigurationError."""
    if name in ("cold", "cachegen"):
        return Policy(name, name)  # type: ignore[arg-type]
    if name == "kvfetcher":
        settings: dict[str, Any] = {
            "fetch_policy": "kvfetcher",
            "accept": KVFETCHER,
            "floor": None,
            "fetch_timeout_s": _PATIENCE_S,
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
    settings = {"fetch_policy": "fixed", "accept": (encoding,), "floor": None, "fetch_timeout_s": _PATIENCE_S}
    return Policy(name, "fixed", settings, (encoding,))


def policies_named(
    names: Sequence[str], floor: Rate | None, adaptive: Mapping[str, Any]
) -> tuple[Policy, ...]:
    """`cold` is always the first of them: everything is compared with it. Raises ConfigurationError."""
    return tuple(policy_named(name, floor, adaptive) for name in dict.fromkeys(("cold", *names)))


def stored_encodings(policies: Sequence[Policy]) -> tuple[str, ...]:
    """That the document is stored as, each once."""
    return tuple(dict.fromkeys(name for policy in policies for name in policy.encodings))


def _unknown(name: str) -> ConfigurationError:
    return ConfigurationError(
        f"there is no policy {name!r}; there are {', '.join(_NOT_ENCODINGS)}, and encodings, such as medium-klt-pco"
    )
