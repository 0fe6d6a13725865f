"""The enum of miss reasons is the only source of labels, and every member can occur."""

import ast
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

import kvstore_client
from kvstore_api.v1 import kvstore_pb2 as pb
from kvstore_client.canaries import FAILED, FINAL
from kvstore_client.miss_reason import MissReason
from kvstore_client.replicated_write import _REFUSALS, _STORED
from kvstore_codec.errors import CalibrationError, ChecksumError, SignatureError, UnsignedChunkError
from tests.client.miss_reasons_page import descriptions, miss_reasons_page

CLIENT = Path(kvstore_client.__file__).parent
CANARY = {*FAILED, *FINAL, "canary_pending", "canary_replaced"}
PAGE = Path(__file__).parents[2] / "docs" / "miss-reasons.md"


def nodes(*below: str) -> Iterator[ast.AST]:
    """Of the client's code, or of that `below` one of its folders, without the enum itself."""
    for path in sorted(CLIENT.joinpath(*below).rglob("*.py")):
        if path.name != "miss_reason.py":
            yield from ast.walk(ast.parse(path.read_text()))


def texts(*below: str) -> set[str]:
    """Every string in that code."""
    return {
        node.value for node in nodes(*below) if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }


def named() -> set[MissReason]:
    """Members that the code names."""
    return {
        MissReason[node.attr]
        for node in nodes()
        if isinstance(node, ast.Attribute)
        and ast.unparse(node.value) == "MissReason"
        and node.attr in MissReason.__members__
    }


def transfer_failures() -> set[str]:
    """Every `reason` that the transports give a TransferError, and what an OwnerWrite adds."""
    codes = {f"rpc_{code.name.lower()}" for code in grpc.StatusCode}
    return (texts("transport") & {str(reason) for reason in MissReason}) | codes | {"stalled"}


def bypasses() -> set[str]:
    """Every word that says why a call is passed through."""
    adapter = ("engines", "transformers")
    return {word for word in texts(*adapter) if f"bypass_{word}" in set(MissReason)} | {
        "argument_x", "mode_beam_search", *FINAL,
    }  # fmt: skip


def test_every_member_occurs() -> None:
    made = {
        *map(MissReason.of_fetch, transfer_failures()),
        *map(MissReason.of_store, transfer_failures()),
        *(MissReason.of_calibration(code.name) for code in grpc.StatusCode),
        *map(MissReason.of_bypass, bypasses()),
        *(MissReason.of_canary(why, storing=False) for why in ("unreachable", "canary_pending")),
        *(MissReason.of_canary(why, storing=True) for why in CANARY),
        *(MissReason.of_header(kind("")) for kind in (SignatureError, UnsignedChunkError, CalibrationError)),
        *(MissReason.of_frames(kind("")) for kind in (SignatureError, ChecksumError, CalibrationError)),
    }
    assert set(MissReason) - named() - made == set()


def test_no_reason_is_a_string() -> None:
    """Each `missed(...)` gets a member of the enum or a variable, which mypy has checked."""
    wrong = [
        ast.unparse(node)
        for node in nodes()
        if isinstance(node, ast.Call)
        and getattr(node.func, "attr", "") == "missed"
        and isinstance(node.args[0], ast.Constant | ast.JoinedStr | ast.BinOp)
    ]
    assert wrong == []


def test_every_member_says_what_happened() -> None:
    assert set(MissReason) - descriptions().keys() == set()
    assert [text for text in descriptions().values() if not text.endswith(".") or "|" in text] == []


def test_the_page_for_operators_is_up_to_date() -> None:
    assert PAGE.read_text() == miss_reasons_page()


def test_every_refusal_of_a_node_has_a_reason() -> None:
    mistakes = {pb.PUT_STATUS_UNSPECIFIED, pb.PUT_STATUS_REVOKED}  # of a node: nobody revoked anything
    assert set(pb.PutStatus.values()) == {*_REFUSALS, *_STORED, *mistakes}


@pytest.mark.parametrize("word", ["", "x", "argument_", "mode_", "rpc_data_loss", "Ä" * 1000])
def test_any_word_has_a_reason(word: str) -> None:
    """Whatever a transport or a model comes up with, the engine sees no exception, and labels stay few."""
    made = [
        MissReason.of_fetch(word),
        MissReason.of_store(word),
        MissReason.of_calibration(word),
        MissReason.of_bypass(word),
        MissReason.of_canary(word, storing=True),
        MissReason.of_canary(word, storing=False),
    ]
    assert all(isinstance(reason, MissReason) for reason in made)


def test_arguments_of_calls_make_no_labels() -> None:
    assert MissReason.of_bypass("argument_num_return_sequences") is MissReason.BYPASS_ARGUMENT
    assert MissReason.of_bypass("mode_beam_search") is MissReason.BYPASS_MODE
