"""Settings of a client, in groups, from arguments or `KVSTORE_*` environment variables."""

from kvstore_client.settings.client import ClientSettings, Setting, flat_name, settings_by_name
from kvstore_client.settings.encodings import EXACT, EncodingSettings
from kvstore_client.settings.fetch import FetchPolicy
from kvstore_client.settings.recompute import SelectorName
from kvstore_client.settings.reprefill import AUTO, Budget, parse_budget
from kvstore_client.settings.security import SecuritySettings, security_from_environment
from kvstore_client.settings.store import Durability

__all__ = [
    "AUTO",
    "EXACT",
    "Budget",
    "ClientSettings",
    "Durability",
    "EncodingSettings",
    "FetchPolicy",
    "SecuritySettings",
    "SelectorName",
    "Setting",
    "flat_name",
    "parse_budget",
    "security_from_environment",
    "settings_by_name",
]
