"""One run on N workers through Ray Train."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from ray.train import FailureConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback

from nuciseg.buckets import BucketFolder
from nuciseg.config import Config
from nuciseg.distributed.cluster import (
    Need,
    connect,
    environment,
    gpus_within_reach,
    quieten,
    require_room_for_runs,
    worker_need,
)
from nuciseg.distributed.failures import STOP_FILE, is_lost_connection, note_failure, noted_failure, with_one_retry
from nuciseg.distributed.mirror import Mirror, working_copy
from nuciseg.distributed.storage import await_seen
from nuciseg.distributed.worker import Job, best_score, run_worker
from nuciseg.engine.inference import Place
from nuciseg.engine.loop import EpochReport
from nuciseg.errors import ResourceError, StorageAwayError, TrainingError
from nuciseg.scale import ScaleConfig, WorkerRange
from nuciseg.tracking import METRICS_FILE, read_metrics

LOOK_FOR_ROOM_S = 20.0  # Ray counts the nodes as often
# Where a node was lost Ray may still count it, and wait for room on it. Ray's own 60 s are for a number that is fixed.
ROOM_TIMEOUT_VARIABLE, ROOM_TIMEOUT_S = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", 10.0
STARTED_FILE = ".started"  # a node that does not see it does not share the run's folder


def check_room(config: Config, *, verbose: bool) -> None:
    """Raise ResourceError where the machine or cluster lacks what `config.scale` asks for."""
    scale = config.scale
    if scale.max_workers > 1 or _gpu_is_elsewhere(scale, verbose):
        connect(verbose)
        require_room_for_runs(scale, worker_need(scale, for_trial=False))
    elif scale.use_gpu and not torch.cuda.is_available():
        raise ResourceError("scale.use_gpu is true but this machine has no GPU that torch can use; set it to false")


def run_training(job: Job) -> None:
    """Train `job` to the end on `scale.num_workers` workers, from the last checkpoint in its folder.

    One worker runs in this process: a second layer of actors would cost about 10 s and give nothing (unless the
    cluster's GPUs are on other machines). Workers that die are started again, `run.max_failures` times in a row or some
    more. Raises NucisegError.
    """
    quieten(job.verbose)
    check_room(job.config, verbose=job.verbose)
    scale = job.config.scale
    if scale.max_workers == 1 and not _gpu_is_elsewhere(scale, job.verbose):
        if scale.cpus_per_worker is not None:
            torch.set_num_threads(scale.cpus_per_worker)
        trainer = TorchTrainer(train_loop, train_loop_config={"job": job}, scaling_config=ScalingConfig(num_workers=0))
        with_one_retry(trainer.fit, job.run_dir)
        return
    fit_workers(job, worker_need(scale, for_trial=False), callbacks=[])


def _gpu_is_elsewhere(scale: ScaleConfig, verbose: bool) -> bool:
    """Whether a GPU is wanted or welcome, this machine has none, and the cluster has."""
    if scale.use_gpu is False or torch.cuda.is_available():
        return False
    if "RAY_ADDRESS" in os.environ:
        connect(verbose)
    return ray.is_initialized() and gpus_within_reach() > 0


def fit_workers(job: Job, need: Need, callbacks: list[Any]) -> None:
    """Run `job` on several workers; raises the NucisegError that ended it, if one did."""
    config = job.config
    workers: int | tuple[int, int]
    patience: dict[str, str] = {}
    if isinstance(config.scale.num_workers, WorkerRange):
        workers = config.scale.min_workers, config.scale.max_workers
        patience = {ROOM_TIMEOUT_VARIABLE: os.environ.get(ROOM_TIMEOUT_VARIABLE, str(ROOM_TIMEOUT_S))}
    else:
        workers = config.scale.num_workers
    # Ray's trainer lives for one `fit`.
    make_trainer = partial(
        TorchTrainer,
        train_loop,
        train_loop_config={"job": job},
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=need.gpus > 0,
            resources_per_worker={"CPU": need.cpus} | ({"GPU": need.gpus} if need.gpus else {}),
            elastic_resize_monitor_interval_s=LOOK_FOR_ROOM_S,
        ),
        run_config=ray.train.RunConfig(
            name="ray_train",
            **storage_of_ray(job.mirror),
            # One more for the restart that only finds the noted failure and ends.
            failure_config=FailureConfig(max_failures=config.run.max_failures + 1),
            callbacks=callbacks,
        ),
    )
    if job.bucket is None:
        job.run_dir.mkdir(parents=True, exist_ok=True)
        (job.run_dir / STARTED_FILE).touch()
    job.mirror.push()
    with environment(patience):
        while not _fitted(make_trainer(), job):
            pass
    failure = noted_failure(job.run_dir)
    if failure is not None:
        raise failure


def _fitted(trainer: TorchTrainer, job: Job) -> bool:
    """Whether the run came to its end; False where its workers died too often, but came to an epoch meanwhile.

    Raises what ended the run.
    """
    history = job.run_dir / METRICS_FILE
    num_epochs = len(read_metrics(history))
    try:
        with job.mirror.exchanging(sent=(STOP_FILE,), received=(METRICS_FILE,)):
            trainer.fit()
    except ray.train.TrainingFailedError as error:
        _raise_known(error)
        job.mirror.fetch()
        failure = noted_failure(job.run_dir)
        if failure is None:
            failures = list(_worker_failures(error))
            if failures and all(map(_is_mistake, failures)):
                raise  # of ours: its traceback is wanted
            if len(read_metrics(history)) > num_epochs:
                return False
            failure = TrainingError(
                f"the workers died more often than run.max_failures ({job.config.run.max_failures}) allows; go on with "
                f"--resume {job.mirror} ({_last_line(error)})"
            )
            note_failure(job.run_dir, failure)
            job.mirror.push()
        raise failure from error
    job.mirror.fetch()
    return True


def train_loop(arguments: dict[str, Any]) -> None:
    """What Ray Train runs in each worker (or, with one worker, in this process)."""
    job: Job = arguments["job"]
    context = ray.train.get_context()
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if distributed and job.bucket is not None:
        job = _on_this_node(job, job.bucket)
    elif distributed and not _all_see_folder(job):
        return
    if distributed and noted_failure(job.run_dir) is not None:
        return  # started again after a failure that starting again cannot mend
    place = Place(
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        device=_device(job, distributed),
    )
    must_one_go = _preempted if distributed else lambda: False
    with job.mirror.exchanging(received=(STOP_FILE,)) if distributed and place.rank == 0 else nullcontext():
        run_worker(job, place, lambda epoch: ray.train.report(reported(epoch, job)), must_one_go)


def storage_of_ray(folder: Mirror) -> dict[str, Any]:
    """Where Ray keeps its own state of what lies in `folder`, as its configurations take it."""
    if folder.uri is None:
        return {"storage_path": str(folder.folder.resolve())}
    bucket = BucketFolder(folder.uri)
    return {"storage_path": bucket.path, "storage_filesystem": bucket.system}


def _on_this_node(job: Job, bucket: str) -> Job:
    """The job in this node's copy. Workers of one node share it, so none may write before all have fetched."""
    mirror = working_copy(bucket, "workers")
    mirror.fetch()
    torch.distributed.barrier()
    return replace(job, run_dir=mirror.folder)


def _all_see_folder(job: Job) -> bool:
    """Whether the machines of all workers see the run's folder; who does notes down who does not.

    Raises StorageAwayError where none does: nobody could note it.
    """
    unseen = None
    try:
        await_seen(job.run_dir / STARTED_FILE)
    except StorageAwayError as error:
        unseen = str(error)
    told: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(told, unseen)
    reason = next(filter(None, told), None)
    if reason is not None and None not in told:
        raise StorageAwayError(reason)
    if reason is not None and unseen is None:
        note_failure(job.run_dir, ResourceError(reason))
    return reason is None


def _preempted() -> bool:
    """Whether the machine of a worker is to go, as far as Ray was told. Every worker calls this at the same time."""
    return ray.train.get_preemption_info() is not None


def _device(job: Job, distributed: bool) -> torch.device:
    """A group of workers was given what `scale` asks for; one alone must ask itself."""
    if distributed or (job.config.scale.use_gpu is not False and torch.cuda.is_available()):
        return torch.device(ray.train.torch.get_device())
    return torch.device("cpu")


def reported(epoch: EpochReport, job: Job) -> dict[str, Any]:
    """What Ray hears of an epoch; `score` is the best so far of the score that ranks trials."""
    return {
        **epoch.metrics,
        "score": best_score(epoch.progress.history, job.config.train.metric),
        "best_epoch": epoch.progress.best_epoch,
        "pid": os.getpid(),
    }


def _worker_failures(error: ray.train.TrainingFailedError) -> Iterable[BaseException]:
    return dict(getattr(error, "worker_failures", {})).values()


def _is_mistake(failure: BaseException) -> bool:
    """Whether a worker raised something of its own, not a worker's death or the connection to one that died."""
    return isinstance(failure, UserExceptionWithTraceback) and not is_lost_connection(failure._base_exc)


def _raise_known(error: ray.train.TrainingFailedError) -> None:
    """Raise what a worker could not note, because the storage is away."""
    for each in _worker_failures(error):
        cause = getattr(each, "_base_exc", None)
        if isinstance(cause, StorageAwayError):
            raise cause from error


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
