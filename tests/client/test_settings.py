"""Users give settings by flat names; the code reads them in groups."""

import pickle
from pathlib import Path

import pytest

from kvstore_client import connect
from kvstore_client.settings import ClientSettings, settings_by_name
from kvstore_codec.errors import ConfigurationError
from tests.client.changed_settings import changed
from tests.client.settings_table import settings_page

# What existed before settings had groups. None of these names may go.
NAMES = [
    "address",
    "tenant_salt",
    "encoding",
    "accept",
    "floor",
    "recompute_selector",
    "recompute_ratio",
    "disk_tier",
    "recompute_floor",
    "recompute_drift",
    "lookup_timeout_s",
    "fetch_policy",
    "replan",
    "failover_s",
    "fetch_timeout_s",
    "stall_timeout_s",
    "put_timeout_s",
    "put_stall_timeout_s",
    "ttl_s",
    "put_durability",
    "tenant",
    "close_timeout_s",
    "store_backlog_bytes",
    "calibration_timeout_s",
    "cache_dir",
    "canary_timeout_s",
    "lease_s",
    "membership_ttl_s",
    "retry_after_s",
    "decode_threads",
    "inflight_bytes",
    "pool_bytes",
    "routes",
    "tls_ca",
]
NUMBERS = [name for name in NAMES if name.endswith(("_s", "_bytes", "_threads"))]


def test_the_names_that_users_give_stay() -> None:
    assert set(NAMES) <= settings_by_name().keys()


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_may_be_an_argument_or_a_variable(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = settings_by_name()[name]
    assert setting.of(ClientSettings(**{name: 77})) == 77
    monkeypatch.setenv(setting.variable, "78")
    assert setting.of(ClientSettings()) == 78
    assert setting.of(ClientSettings(**{name: 77})) == 77
    monkeypatch.delenv(setting.variable)
    monkeypatch.setenv(setting.variable.lower(), "79")
    assert setting.of(ClientSettings()) == 79


def test_groups_hold_what_is_given_by_flat_names() -> None:
    settings = ClientSettings(lookup_timeout_s=2, put_durability="memory", encoding="exact-raw")
    assert settings.timeouts.lookup_s == 2
    assert settings.store.durability == "memory"
    assert settings.encodings.stored == ("exact-raw",)


def test_settings_are_values() -> None:
    settings = ClientSettings(lookup_timeout_s=2, tenant_salt="salt")
    assert pickle.loads(pickle.dumps(settings)) == settings == changed(settings)  # noqa: S301
    assert changed(settings, ttl_s=5) != settings
    with pytest.raises(ValueError, match="frozen"):
        settings.timeouts.lookup_s = 3


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("lookup_timout_s", "did you mean lookup_timeout_s"),
        ("durabilty", "did you mean put_durability"),
        ("encodings", "did you mean encoding"),
        ("lookup_s", "did you mean lookup_timeout_s"),
        ("wheels", "known are address, tenant_salt, "),
    ],
)
def test_an_unknown_name_is_refused_with_names_that_are_near(name: str, near: str) -> None:
    for give in (connect, ClientSettings):
        with pytest.raises(ConfigurationError, match=f"there is no client setting {name}.*{near}"):
            give(**{name: 1})


@pytest.mark.parametrize("name", ["ttl_s", "lookup_timeout_s", "store_backlog_bytes", "recompute_ratio"])
def test_a_wrong_value_is_named_as_it_was_given(name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"settings: {name}: Input should be a valid") as refusal:
        connect(**{name: "soon"})
    assert "soon" not in str(refusal.value)


def test_the_page_about_settings_is_up_to_date() -> None:
    page = Path(__file__).parents[2] / "docs" / "settings.md"
    assert page.read_text() == settings_page()


def test_every_setting_is_described() -> None:
    assert [name for name, setting in settings_by_name().items() if not setting.info.description] == []


@pytest.mark.parametrize(
    ("given", "budget"), [(None, None), ("", None), ("auto", "auto"), ("0.05", 0.05), (1, 1.0)]
)
def test_a_budget_is_a_share_or_auto(given: object, budget: object) -> None:
    assert ClientSettings(budget=given).reprefill.budget == budget


@pytest.mark.parametrize("given", ["0", "1.5", "nan", "all", [0.5]])
def test_anything_else_is_no_budget(given: object) -> None:
    with pytest.raises(
        ConfigurationError, match=r"budget: .*a share above 0 and up to 1, such as .05, or 'auto'"
    ):
        connect(budget=given)
