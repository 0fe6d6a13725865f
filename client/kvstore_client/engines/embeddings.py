"""Input embeddings of a checkpoint on disk, for engines whose own are out of reach."""

import json
import os
from pathlib import Path

import torch

from kvstore_client.engines.checkpoint import EMBEDDINGS, checkpoint_files
from kvstore_client.engines.file_version import file_version
from kvstore_codec.errors import CalibrationError, InvalidTokensError, UnsupportedModelError

_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_LENGTH_BYTES = 8


class CheckpointEmbeddings:
    """Reads the rows of tokens from the checkpoint's file as they are asked for, which the operating system keeps in
    memory: 256 rows of 1 KiB take a millisecond. A `TokenEmbeddings`. Thread-safe.

    The file may not change: its embeddings are those that the engine has loaded.
    """

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        """`dtype` is the model's. Raises UnsupportedModelError for a checkpoint whose embeddings cannot be read."""
        self._dtype = dtype
        try:
            self._find(checkpoint_files(folder))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UnsupportedModelError(
                f"the embeddings of the checkpoint in {folder} cannot be read: {error!r}"
            ) from error

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """`[tokens, hidden]` in host memory, in the model's dtype. Raises InvalidTokensError for a token that the
        checkpoint does not know, and CalibrationError when the file has changed or cannot be read."""
        ids: list[int] = tokens.tolist()
        if ids and not 0 <= min(ids) <= max(ids) < self._rows:
            raise InvalidTokensError(
                f"tokens {min(ids)} to {max(ids)} are not among the checkpoint's {self._rows} embeddings"
            )
        try:
            data = self._read(ids)
        except OSError as error:
            raise CalibrationError(f"embeddings cannot be read from {self._path}: {error}") from error
        rows = (
            torch.frombuffer(data, dtype=self._stored)
            if ids
            else torch.empty(0, dtype=self._stored, device="cpu")
        )
        return rows.view(len(ids), self._hidden).to(self._dtype)

    def _find(self, files: tuple[Path, ...]) -> None:
        for path in files:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
                seen = os.fstat(file.fileno())
                if length >= seen.st_size:
                    raise ValueError(f"{path} has a header of {length} bytes")
                entry = json.loads(file.read(length)).get(EMBEDDINGS)
            if entry is not None:
                self._stored = _DTYPES[entry["dtype"]]
                self._rows, self._hidden = map(int, entry["shape"])
                self._begin = _LENGTH_BYTES + length + int(entry["data_offsets"][0])
                self._row_bytes = self._hidden * self._stored.itemsize
                if self._begin + self._rows * self._row_bytes > seen.st_size:
                    raise ValueError(f"{path} is shorter than its header says")
                self._path, self._seen = path, file_version(seen)
                return
        raise KeyError(EMBEDDINGS)

    def _read(self, ids: list[int]) -> bytearray:
        """The bytes of these rows. Raises OSError."""
        data, size = bytearray(len(ids) * self._row_bytes), self._row_bytes
        view = memoryview(data)
        with self._path.open("rb", buffering=0) as file:
            if file_version(os.fstat(file.fileno())) != self._seen:
                raise OSError("the file has changed")
            for place, token in enumerate(ids):
                row = view[place * size : (place + 1) * size]
                if os.preadv(file.fileno(), [row], self._begin + token * size) != size:
                    raise OSError("the file has become shorter")
        return data
