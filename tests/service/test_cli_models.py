"""`kvstore models`: which canaries a cluster keeps, who was refused, and dropping one."""

import json

import pytest
from typer.testing import CliRunner

from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_api.v1 import kvstore_pb2_grpc as rpc
from kvstore_codec.errors import ConfigurationError, KVStoreError, ServiceError
from kvstore_service.cli.app import app
from tests.cluster.canaries.test_registry import MODEL, OTHER, sketch
from tests.service.test_grpc_canaries import origin, put, stub

__all__ = ["stub"]


@pytest.fixture
def address(stub: rpc.CoordinatorStub) -> str:
    put(stub, 1, "maker")
    stub.PutCanary(
        pb.PutCanaryRequest(model_digest=OTHER, origin=origin("elsewhere"), sketch=sketch(1, OTHER))
    )
    stub.ReportRefusal(
        pb.ReportRefusalRequest(
            model_digest=MODEL, origin=origin("refused"), message="keys of layer 3 differ"
        )
    )
    return stub.address


def run(address: str, *arguments: str, status: int = 0, stdin: str | None = None) -> str:
    result = CliRunner().invoke(app, ["models", *arguments, "--address", address], input=stdin)
    if isinstance(result.exception, KVStoreError):
        raise result.exception
    assert result.exit_code == status, result.output
    return result.output


def test_the_table_names_both_sides(address: str) -> None:
    shown = run(address)
    assert MODEL.hex()[:12] in shown
    (note,) = [line for line in shown.splitlines() if "refused refused" in line]
    assert "keys of layer 3 differ" in note
    assert "made by maker (pid 3, cpu, torch)" in note


def test_a_worker_cannot_speak_to_the_terminal(
    stub: rpc.CoordinatorStub, caplog: pytest.LogCaptureFixture
) -> None:
    escape = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e"
    named = pb.Origin(model_id=f"m{escape}", host=f"h{escape}", pid=3, software=f"s{escape}", device="cpu")
    with caplog.at_level("INFO"):
        stub.PutCanary(pb.PutCanaryRequest(model_digest=MODEL, origin=named, sketch=sketch()))
    stub.ReportRefusal(pb.ReportRefusalRequest(model_digest=MODEL, origin=named, message=f"why{escape}"))
    asked = run(stub.address, "replace", MODEL.hex()[:6], stdin="n\n", status=1)
    for text in (run(stub.address), asked, run(stub.address, "--json"), caplog.text):
        assert "owned" in text
        assert not set(text) & set(escape) - set("]0;owned[2J31m")
        assert "\\x1b]0;owned" in text or "\\u001b]0;owned" in text


def test_json_has_everything(address: str) -> None:
    first, second = sorted(
        json.loads(run(address, "--json"))["models"], key=lambda model: model["model_digest"]
    )
    assert (first["model_digest"], second["model_digest"]) == (MODEL.hex(), OTHER.hex())
    assert first["origin"]["host"] == "maker"
    assert first["canary_bytes"] == len(sketch())
    (refusal,) = first["refusals"]
    assert (refusal["origin"]["host"], refusal["times"]) == ("refused", 1)


def test_one_is_replaced_after_a_question(address: str, stub: rpc.CoordinatorStub) -> None:
    def replaced() -> int:
        return json.loads(run(address, "replace", MODEL.hex(), "--yes", "--json"))["generation"]

    assert "Aborted" in run(address, "replace", MODEL.hex()[:6], stdin="n\n", status=1)
    assert "generation 1" in run(address, "replace", MODEL.hex()[:6], stdin="y\n")
    assert replaced() == 1, "none was made since"
    put(stub, 2, "maker", generation=1)
    assert replaced() == 2
    assert "to be made" in run(address)


def test_a_cluster_without_models_is_told(stub: rpc.CoordinatorStub) -> None:
    with pytest.raises(ServiceError, match=r"'00': the cluster has no models$"):
        run(stub.address, "replace", "00", "--yes")


def test_a_digest_that_is_not_hexadecimal_is_refused_before_connecting() -> None:
    with pytest.raises(ConfigurationError, match=r"'0g' is not .* hexadecimal digits"):
        run("127.0.0.1:1", "replace", "0g", "--yes")


def test_a_size_that_is_none_is_refused_before_connecting() -> None:
    result = CliRunner().invoke(app, ["quota", "blue", "much", "--address", "127.0.0.1:1"])
    assert isinstance(result.exception, ConfigurationError)
    assert "not a size" in str(result.exception)


@pytest.mark.parametrize("digest", ["ff", ""])
def test_a_digest_that_names_no_model_is_one_clear_error(address: str, digest: str) -> None:
    with pytest.raises(ServiceError, match=MODEL.hex()[:12]):
        run(address, "replace", digest, "--yes")
