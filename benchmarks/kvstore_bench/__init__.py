"""Measurement: `kvstore bench`, `kvstore demo` and `kvstore tune`, with one package per benchmark.

The service never imports this package. Its commands and checks are registered as entry points (`pyproject.toml`)."""

from kvstore_bench.results import write_results

__all__ = ["write_results"]
