"""Ratios tuned on this machine, kept between runs: `<cache_dir>/ratios/<model digest>.json`.

There is one ratio for each storage tier: "dram", "disk", or the name given when it was measured.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvstore_client.kept_file import UNUSABLE, read_file, replace_file
from kvstore_client.recompute.tuning import Measurement, Tuned

_FORMAT = 1

_log = logging.getLogger(__name__)


class TunedRatios:
    """Processes may share the folder; of two that save for the same model at once, one write is lost."""

    def __init__(self, cache_dir: Path) -> None:
        self._folder = cache_dir / "ratios"

    def load(self, model_digest: bytes) -> Mapping[str, Tuned]:
        """Tuned ratios by tier. Empty when there are none and, with a warning, when the file is unusable."""
        path = self.path(model_digest)
        try:
            return _from_json(read_file(path))
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except UNUSABLE as error:
            _log.warning(
                "tuned ratios %s cannot be used; `kvstore tune` measures them again: %.200r",
                path,
                error,
            )
            return {}

    def ratio(self, model_digest: bytes, tier: str) -> float | None:
        """The tuned ratio of this tier; None where it was not tuned."""
        tuned = self.load(model_digest).get(tier)
        return tuned.ratio if tuned is not None else None

    def save(self, model_digest: bytes, tier: str, tuned: Tuned) -> None:
        """Save a tier's ratio and keep those of the model's other tiers. Raises OSError when writing fails."""
        tiers = {**self.load(model_digest), tier: tuned}
        data = {
            "format": _FORMAT,
            "tiers": {
                name: {"ratio": one.ratio, "measurements": [list(pair) for pair in one.measurements]}
                for name, one in tiers.items()
            },
        }
        replace_file(self.path(model_digest), json.dumps(data, indent=2).encode())

    def path(self, model_digest: bytes) -> Path:
        """File with a model's ratios."""
        return self._folder / f"{model_digest.hex()}.json"


def _from_json(data: dict[str, Any]) -> dict[str, Tuned]:
    """Parse the file. Raises ValueError, TypeError, KeyError or AttributeError for invalid data."""
    if data["format"] != _FORMAT:
        raise ValueError(f"format {data['format']!r} is not {_FORMAT}")
    return {str(tier): _tuned(fields) for tier, fields in data["tiers"].items()}


def _tuned(fields: dict[str, Any]) -> Tuned:
    measurements = tuple(Measurement(_number(r), _number(s)) for r, s in fields["measurements"])
    ratio = _number(fields["ratio"])
    if not 0 <= ratio <= 1:
        raise ValueError(f"{ratio} is not a ratio")
    return Tuned(ratio, measurements)


def _number(value: Any) -> float:
    if not isinstance(value, int | float):
        raise TypeError(f"{value!r} is not a number")
    return float(value)
