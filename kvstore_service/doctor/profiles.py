"""Profiles of models on this machine: the speed of prefill, and the speed of decoding their KV."""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

from kvstore_client.cache_dir import default_cache_dir
from kvstore_client.planning.profile import Profile, ProfileStore
from kvstore_client.settings import ClientSettings
from kvstore_codec.errors import CodecError, ConfigurationError, StartupError
from kvstore_service.models import DType, load_model

if TYPE_CHECKING:
    from kvstore_codec.klt_frames import KLT
    from kvstore_codec.model_spec import ModelSpec

FAR_TOKENS = 4096
_PASS_TOKENS = 1024
_PATIENCE_S = 120.0
"""Time budget of a measurement by the command. A worker's first request uses a shorter one."""

_PLAIN = ("exact-zstd", "medium-zstd", "medium-hevc-cpu")
_CALIBRATED = ("exact-zstd", "high-klt-pco", "medium-klt-pco", "low-klt-pco", "medium-klt-hevc-cpu")


@dataclass(frozen=True, slots=True)
class DecodeRow:
    """Decode speed of one encoding in one thread, in MB (1e6 bytes) of KV per second."""

    encoding: str
    decode_mb_per_s: float
    restore_mb_per_s: float


@dataclass(frozen=True, slots=True)
class ProfileRow:
    """Profile of one model on this machine."""

    key: str
    model: str
    dtype: str
    machine: dict[str, str | int]
    measured: str
    prefill_tokens_per_s: float
    """Measured at the beginning of a text."""
    prefill_tokens_per_s_at_4096: float
    interference: float
    encodings: list[DecodeRow]


def cached_profiles() -> list[ProfileRow]:
    """Profiles of all models in the cache folder (KVSTORE_CACHE_DIR)."""
    return [_row(key, profile) for key, profile in ProfileStore(default_cache_dir()).list().items()]


def measure(model_name: str, dtype: DType) -> ProfileRow:
    """Measures a model (`models.SMOLLM2` or a folder) as a worker does on first use, and saves the profile.

    Measures the encodings that KVSTORE_* variables configure, and a few more. Uses a cached calibration of the model if
    there is one. Raises ConfigurationError and StartupError."""
    if find_spec("transformers") is None:
        raise StartupError("measuring needs transformers: pip install 'kvstore-service[transformers]'")
    from kvstore_client.engines.transformers.profile import machine_of, measure_profile
    from kvstore_client.engines.transformers.spec import spec_of
    from kvstore_client.planning.profile import profile_key

    settings = ClientSettings()
    model, _tokenizer = load_model(model_name, dtype)
    spec = spec_of(model.eval())
    klt = _cached_klt(spec)
    encodings = dict.fromkeys((*settings.encodings.accept, *(_PLAIN if klt is None else _CALIBRATED)))
    profile = measure_profile(
        model, spec, tuple(encodings), klt, decode_threads=settings.fetch.decoders, budget_s=_PATIENCE_S
    )
    key = profile_key(spec, machine_of(model))
    try:
        ProfileStore(settings.cache_dir).save(key, profile)
    except OSError as error:
        raise ConfigurationError(
            f"cannot write the profile to {settings.cache_dir}: {error.strerror}; set KVSTORE_CACHE_DIR to a writable "
            "folder"
        ) from error
    return _row(key, profile)


def _cached_klt(spec: "ModelSpec") -> "KLT | None":
    """Any cached calibration of the model; calibrations of one model differ little in speed."""
    from kvstore_codec.calibration import Calibration
    from kvstore_codec.klt_frames import KLT

    for path in sorted((default_cache_dir() / "calibrations").glob("*.kvcal")):
        try:
            calibration = Calibration.from_bytes(path.read_bytes())
            calibration.require(spec)
        except (OSError, CodecError):  # damaged, or of another model
            continue
        return KLT(calibration)
    return None


def _row(key: str, profile: Profile) -> ProfileRow:
    facts, prefill = profile.provenance, profile.prefill
    token_bytes = int(facts.get("kv_bytes_per_token", 0))
    return ProfileRow(
        key=key,
        model=str(facts.get("model", "?")),
        dtype=str(facts.get("dtype", "?")),
        machine=dict(facts.get("machine", {})),
        measured=str(facts.get("measured", "?")),
        prefill_tokens_per_s=_per_s(_PASS_TOKENS, prefill.seconds(0, _PASS_TOKENS)),
        prefill_tokens_per_s_at_4096=_per_s(_PASS_TOKENS, prefill.seconds(FAR_TOKENS, _PASS_TOKENS)),
        interference=profile.interference,
        encodings=[
            DecodeRow(
                name, _per_s(token_bytes / 1e6, cost.decode_s), _per_s(token_bytes / 1e6, cost.restore_s)
            )
            for name, cost in profile.codecs.items()
        ],
    )


def _per_s(amount: float, seconds: float) -> float:
    return amount / seconds if seconds > 0 else 0.0
