"""How far answers over a part of a prefix are from those over all of it: measured for each model, and kept in
`<cache_dir>/losses/<weights digest>.json`."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvstore_client.kept_file import UNUSABLE, read_file, replace_file

_FORMAT = 3
"""Formats 1 and 2 had the losses of frames that were chosen by other rules."""
_ROUNDING = 1e-6

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PartLosses:
    """KL divergence from answers over the whole prefix, nats per token, by the share of it that is attended to."""

    by_share: tuple[tuple[float, float], ...]
    """Pairs of share and loss, shares ascending and below 1."""

    @classmethod
    def of(cls, measured: Iterable[tuple[float, float]]) -> PartLosses:
        """From measurements in any order. A larger part is not taken to lose more than a smaller one did: such a
        difference is noise. Raises ValueError for shares and losses that are none."""
        found: list[tuple[float, float]] = []
        least = math.inf
        for share, loss in sorted(measured):
            if not (0 < share < 1 and 0 <= loss < math.inf):
                raise ValueError(f"a loss of {loss} at a share of {share}")
            least = min(least, loss)
            found.append((share, least))
        return cls(tuple(found))

    @property
    def shares(self) -> tuple[float, ...]:
        return tuple(share for share, _ in self.by_share)

    def at(self, share: float) -> float:
        """The loss of the largest measured share up to this one; infinite below all of them, 0 for the whole prefix."""
        if share >= 1:
            return 0.0
        return min((loss for known, loss in self.by_share if known <= share + _ROUNDING), default=math.inf)


class LossTable:
    """The losses of models. Processes may share the folder."""

    def __init__(self, cache_dir: Path) -> None:
        self._folder = cache_dir / "losses"

    def load(self, weights_digest: bytes) -> PartLosses:
        """What was measured; empty for a model that was not."""
        path = self.path(weights_digest)
        try:
            data = read_file(path)
            if data["format"] != _FORMAT:
                raise ValueError(f"format {data['format']!r} is not {_FORMAT}")
            return PartLosses.of((float(share), float(loss)) for share, loss in data["losses"])
        except (FileNotFoundError, NotADirectoryError):
            pass
        except UNUSABLE as error:
            _log.warning("measured losses %s cannot be used: %.200r", path, error)
        return PartLosses(())

    def save(self, weights_digest: bytes, losses: PartLosses, provenance: Mapping[str, Any]) -> None:
        """Keep what was measured, with what people should know of the measurement. Raises OSError when writing
        fails."""
        data = {"format": _FORMAT, "losses": losses.by_share, "provenance": dict(provenance)}
        replace_file(self.path(weights_digest), json.dumps(data, indent=2).encode())

    def path(self, weights_digest: bytes) -> Path:
        """File with a model's losses."""
        return self._folder / f"{weights_digest.hex()}.json"
