"""The rate at which reading and computing balance is found by measuring."""

import pytest

from kvstore_bench.reprefill.disks import BALANCES, balanced_rate, require_disks
from kvstore_bench.reprefill.systems import Asked
from kvstore_codec.errors import ConfigurationError

READ_BYTES, COMPUTING_S = 1e8, 0.3


def impress(rate: float | None) -> list[Asked]:
    """Reads and computes in turns; a read costs a little more than the disk's time."""
    waited_s = 0.1 if rate is None else 0.02 + READ_BYTES / rate
    return [Asked(COMPUTING_S + waited_s, int(READ_BYTES), waited_s=waited_s)] * 3


def test_impress_waits_for_the_balanced_disk() -> None:
    (asked, *_) = impress(balanced_rate(BALANCES["balanced"], impress))
    assert asked.waited_s / asked.ttft_s == pytest.approx(0.7, abs=0.025)


def test_an_even_disk_reads_for_as_long_as_the_model_computes() -> None:
    assert READ_BYTES / balanced_rate(BALANCES["even"], impress) == pytest.approx(COMPUTING_S)


def test_an_unknown_disk_is_refused() -> None:
    require_disks(["balanced", "hdd"])
    with pytest.raises(ConfigurationError, match="unthrottled, nvme"):
        require_disks(["tape"])
