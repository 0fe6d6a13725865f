"""The costs of a model on this machine: measured at its first use, then kept on disk."""

from transformers import PreTrainedModel

from kvstore_client.client import KVStoreClient
from kvstore_client.engines.transformers.profile import profile_of
from kvstore_client.planning import Costs, ProfileStore
from kvstore_client.settings import EncodingSettings, FetchPolicy
from kvstore_codec.encoding import Encoding, Rate
from kvstore_codec.model_spec import ModelSpec


def costs_of(model: PreTrainedModel, spec: ModelSpec, client: KVStoreClient) -> Costs | None:
    """The model's costs; None for the fetch policy `fixed`. The first call on a machine measures for seconds."""
    settings = client.settings
    if settings.fetch.policy is FetchPolicy.FIXED:
        return None
    names = _likely(settings.encodings)
    klt = None
    if any(Encoding.parse(name).needs_calibration for name in names):
        klt = client.prepare(spec).result()  # bounded by the settings' timeouts
    store = ProfileStore(settings.cache_dir)
    return Costs(profile_of(model, spec, names, klt, store, decode_threads=settings.fetch.decoders))


def _likely(encodings: EncodingSettings) -> list[str]:
    """Encodings that fetches are likely to meet. The costs of others are estimated from these, and learned."""
    names = [*encodings.stored, *encodings.accept]
    if encodings.floor is not None:
        names += [f"{rate}-klt-pco" for rate in Rate if rate is not Rate.EXACT]
    return [name for name in dict.fromkeys(names) if encodings.accepts(name)]
