"""First and second moments of KV, accumulated text by text.

The state consists of sums. So moments can be merged by addition, a run can stop after any text and continue later, and
fitting does not need the KV.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from kvstore_codec.errors import CalibrationError
from kvstore_codec.klt import token_vectors

_COUNTS = ("tokens", "query_tokens", "fisher_texts")


class Moments:
    """Sums over the tokens of a calibration text, in f64 and host memory.

    Create it with `empty` or `load`. Products are computed in f32 on the device of the given tensors, after the mean of
    each text is subtracted: keys with a bias are far from zero, and their squares would hide the variance.
    """

    def __init__(self, sums: Mapping[str, torch.Tensor]) -> None:
        self._sums = dict(sums)

    @classmethod
    def empty(
        cls, *, layers: int, period_layers: int, kv_heads: int, head_dim: int, features: int
    ) -> Moments:
        """Moments of no text. Raises CalibrationError for sizes below 1."""
        if min(layers, period_layers, kv_heads, head_dim, features) < 1:
            raise CalibrationError("layers, period_layers, kv_heads, head_dim and features must be positive")
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(_COUNTS, ())
        shapes |= {
            "features.sum": (features,),
            "features.square": (features, features),
            "queries": (layers, kv_heads, head_dim, head_dim),
            "fisher": (layers, 2),
        }
        for period, first in enumerate(range(0, layers, period_layers)):
            size = min(period_layers, layers - first) * 2 * kv_heads * head_dim
            shapes[f"{period}.sum"] = (size,)
            shapes[f"{period}.square"] = (size, size)
            shapes[f"{period}.cross"] = (features, size)
        return cls(
            {name: torch.zeros(shape, dtype=torch.float64, device="cpu") for name, shape in shapes.items()}
        )

    @property
    def tokens(self) -> int:
        return int(self._sums["tokens"])

    @property
    def texts(self) -> int:
        """Number of completed texts: those whose Fisher scalars, the last step of a text, were added."""
        return int(self._sums["fisher_texts"])

    @property
    def layers(self) -> int:
        return self._sums["queries"].shape[0]

    @property
    def kv_heads(self) -> int:
        return self._sums["queries"].shape[1]

    @property
    def head_dim(self) -> int:
        return self._sums["queries"].shape[2]

    @property
    def features(self) -> int:
        return self._sums["features.sum"].shape[0]

    @property
    def periods(self) -> int:
        return sum(name.endswith(".cross") for name in self._sums)

    def period_layers(self, period: int) -> int:
        """Number of layers in a period. The last period may have fewer than the others."""
        return self._sums[f"{period}.sum"].shape[0] // (2 * self.kv_heads * self.head_dim)

    def add_kv(self, keys: torch.Tensor, values: torch.Tensor, features: torch.Tensor) -> None:
        """Adds the KV of one text: `keys` (before RoPE) and `values` `[layers, kv_heads, tokens, head_dim]`, and
        `features` `[tokens, features]`. Raises CalibrationError for other shapes and for values that are not finite."""
        tokens = features.shape[0]
        expected = (self.layers, self.kv_heads, tokens, self.head_dim)
        if keys.shape != expected or values.shape != expected or features.shape[1:] != (self.features,):
            raise CalibrationError(
                f"KV of {list(keys.shape)} and {list(values.shape)} with features {list(features.shape)} "
                f"does not fit moments of {list(expected)} and {self.features} features"
            )
        if tokens == 0:
            raise CalibrationError("a text without tokens has no moments")
        if not all(bool(tensor.isfinite().all()) for tensor in (keys, values, features)):
            raise CalibrationError("the model's KV of the text contains NaN or infinity")
        features = features.float()
        mean = features.mean(0, dtype=torch.float64)
        features = features - mean.float()
        mean = mean.cpu()
        self._sums["features.sum"] += tokens * mean
        self._sums["features.square"] += _host(features.T @ features) + tokens * torch.outer(mean, mean)
        first = 0
        for period in range(self.periods):
            chosen = slice(first, first + self.period_layers(period))
            first = chosen.stop
            vectors = token_vectors(keys[chosen], values[chosen])
            centre = vectors.mean(0, dtype=torch.float64)
            vectors -= centre.float()
            centre = centre.cpu()
            self._sums[f"{period}.sum"] += tokens * centre
            self._sums[f"{period}.square"] += _host(vectors.T @ vectors).addr_(centre, centre, alpha=tokens)
            self._sums[f"{period}.cross"] += _host(features.T @ vectors).addr_(mean, centre, alpha=tokens)
        self._sums["tokens"] += tokens

    def add_queries(self, queries: torch.Tensor) -> None:
        """Adds the queries of one text, before RoPE, `[layers, heads, tokens, head_dim]`. Consecutive heads share a KV
        head."""
        layers, heads, tokens, dim = queries.shape
        if (layers, dim) != (self.layers, self.head_dim) or heads % self.kv_heads:
            raise CalibrationError(
                f"queries of {list(queries.shape)} do not fit {self.layers} layers of {self.kv_heads} KV heads"
            )
        for layer, of_layer in enumerate(queries):
            grouped = of_layer.float().reshape(self.kv_heads, -1, dim)
            self._sums["queries"][layer] += _host(grouped.transpose(1, 2) @ grouped)
        self._sums["query_tokens"] += tokens

    def add_fisher(self, squared_gradients: torch.Tensor) -> None:
        """Mean squared gradient of one text's log-likelihood per layer and K/V, `[layers, 2]`."""
        if squared_gradients.shape != (self.layers, 2) or not bool(squared_gradients.isfinite().all()):
            raise CalibrationError(f"Fisher scalars must be {[self.layers, 2]} finite numbers")
        self._sums["fisher"] += _host(squared_gradients)
        self._sums["fisher_texts"] += 1

    def merge(self, other: Moments) -> None:
        """Adds the moments of another run. Raises CalibrationError for moments of another model or period shape."""
        if {n: s.shape for n, s in self._sums.items()} != {n: s.shape for n, s in other._sums.items()}:
            raise CalibrationError("moments of different models or periods cannot be merged")
        for name, total in self._sums.items():
            total += other._sums[name]

    def query_covariance(self) -> torch.Tensor:
        """E[q q^T] summed over the query heads of each KV head, `[layers, kv_heads, head_dim, head_dim]`."""
        return self._sums["queries"] / self._needed("query_tokens", "queries")

    def fisher(self) -> torch.Tensor:
        """Mean Fisher scalars, `[layers, 2]`."""
        return self._sums["fisher"] / self._needed("fisher_texts", "Fisher scalars")

    def feature_moments(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean `[features]` and covariance `[features, features]` of the features."""
        tokens = self._needed("tokens", "tokens")
        mean = self._sums["features.sum"] / tokens
        return mean, self._sums["features.square"] / tokens - torch.outer(mean, mean)

    def period_moments(self, period: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Mean `[D]`, covariance `[D, D]`, and covariance of the features with the values `[features, D]`."""
        tokens = self._needed("tokens", "tokens")
        mean = self._sums[f"{period}.sum"] / tokens
        feature_mean = self._sums["features.sum"] / tokens
        covariance = self._sums[f"{period}.square"] / tokens - torch.outer(mean, mean)
        return mean, covariance, self._sums[f"{period}.cross"] / tokens - torch.outer(feature_mean, mean)

    def save(self, path: Path, key: str) -> None:
        """Writes the state to `path` atomically. `key` identifies the texts and settings of the run."""
        unfinished = path.with_name(path.name + ".unfinished")
        safetensors.torch.save_file(self._sums, unfinished, {"key": key})
        unfinished.replace(path)

    @classmethod
    def load(cls, path: Path) -> tuple[Moments, str]:
        """Reads the state and key that `save` wrote. Raises CalibrationError for any other file."""
        try:
            with safe_open(path, framework="pt") as file:
                key = (file.metadata() or {})["key"]
                names = set(file.keys())
                moments = cls({name: file.get_tensor(name) for name in names})
            expected = cls.empty(
                layers=moments.layers,
                period_layers=moments.period_layers(0),
                kv_heads=moments.kv_heads,
                head_dim=moments.head_dim,
                features=moments.features,
            )
            expected.merge(moments)
        except (SafetensorError, OSError, KeyError, IndexError, ValueError) as error:
            raise CalibrationError(f"{path} does not hold the state of a calibration: {error!r}") from error
        return expected, key

    def _needed(self, count: str, what: str) -> torch.Tensor:
        if self._sums[count] < 1:
            raise CalibrationError(f"no {what} were added: the calibration text is empty")
        return self._sums[count]


def _host(product: torch.Tensor) -> torch.Tensor:
    return product.detach().cpu().double()
