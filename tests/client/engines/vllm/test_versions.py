"""Releases of vLLM are known by name; others are refused."""

import pytest

from kvstore_client.engines.vllm.versions import supported_version
from kvstore_codec.errors import UnsupportedEngineError


@pytest.mark.parametrize(
    ("version", "series", "names_hit_sources"),
    [
        ("0.30.0", "0.30", False),
        ("0.31.2", "0.31", False),
        ("0.32.0+cpu", "0.32", True),
        ("0.33.0rc1", "0.33", True),
    ],
)
def test_supported_releases(version: str, series: str, names_hit_sources: bool) -> None:
    found = supported_version(version)
    assert (found.series, found.names_hit_sources) == (series, names_hit_sources)


@pytest.mark.parametrize("version", ["0.29.1", "0.34.0", "0.3", "0.300.0", "10.30.0", "dev", ""])
def test_other_releases_are_refused(version: str) -> None:
    with pytest.raises(UnsupportedEngineError, match=r"supported releases are 0\.30, 0\.31, 0\.32, 0\.33"):
        supported_version(version)
