"""Settings of the service. CLI flags take precedence over KVSTORE_* variables, these over the --config file, and the
file over defaults. An empty value counts as not set, whatever its source.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import (
    BaseModel,
    ByteSize,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

from kvstore_api.address import DEFAULT_ADDRESS
from kvstore_api.environment import FORMER_DURABILITY, under_new_name, without_service_links
from kvstore_client.logs import LogFormat, LogLevel
from kvstore_client.otlp import check_endpoint
from kvstore_cluster.arena import DEFAULT_BLOCK_BYTES
from kvstore_cluster.eviction import DEFAULT_POLICY, POLICIES
from kvstore_cluster.tallies import MOST_TENANTS
from kvstore_codec.errors import ConfigurationError
from kvstore_service.config_file import read_config, shortened
from kvstore_service.listen import Address

PREFIX = "KVSTORE_"
_MAX_CHARACTERS = 4096
"""Most characters of a value: the longest path that Linux accepts."""
_MAX_PROBLEMS = 8
"""Most problems that one error text names."""
_MOST_BYTES = 1 << 60  # of a storage node, far more than any machine has


def _setting(default: Any, says: str, *, unset: str = "none", **bounds: Any) -> Any:
    """A setting. `says` is its help text; `unset` is the default shown in the help if the setting has none."""
    return Field(default=default, description=says, json_schema_extra={"unset": unset}, **bounds)


class Settings(BaseModel):
    """Settings of `kvstore serve`. This class declares its options, its environment variables, the fields of its file,
    and the arguments of the processes that it starts. Sizes are bytes, or text such as "4GiB". `~` in a path is the
    user's home folder."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    nodes: int = _setting(1, "Storage nodes on this machine.", le=256)
    memory: ByteSize = _setting(ByteSize(1 << 30), "DRAM of each storage node, such as 4GiB.", le=_MOST_BYTES)
    listen: str = _setting(
        DEFAULT_ADDRESS,
        "host:port of the coordinator; port 0 selects a free port. Storage nodes use free ports on the same host, "
        "unless --ray-address or --storage-port says otherwise.",
    )
    data_dir: Path | None = _setting(
        None, "Folder for the catalogue and the nodes' disks.", unset="a temporary one"
    )
    disk: ByteSize = _setting(
        ByteSize(0), "Disk of each storage node, such as 100GiB, below --data-dir.", le=_MOST_BYTES
    )
    durability: Literal["memory", "relaxed", "durable"] = _setting(
        "relaxed",
        "Durability of puts that do not set one: memory (written to disk later), relaxed (written before the "
        "acknowledgement) or durable (synced before it). Without a disk it is memory.",
    )
    policy: str = _setting(DEFAULT_POLICY, "Eviction policy: value, lru or s3-fifo.")
    replicas: int | None = _setting(
        None, "Number of nodes that store each chunk.", unset="1, or 2 on a Ray cluster", ge=1, le=256
    )
    redis: SecretStr | None = _setting(
        None, "redis://... URL of the server that stores the catalogue.", unset="a file in --data-dir"
    )
    ray_address: str | None = _setting(
        None,
        "Address of a Ray cluster to run on, with one storage node on each of its nodes that offers a CPU.",
        unset="a local one",
    )
    ray_join: bool = _setting(
        False,  # noqa: FBT003
        "Start a Ray node without CPUs of --ray-address on this machine. Ray needs one where this command runs.",
    )
    keep_nodes: bool = _setting(
        False,  # noqa: FBT003
        "Leave the storage nodes of --ray-address running when this process ends, and take over those that run.",
    )
    storage_port: int | None = _setting(
        None,
        "Port of the storage node on each node of --ray-address; the next one is its bulk port.",
        unset="free ports",
        ge=1,
        le=65534,
    )
    repair_bandwidth: ByteSize = _setting(
        ByteSize(100 << 20),
        "Most bytes per second that each node copies to others after a loss or a join.",
        gt=0,
        le=_MOST_BYTES,
    )
    credentials: Path | None = _setting(
        None,
        "File of `kvstore credentials`: callers must show one of them, and chunks of different tenants are kept apart.",
        unset="everybody may call",
    )
    node_token_file: Path | None = _setting(
        None,
        "File with the token by which the processes of the cluster call one another, as "
        "`kvstore credentials add nodes --tenant '*' --scope node` prints it.",
        unset="a new token at each start",
    )
    tls_cert: Path | None = _setting(None, "PEM certificate chain of every port.", unset="plain TCP")
    tls_key: Path | None = _setting(None, "PEM key of --tls-cert.")
    tls_ca: Path | None = _setting(
        None,
        "PEM certificates of the authorities that signed --tls-cert, by which the nodes know one another.",
        unset="--tls-cert itself",
    )
    tls_client_ca: Path | None = _setting(
        None,
        "PEM certificates of authorities; clients must then present a certificate of one of them. The nodes present "
        "--tls-cert.",
    )
    tls_name: str | None = _setting(
        None, "Name in --tls-cert, if it is not the host of each node's address.", unset="that host"
    )
    encryption_key_file: Path | None = _setting(
        None,
        "File with the keys that encrypt the nodes' disks and the catalogue file, one a line, such as "
        "`openssl rand -hex 32` prints. The first one encrypts, all of them decrypt.",
        unset="files are not encrypted",
    )
    insecure: bool = _setting(
        False,  # noqa: FBT003
        "Allow an address other than this machine's loopback without --credentials and TLS.",
    )
    metrics_port: int | None = _setting(None, "Port for Prometheus, on the same host.", ge=1, le=65535)
    events: str | None = _setting(
        None,
        "host:port at which routers subscribe to KV events; the next port answers requests for missed ones.",
        unset="no events are published",
    )
    otlp_endpoint: str | None = _setting(
        None,
        "Collector of OpenTelemetry traces of the nodes, grpc://host:4317 or http://host:4318.",
        unset="no traces",
    )
    log_format: LogFormat = _setting(
        LogFormat.TEXT,
        "How log lines of all processes are written to stderr: text, or json, one object a line.",
    )
    log_level: LogLevel = _setting(
        LogLevel.WARNING, "Least important log lines that are written: debug, info, warning or error."
    )
    metrics_tenants: int = _setting(
        0,
        "Tenants whose metrics are exported one by one; the others are added up. 0: no metrics of tenants.",
        ge=0,
        le=MOST_TENANTS,
    )
    experiments: bool = _setting(
        False,  # noqa: FBT003
        "Allow `kvstore throttle` to limit how fast the nodes send and read.",
    )

    @field_validator("*", mode="before")
    @classmethod
    def _is_plain(cls, value: object, info: ValidationInfo) -> object:
        if isinstance(value, bool) and not _is_switch(info.field_name):  # a bool is an int in Python
            raise ValueError("write a number or text, not true or false")
        if isinstance(value, str) and len(value) > _MAX_CHARACTERS:
            raise ValueError(f"has {len(value)} characters; at most {_MAX_CHARACTERS}")
        if isinstance(value, str) and not _is_encodable(value):
            raise ValueError("contains half of a surrogate pair, which is not valid text")
        return value

    @field_validator("*")
    @classmethod
    def _is_whole_path(cls, value: object) -> object:
        if not isinstance(value, Path):
            return value
        if "\0" in str(value):
            raise ValueError("a path has no NUL character")
        try:
            return value.expanduser()
        except RuntimeError as error:
            raise ValueError(
                "it begins with ~, but this user has no home folder; write the whole path"
            ) from error

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.disk and self.data_dir is None:
            raise ValueError("disk needs data_dir, a folder that stores it across restarts")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key must be given together")
        if self.tls_cert is None and (self.tls_ca or self.tls_client_ca or self.tls_name):
            raise ValueError("tls_ca, tls_client_ca and tls_name need tls_cert and tls_key")
        if self.ray_address is None and (self.ray_join or self.keep_nodes or self.storage_port):
            raise ValueError("ray_join, keep_nodes and storage_port need ray_address")
        if self.node_token_file and not self.credentials:
            raise ValueError("node_token_file needs credentials")
        if self.ray_join and ":" not in (self.ray_address or ""):
            raise ValueError("ray_join needs ray_address as host:port")
        if self.keep_nodes and self.credentials is not None and self.node_token_file is None:
            raise ValueError(
                "with credentials, keep_nodes needs node_token_file: a token that the next start has, too"
            )
        return self

    @field_validator("nodes")
    @classmethod
    def _is_a_cluster(cls, value: int) -> int:
        if value < 1:
            raise ValueError("a cluster needs at least one storage node")
        return value

    @field_validator("memory")
    @classmethod
    def _holds_a_block(cls, value: ByteSize) -> ByteSize:
        if value < DEFAULT_BLOCK_BYTES:
            raise ValueError(f"a storage node needs {DEFAULT_BLOCK_BYTES} bytes or more; raise --memory")
        return value

    @field_validator("policy")
    @classmethod
    def _is_a_policy(cls, value: str) -> str:
        if value not in POLICIES:
            raise ValueError(f"known policies are {', '.join(POLICIES)}")
        return value

    @field_validator("otlp_endpoint")
    @classmethod
    def _is_a_collector(cls, value: str | None) -> str | None:
        return None if value is None else check_endpoint(value)

    @field_validator("listen", "events")
    @classmethod
    def _is_an_address(cls, value: str | None) -> str | None:
        try:
            return None if value is None else str(Address.parse(value))
        except ConfigurationError as error:
            raise ValueError(str(error)) from error


@dataclass(frozen=True, slots=True)
class EffectiveSetting:
    """A setting in effect. `value` is text, and hidden if it is a secret; `source` is a flag, a variable, the file, or
    "default"."""

    name: str
    value: str
    source: str


def _is_encodable(text: str) -> bool:
    """Whether the operating system can represent the text as a path or an argument. File names need not be UTF-8."""
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return False
    return True


def _is_switch(name: str | None) -> bool:
    return name is not None and Settings.model_fields[name].annotation is bool


def shown_default(field: FieldInfo) -> str:
    """The default of a setting, as the help shows it."""
    if not field.default and isinstance(field.json_schema_extra, dict):
        return str(field.json_schema_extra["unset"])
    return (
        _shown(field.default).replace(".0", "") if isinstance(field.default, ByteSize) else str(field.default)
    )


def variable(name: str) -> str:
    """The name of a setting's environment variable."""
    return PREFIX + ("NODE_DURABILITY" if name == "durability" else name.upper())


def port_variable() -> str | None:
    """A sentence if KVSTORE_PORT is a plain number, which somebody set by mistake. Kubernetes sets tcp://..."""
    value = os.environ.get(PREFIX + "PORT", "")
    return f"KVSTORE_PORT={value} is not a setting; use KVSTORE_LISTEN" if value.strip().isdecimal() else None


def load_settings(config: Path | None = None, **flags: object) -> Settings:
    """Loads the settings of the service. `config` is a .yaml, .yml or .toml file. A flag that is None or empty counts
    as not given.

    Raises ConfigurationError, whose text names wrong or unknown settings and their sources.
    """
    return _load(config, flags)[0]


def settings_of(**values: object) -> Settings:
    """Settings of a cluster that a program starts. It listens on a free port unless `values` name one. Environment
    variables and files are ignored. Raises ConfigurationError like `load_settings`."""
    return _validated({"listen": "127.0.0.1:0"} | values, {})


def effective_settings(config: Path | None = None, **flags: object) -> list[EffectiveSetting]:
    """The settings that `load_settings` returns, each with its source. Raises ConfigurationError like
    `load_settings`."""
    settings, sources = _load(config, flags)
    return [
        EffectiveSetting(name, _shown(getattr(settings, name)), sources.get(name, "default"))
        for name in Settings.model_fields
    ]


def _load(config: Path | None, flags: Mapping[str, object]) -> tuple[Settings, dict[str, str]]:
    """The settings, and the source of each one that is not a default."""
    values: dict[str, object] = {}
    sources: dict[str, str] = {}
    for given, name_source in (
        ({} if config is None else read_config(config), lambda _: str(config)),
        (_environment(), variable),
        (flags, _option),
    ):
        present = {name: value for name, value in given.items() if not _is_empty(value)}
        values |= present
        sources |= {name: name_source(name) for name in present}
    return _validated(values, sources), sources


def _validated(values: Mapping[str, object], sources: Mapping[str, str]) -> Settings:
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        problems = [_describe(problem, sources) for problem in error.errors()]
        more = f"; and {len(problems) - _MAX_PROBLEMS} more" if len(problems) > _MAX_PROBLEMS else ""
        raise ConfigurationError(
            f"cannot use these settings: {'; '.join(problems[:_MAX_PROBLEMS])}{more}"
        ) from None  # the cause quotes values, including secrets


def _environment() -> dict[str, str | None]:
    """Settings by name, from environment variables. The case of their names is ignored."""
    names = {variable(name).lower(): name for name in Settings.model_fields}
    given: dict[str, str | None] = {name.lower(): value for name, value in os.environ.items()}
    if given.get(FORMER_DURABILITY) == "default":  # only clients accept this value
        del given[FORMER_DURABILITY]
    given = under_new_name(given, FORMER_DURABILITY, variable("durability").lower())
    variables = {name: value for name, value in given.items() if name in names}
    return {names[name]: value for name, value in without_service_links(variables, names).items()}


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _is_empty(value: object) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _describe(problem: Any, sources: Mapping[str, str]) -> str:
    if not problem["loc"]:  # a problem of several settings together
        return str(problem["msg"])
    name = str(problem["loc"][0])
    source = f" (from {sources[name]})" if name in sources else ""
    if problem["type"] == "extra_forbidden":
        return f"there is no setting {shortened(name)!r}; known settings: {', '.join(Settings.model_fields)}{source}"
    if problem["type"] in ("byte_size", "byte_size_unit"):
        kind, example = (
            ("a rate in bytes per second", "100MiB") if name.endswith("bandwidth") else ("a size", "4GiB")
        )
        given = shortened(repr(problem["input"]))
        advice = f"write for example {example}"
        if sources.get(name) in (_option(name), variable(name)):
            return f"{sources[name]}: {given} is not {kind}; {advice}"
        return f"{name} = {given}: not {kind}; {advice}{source}"
    secret = Settings.model_fields[name].annotation == SecretStr | None
    value = "..." if secret else shortened(_as_given(problem["input"]))
    return f"{name} = {value}: {shortened(problem['msg'], 300)}{source}"


def _as_given(value: object) -> str:
    """The value for an error text. Numbers are not quoted, whether given as number or text; other text is quoted."""
    is_number = isinstance(value, str) and value.removeprefix("-").isdecimal()
    return str(value) if is_number else repr(value)


def _shown(value: object) -> str:
    match value:
        case None:
            return "not set"
        case SecretStr():
            return "hidden"
        case ByteSize():
            return value.human_readable()
        case _:
            return str(value)
