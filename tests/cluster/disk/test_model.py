"""Any sequence of puts, deletions, compactions, restarts, kills and power losses, against a dictionary."""

import random
import shutil
import tempfile
from collections import defaultdict
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvstore_cluster.disk import SegmentStore
from kvstore_codec.errors import DiskFullError
from tests.cluster.disk.chunks import read, tiny
from tests.cluster.disk.conftest import MEMORY
from tests.cluster.disk.index import Index
from tests.cluster.disk.recorder import Recorder

CONTENTS = st.integers(0, 11)
VERSIONS = st.integers(0, 3)


class StoreMachine(RuleBasedStateMachine):
    """`after_kill` and `after_loss`: the versions (None: nothing) that may be found after the process or the machine
    died now. `dead`: versions that may still lie on disk, dead, and so may come back after an eviction."""

    @initialize()
    def begin(self) -> None:
        self.base = Path(tempfile.mkdtemp(dir=MEMORY if MEMORY.is_dir() else None))
        self.generation = 0
        self.after_kill: dict[int, set[int | None]] = defaultdict(lambda: {None})
        self.after_loss: dict[int, set[int | None]] = defaultdict(lambda: {None})
        self.dead: dict[int, set[int | None]] = defaultdict(set)
        self.dead_after_loss: dict[int, set[int | None]] = defaultdict(set)
        self.folder = self.base / "0"
        self.folder.mkdir()
        self._open(self.after_kill)

    def _open(self, allowed: dict[int, set[int | None]]) -> None:
        """Checks what is found, which then is all there is."""
        self.recorder = Recorder(self.folder)
        self.store = SegmentStore(self.folder, 1 << 20, sync_period_s=1e6, open_file=self.recorder.open_file)
        self.index = Index(self.store)
        ids = {tiny(content).chunk_id: content for content in range(12)}
        found: dict[int, int] = {}
        for meta, location in list(self.store.recover().records):
            content = ids[meta.chunk_id]
            data = read(self.store, location, meta.size_bytes)
            found[content] = next(version for version in range(4) if tiny(content, version).data == data)
            self.index.where[content] = (location, tiny(content, found[content]))
        for content in range(12):
            assert found.get(content) in allowed[content], content
            self.after_kill[content] = {found.get(content)}
            self.after_loss[content] = {found.get(content)}

    def _move(self) -> Path:
        self.generation += 1
        folder = self.base / str(self.generation)
        folder.mkdir()
        return folder

    @rule(content=CONTENTS, version=VERSIONS, sync=st.booleans())
    def put(self, content: int, version: int, sync: bool) -> None:
        try:
            self.index.put(content, version, sync=sync)
        except DiskFullError:
            self.compact()
            self.index.put(content, version, sync=sync)
        self.after_kill[content] = {version}
        self.after_loss[content] = {version} if sync else self.after_loss[content] | {version}
        self.dead[content].add(version)
        self.dead_after_loss[content].add(version)

    @rule(content=CONTENTS)
    def evict(self, content: int) -> None:
        if content in self.index.where:
            self.index.delete(content)
            self.after_kill[content] = {None} | self.dead[content]
            self.after_loss[content] |= {None} | self.dead_after_loss[content]

    @rule(content=CONTENTS)
    def forget(self, content: int) -> None:
        if content in self.index.where:
            self.index.delete(content, forget=True)
            self.after_kill[content] = {None}
            self.after_loss[content] |= {None} | self.dead_after_loss[content]
            self.dead[content] = set()

    @rule()
    def compact(self) -> None:
        while self.store.compact(self.index.relocate):
            pass

    @rule()
    def restart(self) -> None:
        self.store.close()
        self._open(self.after_kill)
        self.dead_after_loss = defaultdict(set, {content: set(dead) for content, dead in self.dead.items()})

    @rule()
    def kill(self) -> None:
        folder = self._move()
        for path in self.folder.iterdir():
            shutil.copy(path, folder)
        self.store.close()
        self.folder = folder
        self._open(self.after_kill)
        self.dead_after_loss = defaultdict(set, {content: set(dead) for content, dead in self.dead.items()})

    @rule(seed=st.integers(0, 1 << 30))
    def lose_power(self, seed: int) -> None:
        folder = self._move()
        self.recorder.after_power_loss(folder, random.Random(seed))
        self.store.close()
        self.folder = folder
        self._open(self.after_loss)
        self.dead = defaultdict(set, {content: set(dead) for content, dead in self.dead_after_loss.items()})

    @invariant()
    def everything_is_there(self) -> None:
        if hasattr(self, "index"):
            self.index.check()
            assert self.store.used_bytes <= self.store.limit_bytes

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
            shutil.rmtree(self.base)


TestStore = StoreMachine.TestCase
TestStore.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
