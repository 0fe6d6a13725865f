"""The connector's own settings: what is wrong is refused with its name."""

from typing import Any

import pytest

from kvstore_client.client import connect
from kvstore_client.engines.vllm.connector_settings import whole_number, with_defaults, yes_or_no
from kvstore_codec.errors import ConfigurationError


def test_settings_are_taken_out() -> None:
    given: dict[str, Any] = {"max_loads": "8", "require_canary": "false", "address": "a:1"}
    assert whole_number(given, "max_loads", 4) == 8
    assert whole_number(given, "max_load_bytes", 5) == 5
    assert yes_or_no(given, "require_canary", default=True) is False
    assert yes_or_no(given, "require_canary", default=True) is True
    assert given == {"address": "a:1"}


@pytest.mark.parametrize("value", ["many", None, 0, -1, True, [4], float("inf")])
def test_a_number_that_is_none_is_refused_by_name(value: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"max_loads is .*at least 1"):
        whole_number({"max_loads": value}, "max_loads", 4)


@pytest.mark.parametrize("value", ["perhaps", None, 2, []])
def test_neither_yes_nor_no_is_refused_by_name(value: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"require_canary is .*true or false"):
        yes_or_no({"require_canary": value}, "require_canary", default=False)


def test_defaults_of_the_connector_give_way_to_the_environment_and_to_the_configuration(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for variable in ("KVSTORE_CLOSE_TIMEOUT_S", "KVSTORE_DECODE_THREADS"):
        monkeypatch.delenv(variable, raising=False)
    defaults = with_defaults({"address": "store:7420"}, on_cpu=True)
    assert defaults["address"] == "store:7420"
    assert defaults["close_timeout_s"] < 5  # vLLM kills the process then
    assert 1 <= defaults["decode_threads"] <= 4
    assert defaults["store_idle_wait_s"] > 0 == with_defaults({}, on_cpu=False)["store_idle_wait_s"]
    monkeypatch.setenv("KVSTORE_CLOSE_TIMEOUT_S", "4.5")
    monkeypatch.setenv("KVSTORE_DECODE_THREADS", "7")
    with connect(**with_defaults({}, on_cpu=False)) as client:
        assert (client.settings.timeouts.close_s, client.settings.fetch.decode_threads) == (4.5, 7)
    assert with_defaults({"decode_threads": 2}, on_cpu=True)["decode_threads"] == 2
