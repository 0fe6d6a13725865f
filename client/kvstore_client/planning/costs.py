"""Current costs of a model: a profile, corrected by the observations of every fetch."""

import math
import threading
import time
from collections.abc import Callable
from dataclasses import replace

from kvstore_client.fork import renew_in_children
from kvstore_client.planning.profile import CodecCost, PrefillCost, Profile

_MEMORY_TOKENS = 2048.0
"""An observation of this many tokens moves an estimate by 63 %: a busy machine shows within a fetch or two."""


_FORGOTTEN_S = 60.0
"""Half-life, in seconds, of a correction of the prefill cost back to the profile. When fetching looks better and
nothing is computed in full any more, no observation would show that the machine is fast again."""
_LARGE_BYTES = 4 << 20
"""Smaller fetches do not show what a byte costs."""
_LEARNING, _FORGETTING = 0.5, 0.98


class Costs:
    """Costs of one model in one process. Thread-safe.

    Observations are exponentially weighted by the number of tokens. The costs are those of undisturbed work: the
    planner adds the interference of decoding and computing.
    """

    def __init__(self, profile: Profile, clock: Callable[[], float] = time.monotonic) -> None:
        self._renew()
        renew_in_children(self, Costs._renew)
        self._profile = profile
        self._codecs = dict(profile.codecs)
        self._prefill_scale, self._prefill_seen_s = 1.0, clock()
        self._clock = clock
        self._overhead_s = 0.0
        self._receive_s_per_byte = profile.receive_s_per_byte

    def _renew(self) -> None:
        self._lock = threading.Lock()

    def observe_decode(
        self, encoding: str, token_layers: float, decode_s: float, restore_s: float, *, disturbed: float = 0.0
    ) -> None:
        """`token_layers` is decoded tokens * layers / layers of the model; 0 teaches nothing. `disturbed` is the share
        of the time in which the engine computed."""
        if token_layers <= 0:
            return
        taken = token_layers * (1.0 + self._profile.interference * disturbed)
        seen = CodecCost(decode_s / taken, restore_s / taken)
        with self._lock:
            known = self._codecs.get(encoding)
            # The first observation replaces an estimate from a similar encoding.
            share = 1.0 if known is None else _share(token_layers)
            known = known or seen
            self._codecs[encoding] = CodecCost(
                known.decode_s + share * (seen.decode_s - known.decode_s),
                known.restore_s + share * (seen.restore_s - known.restore_s),
            )

    def observe_prefill(self, first_token: int, tokens: int, seconds: float) -> None:
        """Learn from one forward pass. One factor scales all three costs, because only the machine's speed changes."""
        predicted_s = self._profile.prefill.seconds(first_token, tokens)
        if predicted_s <= 0:
            return
        with self._lock:
            scale = self._scale()
            self._prefill_scale = scale + _share(tokens) * (seconds / predicted_s - scale)
            self._prefill_seen_s = self._clock()

    def set_prefill(self, prefill: PrefillCost) -> None:
        """Replace the prefill cost by one that was measured elsewhere, as it is now."""
        with self._lock:
            self._profile = replace(self._profile, prefill=prefill)
            self._prefill_scale = 1.0

    def observe_fetch(self, size_bytes: int, late_s: float) -> None:
        """Learn from a fetch in which every chunk was read, and whose last pass ended `late_s` after the prediction.
        The delay common to all fetches is separated from that of large fetches."""
        with self._lock:
            if size_bytes < _LARGE_BYTES:
                self._overhead_s += _LEARNING * (max(late_s, 0.0) - self._overhead_s)
                self._receive_s_per_byte *= _FORGETTING  # otherwise large fetches would never be tried again
                return
            # The prediction already includes what was learned before.
            correction = (late_s - self._overhead_s) / size_bytes
            self._receive_s_per_byte = max(0.0, self._receive_s_per_byte + _LEARNING * correction)

    def _scale(self) -> float:
        unseen_s = self._clock() - self._prefill_seen_s
        return 1.0 + (self._prefill_scale - 1.0) * math.exp2(-unseen_s / _FORGOTTEN_S)

    def snapshot(self) -> Profile:
        with self._lock:
            prefill, scale = self._profile.prefill, self._scale()
            return replace(
                self._profile,
                codecs=dict(self._codecs),
                receive_s_per_byte=self._receive_s_per_byte,
                prefill=PrefillCost(
                    prefill.fixed_s * scale, prefill.per_token_s * scale, prefill.per_pair_s * scale
                ),
            )


def _share(tokens: float) -> float:
    return 1.0 - math.exp(-tokens / _MEMORY_TOKENS)
