"""What a run's folder remembers of its failures, and the second attempt after memory ran out."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest

from nuciseg.distributed.failures import batch_parts_factor, note_failure, noted_failure, with_one_retry
from nuciseg.errors import OutOfMemoryError


class Tensors:
    """Stands for what an attempt holds while its memory runs out."""


def test_the_second_attempt_finds_the_memory_of_the_first_free(tmp_path: Path) -> None:
    held: list[weakref.ref[Tensors]] = []

    def run() -> None:
        assert not held or held[0]() is None, "the first attempt's tensors are still there"
        tensors = Tensors()
        held.append(weakref.ref(tensors))
        error = OutOfMemoryError("out of memory")
        note_failure(tmp_path, error, batch_parts_factor(tmp_path))
        raise error

    with pytest.raises(OutOfMemoryError):
        with_one_retry(run, tmp_path)
    assert len(held) == 2
    assert isinstance(noted_failure(tmp_path), OutOfMemoryError)


def test_a_noted_failure_is_not_tried_again(tmp_path: Path) -> None:
    attempts = 0

    def run() -> None:
        nonlocal attempts
        attempts += 1
        error = OutOfMemoryError("out of memory")
        note_failure(tmp_path, error, 2)
        raise error

    with pytest.raises(OutOfMemoryError):
        with_one_retry(run, tmp_path)
    assert attempts == 1
