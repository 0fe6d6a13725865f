"""Where a client sends traces."""

from pydantic import field_validator

from kvstore_client.otlp import check_endpoint
from kvstore_client.settings.group import SettingsGroup


class TracingSettings(SettingsGroup):
    """Traces of requests."""

    otlp_endpoint: str = ""
    """Collector that gets an OpenTelemetry trace of each request, `grpc://host:4317` or `http://host:4318`
    ([tracing.md](tracing.md)). Default: no traces."""

    @field_validator("otlp_endpoint")
    @classmethod
    def _is_an_endpoint(cls, value: str) -> str:
        return check_endpoint(value) if value else value
