"""The two kinds of KV that vLLM workers exchange, and which of them an engine's settings ask for.

vLLM keeps keys after RoPE. `exact` chunks hold them as they are, under names that only vLLM workers use. Lossy chunks
hold keys before RoPE, as everywhere, under the names of the checkpoint's plain ModelSpec, so that all engines share
them. Undoing RoPE rounds once more, therefore a vLLM worker stores no `exact` chunk under plain names; it may read one.
"""

from dataclasses import replace
from enum import StrEnum

from kvstore_client.settings import EncodingSettings
from kvstore_codec.encoding import Encoding, Rate
from kvstore_codec.errors import ConfigurationError
from kvstore_codec.model_spec import ModelSpec


class KeyKind(StrEnum):
    """Whether stored keys were taken before or after RoPE."""

    AFTER_ROPE = "after RoPE"
    BEFORE_ROPE = "before RoPE"


def kind_of(settings: EncodingSettings) -> KeyKind:
    """The kind that an engine with these settings stores and reads: the encodings that it stores decide. Raises
    ConfigurationError, with the reason, for settings that would mix the kinds, or that would store KV as more faithful
    than the KV that it was computed from."""
    stored = [Encoding.parse(name) for name in settings.stored]
    exact = [encoding.name for encoding in stored if encoding.rate is Rate.EXACT]
    lossy = [encoding for encoding in stored if encoding.rate is not Rate.EXACT]
    if exact and lossy:
        raise ConfigurationError(
            f"a vLLM worker cannot store {exact[0]} and {lossy[0].name} side by side: vLLM's own prefix cache does not "
            "tell which KV was computed behind lossy KV, and such KV would be stored as exact; store one of the two. "
            "For fast links, a second encoding of the same rate is quicker to decode, such as medium-zstd beside "
            "medium-klt-pco"
        )
    if exact:
        _require_exact_reads(settings, exact[0])
        return KeyKind.AFTER_ROPE
    if not any(settings.accepts(encoding.name) for encoding in lossy):
        raise ConfigurationError(
            f"a vLLM worker that stores {lossy[0].name} but accepts no chunk in an encoding that it stores would never "
            "reuse its own KV; lower `floor` (exact accepts no lossy chunk), or add the encoding to `accept`"
        )
    for encoding in lossy:
        worse = _unfollowable(encoding, settings)
        if worse is not None:
            raise ConfigurationError(
                f"a vLLM worker that accepts {worse} cannot store {encoding.name}: KV computed behind such chunks "
                "would pass for more faithful than it is; raise `floor`, or store the least faithful accepted rate"
            )
    return KeyKind.BEFORE_ROPE


def spec_of_kind(plain: ModelSpec, kind: KeyKind) -> ModelSpec:
    """The ModelSpec that names KV of this kind. `plain` is that of the checkpoint.

    Keys after RoPE can be reused only at their own position. Their names depend on the checkpoint's RoPE all the same.
    """
    if kind is KeyKind.BEFORE_ROPE:
        return plain
    keys = ("keys", f"{kind} of {plain.digest.hex()}")
    return replace(plain, rope=None, sliding_rope=None, numerics=tuple(sorted((*plain.numerics, keys))))


def kind_named(spec: ModelSpec) -> KeyKind:
    """The kind of KV that a spec of `spec_of_kind` names."""
    return KeyKind.AFTER_ROPE if spec.rope is None else KeyKind.BEFORE_ROPE


def _require_exact_reads(settings: EncodingSettings, stored: str) -> None:
    lossy = [name for name in settings.accept if Encoding.parse(name).rate is not Rate.EXACT]
    if settings.floor not in (None, Rate.EXACT):
        lossy = [f"the floor {settings.floor}"]
    if lossy:
        raise ConfigurationError(
            f"a vLLM worker that stores {stored} reads exact chunks only, because they keep keys after RoPE and lossy "
            f"ones keys before RoPE, and {lossy[0]} is lossy; set `encoding` to a lossy one, such as medium-klt-pco"
        )


def _unfollowable(stored: Encoding, settings: EncodingSettings) -> str | None:
    """An accepted rate or encoding behind whose KV nothing may be stored in the encoding `stored`."""
    accepted = [Encoding.parse(name) for name in settings.accept]
    if settings.floor is not None:
        if not stored.may_follow(Encoding(settings.floor, "zstd")):
            return f"the rate {settings.floor}"
        accepted = [encoding for encoding in accepted if not isinstance(encoding.rate, Rate)]
    return next((other.name for other in accepted if not stored.may_follow(other)), None)
