"""Settings of a client, from arguments or `KVSTORE_*` environment variables."""

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

from pydantic import Field, SecretStr, ValidationInfo, field_validator
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from kvstore_api.address import DEFAULT_ADDRESS
from kvstore_api.environment import FORMER_DURABILITY, under_new_name, without_service_links
from kvstore_client.cache_dir import default_cache_dir, expanded
from kvstore_codec.encoding import Encoding, Rate
from kvstore_codec.errors import UnknownEncodingError

EXACT = "exact-zstd"
_PREFIX = "KVSTORE_"


class Durability(StrEnum):
    """What an acknowledged chunk survives: `default` what its node is configured for, `memory` nothing, `relaxed` the
    death of the process, `durable` a power loss. A node that cannot promise `durable` refuses the chunk."""

    DEFAULT = "default"
    MEMORY = "memory"
    RELAXED = "relaxed"
    DURABLE = "durable"


class FetchPolicy(StrEnum):
    """How a fetch is planned: `adaptive` by what the link, the decoder and the engine can do, each chunk in the
    encoding that serves best, or computed where that is sooner; `fixed` every chunk in the best encoding that is
    accepted; `kvfetcher` in one precision, of which the resolution is chosen (KVFetcher, arXiv 2602.09725)."""

    ADAPTIVE = "adaptive"
    FIXED = "fixed"
    KVFETCHER = "kvfetcher"


class SelectorName(StrEnum):
    """Which reused tokens are computed again where their text stands in another context (`kvstore_client.recompute`):
    `focus` and `query` by what the question attends to, `hkvd` as CacheBlend (arXiv 2405.16444), `frequency` as
    CacheTune (arXiv 2605.24022), and `frequency-high` by the other end of the spectrum, `first_k` as EPIC
    (arXiv 2410.15332), `random` to compare with."""

    FOCUS = "focus"
    QUERY = "query"
    HKVD = "hkvd"
    FREQUENCY = "frequency"
    FREQUENCY_HIGH = "frequency-high"
    FIRST_K = "first_k"
    RANDOM = "random"

    @property
    def needs_order(self) -> bool:
        """Whether it goes by an order of tokens that is stored with each chunk."""
        return self in (SelectorName.FREQUENCY, SelectorName.FREQUENCY_HIGH)


class ClientSettings(BaseSettings):
    """How a client looks up, fetches and stores. Times in seconds, sizes in bytes.

    An empty variable means that the setting is not given. `~` in a path is the user's home folder.
    """

    model_config = SettingsConfigDict(
        env_prefix=_PREFIX, env_ignore_empty=True, extra="ignore", frozen=True, hide_input_in_errors=True
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        *sources: PydanticBaseSettingsSource,
        **named: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Leaves out variables that Kubernetes sets for Services; an address may be one."""
        chosen = super().settings_customise_sources(settings_cls, *sources, **named)
        names = [f"{_PREFIX}{name}".lower() for name in cls.model_fields if name != "address"]
        for source in chosen:
            if isinstance(source, EnvSettingsSource):
                variables = under_new_name(source.env_vars, FORMER_DURABILITY, "kvstore_put_durability")
                source.env_vars = without_service_links(variables, names)
        return chosen

    address: str = DEFAULT_ADDRESS
    """`host:port` of the coordinator; `tcp://host:port`, as Kubernetes writes it, means the same."""

    tenant_salt: SecretStr = SecretStr("")
    """Secret mixed into every content_id: clients with different salts never see each other's chunks."""

    encoding: str = EXACT
    """What new chunks are stored as; several, comma-separated, are stored side by side, and a fetch takes what suits
    the link. One with `klt` in its name needs a calibration of the model in the cluster."""

    accept: Annotated[tuple[str, ...], NoDecode] = Field(default=(), validate_default=True)
    """Encodings a fetch may use, of equally faithful ones the best first; comma-separated in the environment. When not
    given: what new chunks are stored as, then `exact-zstd`. Who asks for a lossy encoding with `encoding` has said that
    it will do."""

    floor: Rate | None = None
    """The least faithful rate that a fetch may use: exact, high, medium or low. When given, it decides in place of
    `accept`, which then only adds encodings of an explicit step."""

    recompute_selector: SelectorName = SelectorName.FOCUS
    """Which tokens of text reused in another context are computed again. Chunks are stored with an order of their
    tokens where the selector goes by one."""

    recompute_ratio: float | None = Field(default=None, ge=0, le=1)
    """Share of such text's tokens that is computed again. When not given: what `kvstore tune` found to be
    fastest for where the text is stored, else `recompute_floor`."""

    disk_tier: str | None = None
    """Name of the tier that `kvstore tune` tuned for disks like those of the nodes: disk, ssd or hdd, for
    text that is stored on one. When not given: disk, or ssd where only that was tuned."""

    recompute_floor: float = Field(default=0.15, ge=0, le=1)
    """The least share that a ratio chosen for speed may have: with less, answers suffer."""

    recompute_drift: bool = True
    """Whether what computing shows at the computed tokens is spread to their neighbours."""

    lookup_timeout_s: float = Field(default=1.0, gt=0)
    """How long the engine waits for a lookup before it prefills instead."""

    fetch_policy: FetchPolicy = FetchPolicy.ADAPTIVE
    """How a fetch is planned."""

    replan: bool = True
    """Whether a plan is made anew while the fetch runs, when the link's bandwidth has moved."""

    failover_s: float = Field(default=0.25, gt=0)
    """How long a node may be silent before another one that holds the same chunks is asked instead. Through the bulk
    port any byte breaks the silence, through gRPC a whole piece of a range (about 50 ms of the link)."""

    fetch_timeout_s: float = Field(default=30.0, gt=0)
    """Deadline of a whole fetch. What has not arrived by then is recomputed."""

    stall_timeout_s: float = Field(default=2.0, gt=0)
    """A fetch that receives nothing for this long is given up before its deadline."""

    put_timeout_s: float = Field(default=60.0, gt=0)
    """Deadline of storing one batch of chunks; it runs behind the engine's back."""

    put_stall_timeout_s: float = Field(default=5.0, gt=0)
    """A node that takes nothing and acknowledges nothing for this long is given up; other owners have the chunks."""

    ttl_s: int = Field(default=0, ge=0)
    """How long new chunks are kept; 0: until they are evicted."""

    put_durability: Durability = Durability.DEFAULT
    """What an acknowledged chunk survives."""

    tenant: str = ""
    """Whose quota new chunks count against."""

    close_timeout_s: float = Field(default=10.0, ge=0)
    """How long closing a client waits for chunks that are still to be stored."""

    store_backlog_bytes: int = Field(default=512 << 20, gt=0)
    """KV that may wait to be stored; beyond it new chunks are dropped rather than held in memory."""

    calibration_timeout_s: float = Field(default=30.0, gt=0)
    """Deadline of getting a calibration that is not in `cache_dir` yet."""

    cache_dir: Path = Field(default_factory=default_cache_dir)
    """Folder of what is kept between runs: calibrations, profiles. Processes may share it. One that cannot be written
    costs time, and nothing else."""

    canary_timeout_s: float = Field(default=60.0, ge=0)
    """How long the first call of a model waits until its KV was compared with the cluster's canary, which takes a
    prefill of 256 tokens. Calls that come sooner are computed without reuse, and nothing of them is stored."""

    lease_s: float = Field(default=60.0, gt=0)
    """How long looked-up chunks are protected from eviction."""

    membership_ttl_s: float = Field(default=5.0, gt=0)
    """Age from which the membership is refreshed, in the background."""

    retry_after_s: float = Field(default=1.0, ge=0)
    """Pause after a failed lookup or fetch in which the service is not asked again."""

    decode_threads: int = Field(default=0, ge=0)
    """Threads that decode one fetch; 0 takes half the cores, at most four: the engine computes meanwhile."""

    @property
    def decoders(self) -> int:
        """Threads that decode one fetch. Measured on 2 cores: a second one takes more from the engine than it gives."""
        return self.decode_threads or min(4, max(1, (os.cpu_count() or 1) // 2))

    inflight_bytes: int = Field(default=64 << 20, gt=0)
    """Received bytes that may wait for decoding; beyond it the sender is slowed down. Besides, a fetch holds what is
    being received and decoded (a MiB or so for each owner and decoder), and the client keeps 64 MiB of receive memory
    warm: with the default a fetch's buffers stay below 256 MB, its destination apart."""

    pool_bytes: int = Field(default=256 << 20, ge=0)
    """Memory kept between fetches for the KV they bring; larger fetches allocate theirs anew."""

    routes: Annotated[dict[str, str], NoDecode] = Field(default_factory=dict)
    """Addresses to dial instead of the advertised ones (port forwarding, link shaping): `advertised=dial,...`."""

    tls_ca: Path | None = None
    """PEM file of the authority behind the nodes' bulk ports. When given, KV bytes travel over TLS or not at all."""

    @property
    def encodings(self) -> tuple[str, ...]:
        """Every encoding that new chunks are stored in."""
        return _names(self.encoding)

    def accepts(self, name: str) -> bool:
        """Whether a fetch may use chunks in this encoding; False also for a name that means nothing."""
        if self.floor is None:
            return name in self.accept
        try:
            encoding = Encoding.parse(name)
        except UnknownEncodingError:
            return False
        if isinstance(encoding.rate, Rate):
            return encoding.rate.is_at_least(self.floor)
        return name in self.accept

    @field_validator("cache_dir", mode="before")
    @classmethod
    def _empty_is_unset(cls, value: object) -> object:
        return value or default_cache_dir()

    @field_validator("floor", "recompute_ratio", "disk_tier", "tls_ca", mode="before")
    @classmethod
    def _empty_is_none(cls, value: object) -> object:
        return None if value == "" else value

    @field_validator("cache_dir", "tls_ca")
    @classmethod
    def _expand_home(cls, value: Path | None) -> Path | None:
        return None if value is None else expanded(value)

    @field_validator("address")
    @classmethod
    def _without_scheme(cls, value: str) -> str:
        return value.removeprefix("tcp://")

    @field_validator("accept", mode="before")
    @classmethod
    def _split_names(cls, value: object, info: ValidationInfo) -> object:
        names = _names(value) if isinstance(value, str) else value
        if names in ((), []) and "encoding" in info.data:
            return tuple(dict.fromkeys((*_names(info.data["encoding"]), EXACT)))
        return names

    @field_validator("routes", mode="before")
    @classmethod
    def _split_routes(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        return dict(pair.strip().split("=", 1) for pair in value.split(",") if pair.strip())

    @field_validator("tenant_salt")
    @classmethod
    def _encodable(cls, value: SecretStr) -> SecretStr:
        # Not a UnicodeEncodeError: that one carries the whole text.
        if any("\ud800" <= character <= "\udfff" for character in value.get_secret_value()):
            raise ValueError("must be valid Unicode text")
        return value

    @field_validator("encoding")
    @classmethod
    def _known_encoding(cls, value: str) -> str:
        names = _names(value)
        if not names:
            raise ValueError("new chunks need an encoding to be stored in")
        for name in names:
            _require_encoding(name)
        return ",".join(names)

    @field_validator("accept")
    @classmethod
    def _known_encodings(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            _require_encoding(name)
        return value


def _names(value: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(part.strip() for part in value.split(",") if part.strip()))


def _require_encoding(name: str) -> None:
    try:
        Encoding.parse(name)
    except UnknownEncodingError as error:
        raise ValueError(str(error)) from error
