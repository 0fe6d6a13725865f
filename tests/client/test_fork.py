"""A process that forks after it has connected: its children get clients of their own, and it goes on with its own."""

import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest

from kvstore_client import connect
from kvstore_client.engines.transformers.identity.guard import ModelIdentity
from kvstore_client.recompute.controller import RatioOnline
from tests.client.conftest import ServedCluster, served_cluster
from tests.client.fork_scripts import ended_well, forked
from tests.client.models import tiny_model


def run(script: str, address: str, timeout_s: float = 200.0) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.client.fork_scripts", script, address],
        capture_output=True, text=True, check=False, timeout=timeout_s, env=os.environ | {"OMP_NUM_THREADS": "2"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("done\n"), done.stdout + done.stderr
    if script == "refused":
        assert "Create the client after the fork" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("bulk", [True, False], ids=["bulk", "grpc"])
def test_children_work_and_the_parent_goes_on(tmp_path: Path, bulk: bool) -> None:
    with served_cluster(tmp_path, bulk=bulk) as cluster:
        run("preload", cluster.address)
        cluster.check_nothing_is_held()


@pytest.mark.slow
def test_a_fork_in_the_middle_of_fetches_and_stores(tmp_path: Path) -> None:
    with served_cluster(tmp_path, bulk=True) as cluster:
        run("busy", cluster.address)


@pytest.mark.slow
def test_what_was_begun_before_a_fork_ends_on_both_sides(cluster: ServedCluster) -> None:
    run("halfway", cluster.address)


@pytest.mark.slow
@pytest.mark.parametrize("bulk", [True, False], ids=["bulk", "grpc"])
def test_a_child_has_pages_of_its_own(tmp_path: Path, bulk: bool) -> None:
    with served_cluster(tmp_path, nodes=2, bulk=bulk) as cluster:
        run("paged", cluster.address)
        cluster.check_nothing_is_held()


@pytest.mark.slow
def test_a_child_refuses_where_grpc_could_crash() -> None:
    run("refused", "")


def test_a_child_finds_no_lock_held_that_another_thread_of_its_parent_held() -> None:
    identity, ratio = ModelIdentity(tiny_model()), RatioOnline()

    def ask() -> None:
        assert identity.current().refusal is None
        ratio.computed(1, 1.0)
        ratio.ratio(1.0, 1.0)

    with identity._lock, ratio._lock:  # as other threads may hold them at any time
        child = forked(ask)
    ended_well(child, within_s=20)
    ask()


_SIGNALLED = """
import os, signal
from kvstore_client.metrics import ClientMetrics

metrics, parent, forked = ClientMetrics(), os.getpid(), []

class Interrupting:
    "A signal comes in the middle of counting this."
    def __str__(self):
        if not forked:
            signal.raise_signal(signal.SIGUSR1)
        return "interrupted"

def fork(*_):
    forked.append(os.fork())
    if not forked[-1]:
        metrics.missed("in a handler of the child")

signal.signal(signal.SIGUSR1, fork)
metrics.missed(Interrupting())
metrics.missed("afterwards")
if os.getpid() != parent:
    os._exit(0)
assert os.waitpid(forked[0], 0)[1] == 0
print("done")
"""


def test_a_signal_handler_may_fork_in_the_middle_of_a_count() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _SIGNALLED], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


def test_forks_remember_no_client_that_is_gone() -> None:
    client = connect("127.0.0.1:1")
    gone = weakref.ref(client)
    client.close()
    del client
    gc.collect()
    assert gone() is None
