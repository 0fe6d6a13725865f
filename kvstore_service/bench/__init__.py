"""`kvstore bench`: measuring the service. A package for each thing measured, and what they share."""

from kvstore_service.bench.results import write_results

__all__ = ["write_results"]
