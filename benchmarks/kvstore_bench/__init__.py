"""Measuring equipment: `kvstore bench`, `kvstore demo` and `kvstore tune`. A package for each thing measured.

The service never imports it. Its commands and checks reach the command line by entry points (`pyproject.toml`)."""

from kvstore_bench.results import write_results

__all__ = ["write_results"]
