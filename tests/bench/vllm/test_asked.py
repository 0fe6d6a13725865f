"""What the benchmarks of vLLM can be asked for."""

from pathlib import Path

import pytest

from kvstore_bench.models import model_folder
from kvstore_bench.vllm.links import DEFAULT_LINKS, link_name, parse_links
from kvstore_bench.vllm.options import Options
from kvstore_bench.vllm.policies import POLICIES, policies_named
from kvstore_bench.vllm.prompts import windows
from kvstore_codec.errors import ConfigurationError


def test_links_are_named_as_they_are_given() -> None:
    assert parse_links(DEFAULT_LINKS) == [None, 1e9, 200e6, 100e6, 50e6, 10e6]
    assert ",".join(map(link_name, parse_links(DEFAULT_LINKS))) == DEFAULT_LINKS


@pytest.mark.parametrize("text", ["", "fast", "100mbit,0mbit", "100mbit,100mbit"])
def test_other_links_are_refused(text: str) -> None:
    with pytest.raises(ConfigurationError):
        parse_links(text)


def test_everything_is_compared_with_cold() -> None:
    assert list(policies_named("adaptive,cold")) == ["cold", "adaptive"]
    assert list(policies_named(",".join(POLICIES))) == list(POLICIES)
    with pytest.raises(ConfigurationError, match="cold is what everything is compared with"):
        policies_named("adaptive")
    with pytest.raises(ConfigurationError, match="no policy 'warm'"):
        policies_named("cold,warm")


def test_no_prompt_is_the_beginning_of_another() -> None:
    prompts = windows(range(10_000), [2000, 4000], 3)
    every = [prompt for group in prompts.values() for prompt in group]
    assert [len(prompt.ids) for prompt in every] == [2000] * 3 + [4000] * 3
    assert len({prompt.ids[0] for prompt in every}) == 6
    with pytest.raises(ConfigurationError, match="too few"):
        windows(range(4005), [2000, 4000], 3)


def test_prompts_that_are_too_short_to_reuse_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="more than 256 tokens"):
        Options(Path("model"), "model", [None], [256], 1, 1, 1)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="nor a folder with a config"):
        model_folder(str(tmp_path))
