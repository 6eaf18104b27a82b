"""A worker killed on purpose: two tiny runs on drawn clusters, one undisturbed, must end the same."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import RayError
from ray.util.state import list_actors

from nuciseg.config import Config, load_config
from nuciseg.distributed.checks import Check, failed, passed
from nuciseg.distributed.nodes import ANSWER_TIMEOUT_S, alive_nodes, describe_task_error, stationed
from nuciseg.distributed.training import run_training
from nuciseg.distributed.worker import Job
from nuciseg.engine.checkpoint import Checkpoint, CheckpointStore, load_checkpoint
from nuciseg.tracking import METRICS_FILE, RunIdentity, read_metrics
from nuciseg.wandb_records import logged_epochs, wandb_files

WORKER_CLASS = "RayTrainWorker"  # Ray Train's name for a worker's process
EPOCHS = 30  # after the first a worker is killed, as soon as Ray has said which processes they are: seconds may pass
# On CPUs, where the same steps give the same bits. Small enough that the processes take longer to start than to train.
TINY: dict[str, Any] = {
    "data": {
        "synthetic": {"num_train": 60, "num_test": 1, "mean_diameter_px": 16.0, "nuclei_per_cluster": [2, 2]},
        "crop_px": 64,
        "batch_size": 4,
        "num_loader_threads": 0,
    },
    "model": {"depth": 2, "width": 4, "norm": "group"},
    "train": {"epochs": EPOCHS, "precision": "fp32", "calibrate": False},
    "scale": {"num_workers": 2, "cpus_per_worker": 1, "use_gpu": False},
    "tracking": {"kind": "offline", "num_overlays": 0},
}
MEASURED_TIMES = ("train_s", "validation_s", "images_per_s", "data_wait_share")


@dataclass
class _Killing:
    """What became of the attempt: the node of the killed worker, or why none was killed."""

    node: str | None = None
    failure: str = "the run ended before its first epoch was seen"


def rehearse(folder: Path, *, verbose: bool) -> Check:
    """Train twice in `folder`, which goes when all is well, and kill a worker of the second run after its first epoch.

    Raises NucisegError where a run cannot be trained at all, such as ResourceError without CPUs for two workers.
    """
    config = load_config(overrides=TINY)
    made = [each for each in folder.parents if not each.exists()]
    run_training(job_of(config, folder / "undisturbed", verbose=verbose))
    start = time.monotonic()
    with _worker_killed(folder / "killed") as killing:
        run_training(job_of(config, folder / "killed", verbose=verbose))
    seconds = time.monotonic() - start
    if killing.node is None:
        return failed("recovery", f"no worker was killed ({killing.failure}), so nothing was shown; try again")
    differences = different(folder / "killed", folder / "undisturbed")
    if differences:
        return failed("recovery", f"a worker was killed on node {killing.node}, and {differences}; look into {folder}")
    shutil.rmtree(folder)
    for each in made:
        with contextlib.suppress(OSError):  # somebody else has begun to use it
            each.rmdir()
    return passed(
        "recovery",
        f"a worker was killed on node {killing.node}; the run went on under the same W&B id, logged each of {EPOCHS} "
        f"epochs once, and ended after {seconds:.0f} s with the weights of an undisturbed run",
    )


def different(run_dir: Path, undisturbed_dir: Path) -> str:
    """In words what the run has that the undisturbed one has not; empty where they ended the same."""
    legs = [logged_epochs([path])[0] for path in wandb_files(run_dir)]
    ids = {path.stem.removeprefix("run-") for path in wandb_files(run_dir)}
    if len(ids) != 1:
        return f"it has {len(ids)} W&B runs ({', '.join(sorted(ids))}) instead of one"
    logged = sorted(epoch for leg in legs for epoch in leg)
    if logged != list(range(1, EPOCHS + 1)):
        return f"W&B has the epochs {logged} instead of 1 to {EPOCHS}"
    found, expected = _last(run_dir), _last(undisturbed_dir)
    if _figures(found) != _figures(expected):
        return "its scores are other ones than those of the undisturbed run"
    if any(not torch.equal(found.weights[name], weight) for name, weight in expected.weights.items()):
        return "its weights are other ones than those of the undisturbed run"
    return ""


def job_of(config: Config, run_dir: Path, *, verbose: bool) -> Job:
    """A run in the new folder `run_dir`, named after it and the one above."""
    run_dir.mkdir(parents=True)
    name = f"{run_dir.parent.name}-{run_dir.name}"
    return Job(config, run_dir, RunIdentity(name, run_dir.name, run_dir.parent.name, "train"), verbose)


def _last(run_dir: Path) -> Checkpoint:
    last = CheckpointStore(run_dir).last
    assert last is not None  # it was trained to its end
    return load_checkpoint(last)


def _figures(checkpoint: Checkpoint) -> list[dict[str, float]]:
    """What was learned, without how fast."""
    rows: list[Mapping[str, float]] = list(checkpoint.progress.history)
    return [{name: value for name, value in row.items() if name not in MEASURED_TIMES} for row in rows]


class _Killer:
    """A process on a node, there before it is needed: the run might be over before another one is started."""

    def kill(self, pid: int) -> None:
        os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def _worker_killed(run_dir: Path) -> Iterator[_Killing]:
    """Within, a worker of this process's run in `run_dir` is killed as soon as an epoch is done."""
    killing = _Killing()
    before = {actor.actor_id for actor in _our_workers()}
    over = threading.Event()
    with stationed(_Killer) as killers:

        def kill() -> None:
            while not read_metrics(run_dir / METRICS_FILE):
                if over.wait(0.02):
                    return
            workers = [actor for actor in _our_workers() if actor.actor_id not in before and actor.state == "ALIVE"]
            _kill_one(workers, killers, killing)

        thread = threading.Thread(target=kill, daemon=True)
        thread.start()
        try:
            yield killing
        finally:
            over.set()
            thread.join()


def _kill_one(workers: Sequence[Any], killers: Mapping[str, Any], killing: _Killing) -> None:
    if not workers:
        killing.failure = "Ray names no worker of the run"
        return
    victim = max(workers, key=lambda actor: int(actor.pid))
    name = alive_nodes().get(victim.node_id, victim.node_id)
    if name not in killers:
        killing.failure = f"no process to do it by started on node {name} within {ANSWER_TIMEOUT_S:g} s"
        return
    try:
        ray.get(killers[name].kill.remote(victim.pid), timeout=ANSWER_TIMEOUT_S)
    except (ProcessLookupError, RayError) as error:
        killing.failure = f"node {name} {describe_task_error(getattr(error, 'cause', None) or error)}"
    else:
        killing.node = name


def _our_workers() -> list[Any]:
    context = ray.get_runtime_context()
    actors = list_actors(address=context.gcs_address, filters=[("class_name", "=", WORKER_CLASS)], limit=1000)
    return [actor for actor in actors if actor.job_id == context.get_job_id()]
