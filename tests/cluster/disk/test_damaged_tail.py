"""A power loss: the tail of the last segment was cut or damaged, at any byte."""

import random
from pathlib import Path

import pytest

from tests.cluster.disk.image import BLOCK, Image, check, goes_on, with_segment


def check_cuts(image: Image, folder: Path, step: int) -> None:
    for number, cut in enumerate(image.positions(2, step)):
        store = with_segment(folder, image.data[:cut])
        whole = [chunk for record, chunk in enumerate(image.chunks) if image.end(record) <= cut]
        lost = any(image.starts[record] < cut < image.end(record) for record in range(4))
        check(store, whole, lost=lost)
        if number % 100 == 0:
            goes_on(store, folder, whole)
        store.close()


def check_damage(image: Image, folder: Path, step: int) -> None:
    for number, at in enumerate(image.positions(2, step)):
        data = bytearray(image.data)
        data[at] ^= 1 + at % 255
        store = with_segment(folder, bytes(data))
        whole = [
            chunk
            for record, chunk in enumerate(image.chunks)
            if not any(at in part for part in image.written(record))
        ]
        check(store, whole, lost=len(whole) < 4)
        if number % 100 == 0:
            goes_on(store, folder, whole)
        store.close()


def test_a_tail_cut_anywhere(image: Image, memory_folder: Path) -> None:
    check_cuts(image, memory_folder / "store", step=50)


def test_a_tail_damaged_anywhere(image: Image, memory_folder: Path) -> None:
    check_damage(image, memory_folder / "store", step=50)


@pytest.mark.slow
def test_a_tail_cut_at_every_third_byte(image: Image, memory_folder: Path) -> None:
    check_cuts(image, memory_folder / "store", step=3)


@pytest.mark.slow
def test_a_tail_damaged_at_every_third_byte(image: Image, memory_folder: Path) -> None:
    check_damage(image, memory_folder / "store", step=3)


def test_garbage_behind_the_tail(image: Image, memory_folder: Path) -> None:
    generator = random.Random(1)
    for _ in range(50):
        garbage = generator.randbytes(generator.randrange(1, 5 * BLOCK))
        store = with_segment(memory_folder / "store", image.data + garbage)
        check(store, image.chunks, lost=True)
        goes_on(store, memory_folder / "store", image.chunks)
