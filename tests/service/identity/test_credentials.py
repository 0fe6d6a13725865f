"""Tokens, what is kept of them, and when they are valid."""

import dataclasses
import fcntl
import json
import os
import stat
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore_client.file_stamp import stamp_of
from kvstore_codec.errors import ConfigurationError, PermissionDeniedError, UnauthenticatedError
from kvstore_service.identity import Caller, Credential, CredentialFile, Credentials, Scope, new_token
from kvstore_service.identity.credential import new_id, token_digest
from kvstore_service.identity.document import read_document, write_document
from kvstore_service.identity.file import changing, read_credentials
from tests.clock import Clock

DATA = frozenset({Scope.DATA})


def made(name: str = "worker", tenant: str | None = "acme", **fields: object) -> tuple[Credential, str]:
    """A credential and its token."""
    made_id, token = new_token()
    given = {"scopes": DATA, "token_digest": token_digest(token)} | fields
    return Credential(made_id, name, tenant, **given), token  # type: ignore[arg-type]


def test_a_token_gives_its_caller() -> None:
    credential, token = made(scopes=frozenset({Scope.DATA, Scope.ADMIN}))
    caller = Credentials([made()[0], credential]).of_token(token)
    assert (caller.name, caller.tenant, caller.scopes) == ("worker", "acme", {Scope.DATA, Scope.ADMIN})


def test_several_tokens_of_one_caller_are_valid_at_once() -> None:
    (first, first_token), (second, second_token) = made(), made()
    known = Credentials([first, second])
    callers = known.of_token(first_token), known.of_token(second_token)
    assert {caller.name for caller in callers} == {"worker"}
    assert len(set(callers)) == 2


def test_a_caller_is_confirmed_while_its_credential_is_valid() -> None:
    clock = Clock()
    credential, token = made(expires_unix_s=clock() + 10)
    caller = Credentials([credential], clock).of_token(token)
    narrowed = dataclasses.replace(credential, tenant="other")
    assert Credentials([narrowed], clock).confirm(caller).tenant == "other"
    with pytest.raises(UnauthenticatedError, match="was revoked"):
        Credentials([made()[0]], clock).confirm(caller)
    clock.now_s += 10
    with pytest.raises(UnauthenticatedError, match="has expired"):
        Credentials([credential], clock).confirm(caller)


@pytest.mark.parametrize("proof", ["token_digest", "subject"])
def test_a_caller_is_not_confirmed_by_what_another_one_has_shown(proof: str) -> None:
    """Although the credential that replaced it in the file has its id."""
    credential = made()[0]
    if proof == "subject":
        credential = dataclasses.replace(credential, token_digest=None, subject="a.example")
    successor = {"token_digest": token_digest("other"), "subject": "b.example"}[proof]
    caller = credential.caller
    assert Credentials([credential]).confirm(caller) == caller
    with pytest.raises(UnauthenticatedError, match="was revoked"):
        Credentials([dataclasses.replace(credential, **{proof: successor})]).confirm(caller)


@pytest.mark.parametrize(
    ("own", "asked", "acts_for"),
    [("a", "", "a"), ("a", "a", "a"), ("", "", ""), (None, "", ""), (None, "b", "b")],
)
def test_a_caller_acts_for_its_tenant(own: str | None, asked: str, acts_for: str) -> None:
    assert Caller("", "worker", own, DATA).acting_for(asked) == acts_for


@pytest.mark.parametrize("own", ["a", ""])
def test_a_caller_cannot_act_for_another_tenant(own: str) -> None:
    with pytest.raises(PermissionDeniedError, match="another tenant than the credential of worker"):
        Caller("", "worker", own, DATA).acting_for("b")


@pytest.mark.parametrize("change", ["secret", "id", "nothing", "kind", "long", "other"])
def test_a_wrong_token_is_refused_with_one_answer(change: str) -> None:
    credential, token = made()
    kind, made_id, secret = token.split("_")
    wrong = {
        "secret": f"{kind}_{made_id}_{'0' * len(secret)}",
        "id": f"{kind}_{new_id()}_{secret}",
        "nothing": "",
        "kind": f"x_{made_id}_{secret}",
        "long": token + "0" * 1000,
        "other": made()[1],
    }[change]
    with pytest.raises(UnauthenticatedError) as refusal:
        Credentials([credential]).of_token(wrong)
    assert str(refusal.value).startswith("the credential is not valid here")
    assert not wrong or wrong not in str(refusal.value)


@given(st.text(max_size=300))
def test_no_text_is_a_token(text: str) -> None:
    with pytest.raises(UnauthenticatedError):
        Credentials([made()[0]]).of_token(text)


def test_an_expired_token_says_so_only_to_who_has_it() -> None:
    clock = Clock()
    credential, token = made(expires_unix_s=clock() + 10)
    known = Credentials([credential], clock)
    assert known.of_token(token).name == "worker"
    clock.now_s += 10
    with pytest.raises(UnauthenticatedError, match="of worker has expired"):
        known.of_token(token)
    with pytest.raises(UnauthenticatedError, match="not valid here"):
        known.of_token(token[:-1] + ("0" if token[-1] != "0" else "1"))


def test_a_certificate_gives_the_caller_of_its_first_known_name() -> None:
    known = Credentials([Credential(new_id(), "w", "acme", DATA, subject="w.acme.example")])
    assert known.of_certificate(["other", "w.acme.example"]).tenant == "acme"
    with pytest.raises(UnauthenticatedError, match="no credential names the subject"):
        known.of_certificate(["other"])
    assert known.have_subjects
    assert not Credentials([made()[0]]).have_subjects


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"name": "a b"}, "name of a credential"),
        ({"name": ""}, "name of a credential"),
        ({"tenant": "*"}, "name of a tenant"),
        ({"tenant": "x" * 256}, "name of a tenant"),
        ({"tenant": "a\nb"}, "name of a tenant"),
        ({"scopes": frozenset()}, "needs a scope: data, admin, node"),
        ({"scopes": frozenset({Scope.NODE})}, "serves every tenant"),
        ({"scopes": frozenset({Scope.METRICS})}, "scope metrics serves every tenant"),
        ({"token_digest": None}, "a token or the subject"),
        ({"subject": "x"}, "a token or the subject"),
        ({"token_digest": b"short"}, "64 hexadecimal digits"),
    ],
)
def test_credentials_that_cannot_be_meant_are_refused(fields: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        made(**fields)  # type: ignore[arg-type]


def test_a_document_keeps_everything_but_the_token() -> None:
    plain, token = made()
    credentials = [
        plain,
        made("ops", None, scopes=frozenset({Scope.ADMIN}), created_unix_s=1e9, expires_unix_s=2e9)[0],
        Credential(new_id(), "w", "", DATA, subject="CN of w"),
    ]
    text = write_document(credentials)
    assert read_document(text) == credentials
    assert token not in text
    assert token.split("_")[2] not in text


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"expire": "2026-01-01T00:00:00Z"}, "credential 1 must have the fields"),
        ({"expires": "soon"}, "times are written"),
        ({"expires": "2026-01-01T00:00:00"}, "times are written"),
        ({"expires": 5}, "texts"),
        ({"scopes": "data"}, "list of texts"),
        ({"scopes": ["root"]}, "scopes are data, admin, node"),
        ({"token_sha256": "xyz"}, "in hexadecimal digits"),
        ({"id": "../etc"}, "id of a credential"),
    ],
)
def test_a_wrong_entry_is_named_and_not_quoted(change: dict[str, object], says: str) -> None:
    document = json.loads(write_document([made()[0]]))
    document["credentials"][0].update(change)
    with pytest.raises(ConfigurationError, match=says) as refusal:
        read_document(json.dumps(document))
    assert document["credentials"][0]["token_sha256"] not in str(refusal.value)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format": "kvstore-credentials", "version": 2}', "[" * 100_000]
)
def test_other_text_is_no_document(text: str) -> None:
    with pytest.raises(ConfigurationError):
        read_document(text)


def test_two_credentials_share_neither_id_nor_subject() -> None:
    one = made()[0]
    with pytest.raises(ConfigurationError, match="same id"):
        Credentials([one, one])
    with pytest.raises(ConfigurationError, match="same subject"):
        Credentials([Credential(new_id(), name, "", DATA, subject="x") for name in ("a", "b")])


def test_a_changed_file_takes_effect(tmp_path: Path) -> None:
    path = tmp_path / "made" / "credentials.json"
    first, first_token = made()
    with changing(path) as known:
        known.append(first)
    assert path.stat().st_mode & 0o777 == 0o600
    file = CredentialFile(path)
    second, second_token = made()
    with changing(path) as known:
        known.append(second)
        known.remove(first)
    assert file.current.of_token(first_token).name == "worker"  # not looked at yet
    file.refresh()
    assert file.current.of_token(second_token).name == "worker"
    assert file.changes == 1
    with pytest.raises(UnauthenticatedError):
        file.current.of_token(first_token)
    assert os.listdir(path.parent) == [path.name]  # noqa: PTH208


def test_a_running_service_looks_for_changes_by_itself(tmp_path: Path) -> None:
    path = tmp_path / "credentials.json"
    with changing(path):
        pass
    file = CredentialFile(path)
    file.start()
    try:
        with changing(path) as known:
            known.append(made()[0])
        deadline_s = time.monotonic() + 30
        while not file.changes:
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
    finally:
        file.stop()


@pytest.mark.parametrize("harm", ["missing", "wrong"])
def test_a_file_that_becomes_unusable_leaves_the_last_good_content(
    tmp_path: Path, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "credentials.json"
    credential, token = made()
    with changing(path) as known:
        known.append(credential)
    text = path.read_text()
    file = CredentialFile(path)
    path.unlink() if harm == "missing" else path.write_text("{")
    for _ in range(3):
        file.refresh()
        assert file.current.of_token(token).name == "worker"
    assert len(caplog.records) == 1
    path.write_text(text.replace("acme", "other"))
    file.refresh()
    assert file.current.of_token(token).tenant == "other"


def test_who_cannot_read_the_file_cannot_keep_others_from_changing_it(tmp_path: Path) -> None:
    """Its folder may be open to everybody, and anybody who opens a folder can lock that."""
    path = tmp_path / "credentials.json"
    folder_fd = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(folder_fd, fcntl.LOCK_EX)
        changed = threading.Thread(target=_add, args=(path, "worker"), daemon=True)
        changed.start()
        changed.join(30)
        assert [one.name for one in read_credentials(path)] == ["worker"]
    finally:
        os.close(folder_fd)


def test_changes_at_once_are_all_kept(tmp_path: Path) -> None:
    """Also that of the process that makes the file, and those that waited for a file that was replaced."""
    path = tmp_path / "credentials.json"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: _add(path, f"worker-{number}"), range(32)))
    assert len(read_credentials(path)) == 32
    assert os.listdir(tmp_path) == [path.name]  # noqa: PTH208


def _add(path: Path, name: str) -> None:
    with changing(path) as known:
        known.append(made(name)[0])


def test_a_change_that_fails_leaves_the_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "credentials.json"
    with changing(path) as known:
        known.append(made()[0])
    before = path.read_bytes()
    with pytest.raises(ConfigurationError, match="same id"), changing(path) as known:
        known.append(known[0])
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [b"\xff\xfe", b"{", None])
def test_a_service_does_not_start_with_an_unusable_file(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "credentials.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigurationError, match=f"cannot use the credentials in {path}"):
        CredentialFile(path)
    with pytest.raises(ConfigurationError):
        read_credentials(path)


def test_a_changed_file_stays_readable_for_whom_it_was(tmp_path: Path) -> None:
    file = tmp_path / "credentials.json"
    with changing(file):
        pass
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    file.chmod(0o640)
    with changing(file) as known:
        known.append(made()[0])
    assert stat.S_IMODE(file.stat().st_mode) == 0o640


def test_a_file_that_could_not_be_read_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "credentials.json"
    with changing(path):
        pass
    file = CredentialFile(path)
    with changing(path) as known:
        known.append(made()[0])
    monkeypatch.setattr(Path, "open", lambda *_: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    file.refresh()
    file.refresh()
    monkeypatch.undo()
    assert caplog.text.count("Input/output error") == 1
    file.refresh()
    assert (len(file.current), file.changes) == (1, 1)


def test_a_file_that_others_may_read_now_counts_as_changed(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch(0o600)
    before = stamp_of(path)
    path.chmod(0o640)
    assert stamp_of(path) != before
