"""The folder of a process: where it is, and what becomes of it when that process is killed."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvstore_bench.cli.tables import require_outputs
from kvstore_codec.errors import ConfigurationError, StartupError
from kvstore_service import scratch
from kvstore_service.scratch import LONGEST_PARENT_BYTES, scratch_folder

MOUNT, UMOUNT = shutil.which("mount") or "mount", shutil.which("umount") or "umount"
OWNER_LINE = "scratch folder of kvstore process 123\n"
OWNER = """
import sys, time
from kvstore_service.scratch import scratch_folder
with scratch_folder() as folder:
    print(folder, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def parent(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """TMPDIR; its path is short enough."""
    with tempfile.TemporaryDirectory(prefix="kv", dir="/tmp") as name:
        monkeypatch.setenv("TMPDIR", name)
        yield Path(name)


def owner() -> tuple[subprocess.Popen[str], Path]:
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_it_is_gone_afterwards(parent: Path) -> None:
    with scratch_folder() as folder:
        assert folder.parent == parent
        (folder / "ray").mkdir()
        (folder / "ray" / "log").write_text("line")
    assert list(parent.iterdir()) == []


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_has_is_not(
    parent: Path, caplog: pytest.LogCaptureFixture
) -> None:
    killed, left = owner()
    living, used = owner()
    (parent / "kvstore-notes").mkdir()
    (parent / "kvstore-notes" / "mine.txt").write_text("not of any service")
    with killed, living:
        killed.kill()
        killed.wait()
        assert left.is_dir()
        with scratch_folder() as folder:
            assert not left.exists()
            assert used.is_dir()
            assert (parent / "kvstore-notes" / "mine.txt").exists()
            assert {path.name for path in parent.iterdir()} == {folder.name, used.name, "kvstore-notes"}
        assert f"{left} was left by a service that was killed: removed" in caplog.text
        _, _ = living.communicate()
        assert not used.exists()


def impostor(parent: Path, case: str) -> Path:
    """Something that resembles what a killed service leaves."""
    folder = parent / ("kvstore-paper-draft" if case == "name" else "kvstore-abcdefg1")
    made = parent / "elsewhere" if case == "link" else folder
    made.mkdir(mode=0o755 if case == "mode" else 0o700)
    (made / "thesis.tex").write_text("three years of work")
    match case:
        case "link":
            folder.symlink_to(made)
        case "fifo":
            os.mkfifo(made / "owner")
            return folder
        case "owner link":
            (parent / "line").write_text(OWNER_LINE)
            (made / "owner").symlink_to(parent / "line")
            return folder
    (made / "owner").write_text("Ann\n" if case == "line" else OWNER_LINE)
    return folder


@pytest.mark.parametrize("case", ["name", "link", "mode", "line", "fifo", "owner link"])
def test_what_only_looks_like_a_leftover_stays(
    parent: Path, caplog: pytest.LogCaptureFixture, case: str
) -> None:
    folder = impostor(parent, case)
    log = folder / "ray" / "session_1" / "raylet.out"
    log.parent.mkdir(parents=True)
    log.write_text("")
    arguments = [sys.executable, "-c", "import time; time.sleep(60)", str(log)]
    environment = os.environ | {"KVSTORE_SCRATCH_FOLDER": str(folder)}
    with subprocess.Popen(arguments, env=environment) as process:
        try:
            with scratch_folder():
                assert (folder / "thesis.tex").exists()
                assert process.poll() is None
            assert caplog.text == ""
        finally:
            process.kill()


def test_only_rays_processes_of_the_folder_are_ended(parent: Path) -> None:
    killed, left = owner()
    with killed:
        killed.kill()
    log = left / "ray" / "session_1" / "agent.log"
    log.parent.mkdir(parents=True)
    log.write_text("")
    hold_open = "import sys, time; file = open(sys.argv[-1]); print('up', flush=True); time.sleep(60)"
    # One that names itself as Ray's do and has a log of that folder open, one of another folder, and a pager.
    other = parent / "other.log"
    other.write_text("")
    # And one that somebody else has started to look into that folder.
    started_by_owner = os.environ | {"KVSTORE_SCRATCH_FOLDER": str(left)}
    agent, monitor, foreign, reader = (
        subprocess.Popen(
            [name, "-c", hold_open, str(path)],
            executable=sys.executable,
            stdout=subprocess.PIPE,
            env=environment,
        )
        for name, path, environment in (
            ("ray::Agent", log, os.environ),
            ("python", log, started_by_owner),
            ("ray::Agent", other, started_by_owner),
            ("python", log, os.environ),
        )
    )
    pager = subprocess.Popen([shutil.which("tail") or "tail", "-f", str(log)], stdout=subprocess.DEVNULL)
    with agent, monitor, foreign, reader, pager:
        for process in (agent, monitor, foreign, reader):
            assert process.stdout is not None
            assert process.stdout.readline() == b"up\n"
        try:
            with scratch_folder():
                agent.wait(60)
                monitor.wait(60)
                assert foreign.poll() is None
                assert reader.poll() is None
                assert pager.poll() is None
        finally:
            for process in (agent, monitor, foreign, reader, pager):
                process.kill()


def test_a_long_tmpdir_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setenv("TMPDIR", str(long))
    with scratch_folder() as folder:
        assert folder.parent == Path("/tmp")  # noqa: S108
    assert f"temporary files go to /tmp: TMPDIR={long} has {len(str(long))} bytes" in caplog.text


@pytest.mark.parametrize(
    ("folder", "reason"),
    [("/proc", "cannot be used"), ("/nowhere", "cannot be used (No such file or directory)")],
)
def test_no_folder_at_all_is_a_sentence(folder: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", folder)
    monkeypatch.setattr(scratch, "_DEFAULTS", ("/sys",))
    with pytest.raises(StartupError) as raised, scratch_folder():
        pass
    said = str(raised.value)
    assert f"TMPDIR={folder} {reason}" in said
    assert "/sys cannot be used" in said
    assert f"Set TMPDIR to a writable folder whose path has at most {LONGEST_PARENT_BYTES} bytes" in said


def test_a_benchmark_without_a_folder_for_temporary_files_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/proc"])
    with pytest.raises(ConfigurationError, match="set TMPDIR to a writable folder"):
        require_outputs(None, None)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_full_tmpdir_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    full = Path(tempfile.mkdtemp(prefix="kv", dir="/tmp"))
    mounted = subprocess.run(
        [MOUNT, "-t", "tmpfs", "-o", "size=64k", "none", str(full)], capture_output=True, check=False
    )
    try:
        if mounted.returncode:
            pytest.skip("no tmpfs can be mounted here")
        monkeypatch.setenv("TMPDIR", str(full))
        with scratch_folder() as folder:
            assert folder.parent == Path("/tmp")  # noqa: S108
        assert f"TMPDIR={full} " in caplog.text
    finally:
        if not mounted.returncode:
            subprocess.run([UMOUNT, str(full)], check=True)
        full.rmdir()


def test_the_path_leaves_room_for_rays_sockets() -> None:
    """As Ray names them: `session_<time>_<pid>/sockets/plasma_store`, at most 107 bytes."""
    session = "session_2026-12-31_23-59-59_999999_4194304"
    parent = "/" + "p" * (LONGEST_PARENT_BYTES - 1)
    with tempfile.TemporaryDirectory(prefix="kvstore-", dir="/tmp") as example:
        assert len(f"{parent}/{Path(example).name}/ray/{session}/sockets/plasma_store") == 107
