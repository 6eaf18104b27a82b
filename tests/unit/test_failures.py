"""What a run's folder remembers of its failures, and the second attempt after memory ran out."""

from __future__ import annotations

import os
import signal
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from gloo_workers import SPAWN

from nuciseg.distributed.failures import (
    batch_parts_factor,
    is_lost_connection,
    note_failure,
    noted_failure,
    with_one_retry,
)
from nuciseg.errors import OutOfMemoryError


def talk_until_the_other_is_gone(folder: Path, rank: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    dist.all_reduce(torch.zeros(1))
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        dist.all_reduce(torch.zeros(1))
    except RuntimeError as error:
        (folder / "verdict").write_text(str(is_lost_connection(error)))


def test_a_worker_whose_partner_died_made_no_mistake(tmp_path: Path) -> None:
    processes = [SPAWN.Process(target=talk_until_the_other_is_gone, args=(tmp_path, rank)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert (tmp_path / "verdict").read_text() == "True"
    assert not is_lost_connection(RuntimeError("shape '[2]' is invalid for input of size 3"))


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
