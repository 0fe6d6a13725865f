"""A calibration file reaches a running cluster, and what cannot is said in one line."""

import json
from pathlib import Path

import pytest

from kvstore_codec.errors import CalibrationError, ConfigurationError, PublishError, ServiceError
from kvstore_service.calibration.publish import publish_calibration
from kvstore_service.cli.calibrate import calibrate
from kvstore_service.cli.calibrations import calibrations
from kvstore_service.models import DType
from tests.client.conftest import served_cluster
from tests.codec.chunks import make_calibration, make_spec


def test_a_file_becomes_the_newest_of_its_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calibration = make_calibration(make_spec())
    file = tmp_path / "made.kvcal"
    file.write_bytes(calibration.to_bytes())
    with served_cluster(tmp_path) as cluster:
        calibrations(cluster.address, publish=file, json_output=True)
        (row,) = json.loads(capsys.readouterr().out)["calibrations"]
    assert row["digest"] == calibration.digest.hex()
    assert row["model_digest"] == calibration.model_digest.hex()


def test_what_is_no_calibration_is_refused_before_the_cluster_is_asked(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"cannot read the calibration .*missing"):
        calibrations("127.0.0.1:1", publish=tmp_path / "missing")
    (tmp_path / "text").write_text("not a calibration")
    with pytest.raises(CalibrationError, match="text: these bytes are not a calibration"):
        calibrations("127.0.0.1:1", publish=tmp_path / "text")


def test_a_cluster_that_is_away_is_noticed_before_the_work(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("some text")
    with pytest.raises(ServiceError, match=r"no cluster answers at 127\.0\.0\.1:1"):
        calibrate("smollm2", [text], tmp_path, dtype=DType.FLOAT32, publish="127.0.0.1:1")
    with pytest.raises(PublishError, match=r"not accepted by 127\.0\.0\.1:1: UNAVAILABLE"):
        publish_calibration(make_calibration(make_spec()), "127.0.0.1:1")
