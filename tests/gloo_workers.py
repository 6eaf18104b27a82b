"""Several processes of this machine, joined by gloo as Ray joins its workers."""

from __future__ import annotations

import gc
import multiprocessing
import pickle
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from small_runs import wait_until

from nuciseg.engine.inference import Place

SPAWN = multiprocessing.get_context("spawn")  # what Ray's workers are: processes that inherit nothing


def _as_worker(
    rank: int, world_size: int, rendezvous: Path, work: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    # A file, so that no two tests can want the same port; a worker that waits longer hangs.
    dist.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}/meet",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=200),
    )
    result = work(Place(rank, world_size), *arguments)
    written = rendezvous / f"result-{rank}.part"
    written.write_bytes(pickle.dumps(result))
    written.rename(rendezvous / f"result-{rank}")
    # Nobody hangs up while another still talks: gloo's own threads then end the process with SIGABRT, now and then.
    wait_until(lambda: len(list(rendezvous.glob("result-?"))) == world_size, "the results of all workers", limit_s=60)
    gc.collect()  # an error's traceback may hold what talks by gloo: it must be gone before the process is
    dist.destroy_process_group()


def on_workers(world_size: int, rendezvous: Path, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `work(place, *arguments)` gives on each of `world_size` processes that are joined by gloo."""
    rendezvous.mkdir()
    processes = [
        SPAWN.Process(target=_as_worker, args=(rank, world_size, rendezvous, work, arguments))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
    hanging = [process for process in processes if process.is_alive()]
    for process in hanging:
        process.kill()
    assert not hanging, "workers wait for each other"
    assert [process.exitcode for process in processes] == [0] * world_size
    return [pickle.loads((rendezvous / f"result-{rank}").read_bytes()) for rank in range(world_size)]
