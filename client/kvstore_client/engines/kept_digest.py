"""Digests of files on disk, kept until a file changes."""

import json
import logging
from pathlib import Path

from blake3 import blake3

from kvstore_client.engines.file_version import file_version
from kvstore_client.kept_file import UNUSABLE, read_file, replace_file
from kvstore_codec.errors import UnsupportedModelError

log = logging.getLogger(__name__)


class KeptDigest:
    """One digest in one small file, with the versions of the files that it is of."""

    def __init__(self, place: Path | None, folder: Path, files: tuple[Path, ...], reading: str) -> None:
        """`place` is the folder of such digests; None: nothing is kept. `reading` says how the files in `folder` are
        read, where that changes the digest. Raises UnsupportedModelError for a file that is missing."""
        name = blake3(f"{folder.resolve()} {reading}".encode()).hexdigest()[:32]
        self._path = None if place is None else place / f"{name}.json"
        self._folder, self._files = folder, files
        self._seen = self._look()

    def read(self) -> bytes | None:
        """The digest, if it is known for the files as they were when this was made."""
        if self._path is None:
            return None
        try:
            kept = read_file(self._path)
            digest = bytes.fromhex(kept["weights_digest"])
            return digest if kept["files"] == self._seen and len(digest) == blake3.digest_size else None
        except UNUSABLE:
            return None

    def write(self, digest: bytes) -> None:
        """Keep the digest, unless a file was replaced meanwhile. Raises UnsupportedModelError for a file that is
        missing."""
        if self._path is None or self._look() != self._seen:
            return
        kept = {"weights_digest": digest.hex(), "files": self._seen}
        try:
            replace_file(self._path, json.dumps(kept).encode())
        except OSError as error:
            log.info("the digest of %s is not kept: %s", self._folder, error)

    def _look(self) -> dict[str, list[int]]:
        """The version of each file, as JSON has it."""
        try:
            return {file.name: list(file_version(file.stat())) for file in self._files}
        except (OSError, ValueError) as error:  # ValueError: a name with a NUL character
            raise UnsupportedModelError(f"{self._folder} is not whole: {error}") from error
