"""Data-parallel training by real Ray workers: whole, killed in the middle, failing on its own account, no room."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.util.state import list_actors
from small_runs import assert_same_run, last_checkpoint, logged_epochs, recovery_shown, small_config, wait_until
from wandb_offline import assert_one_wandb_run

from nuciseg.config import Config
from nuciseg.distributed import training
from nuciseg.distributed.failures import noted_failure
from nuciseg.distributed.training import check_room, run_training
from nuciseg.distributed.watchdog import TIMEOUT_VARIABLE
from nuciseg.distributed.worker import FINISHED_FILE, IMAGES_FILE, Job
from nuciseg.engine.checkpoint import CheckpointStore
from nuciseg.errors import NonFiniteLossError, OutOfMemoryError, ResourceError, TrainingError
from nuciseg.tracking import RunIdentity, read_metrics

pytestmark = pytest.mark.usefixtures("ray_session")

# 48 images in batches of 5, so that workers have unlike shares and the last batch has 3 images for 2 workers.
TWO_WORKERS = {
    "scale.num_workers": 2,
    "scale.cpus_per_worker": 1,
    "data.synthetic.num_train": 60,
    "data.batch_size": 5,
    "train.epochs": 5,
    "tracking.kind": "offline",
}
WORKER = "RayTrainWorker"


def make_job(run_dir: Path, **changes: Any) -> Job:
    config = small_config(**{**TWO_WORKERS, **changes})
    return Job(config, run_dir, RunIdentity(run_dir.name, run_dir.name, "tests", "train"))


def worker_pids() -> set[int]:
    """Processes of Ray Train's workers in this Ray instance, also of those that have ended."""
    actors = list_actors(address=ray.get_runtime_context().gcs_address, limit=1000)  # of no other Ray on this machine
    return {a.pid for a in actors if a.class_name == WORKER and a.pid}


@pytest.fixture(scope="module")
def undisturbed(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run by two workers that nothing happened to."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    run_training(make_job(run_dir))
    return run_dir


def test_two_workers_train_to_the_end(undisturbed: Path) -> None:
    assert logged_epochs(undisturbed) == [1, 2, 3, 4, 5]
    progress = last_checkpoint(undisturbed).progress
    assert (progress.epoch, progress.step) == (5, 5 * 10)
    finished = json.loads((undisturbed / FINISHED_FILE).read_text())
    best = CheckpointStore(undisturbed).best
    assert best is not None
    assert finished["checkpoint"] == best.name
    validated = {row["id"] for row in json.loads((undisturbed / IMAGES_FILE).read_text())["images"]}
    assert len(validated) == 12
    assert progress.history[-1]["images"] == 12  # each validation image counted once, by whichever worker


def strike_second_worker(
    monkeypatch: pytest.MonkeyPatch, by: signal.Signals, condition: Callable[[Path], Callable[[], bool]]
) -> None:
    """It gets the signal at each step where what `condition` made of the run's folder, as the worker began, is true."""
    train_loop = training.train_loop

    def doomed_train_loop(arguments: dict[str, Any]) -> None:
        from nuciseg.engine.loop import Trainer

        is_due, step = condition(arguments["job"].run_dir), Trainer._step

        def doomed_step(*_: Any) -> Any:
            if ray.train.get_context().get_world_rank() == 1 and is_due():
                os.kill(os.getpid(), by)
            return step(*_)

        Trainer._step = doomed_step  # type: ignore[method-assign]
        train_loop(arguments)

    monkeypatch.setattr(training, "train_loop", doomed_train_loop)


def strike_once_in_mid_epoch(monkeypatch: pytest.MonkeyPatch, by: signal.Signals) -> None:
    """In the second epoch; the id of the process that gets the signal is in `struck` in the run's folder.

    By itself: until another process has found it the run may be over.
    """

    def once(run_dir: Path) -> Callable[[], bool]:
        steps = itertools.count(1)

        def is_due() -> bool:
            due = next(steps) == 15 and not (run_dir / "struck").exists()
            if due:
                (run_dir / "struck").write_text(str(os.getpid()))
            return due

        return is_due

    strike_second_worker(monkeypatch, by, once)


def test_a_worker_killed_in_mid_epoch_changes_nothing(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strike_once_in_mid_epoch(monkeypatch, signal.SIGKILL)
    run_dir = tmp_path / "killed"
    before = worker_pids()
    first_lines: list[str] = []

    def await_death() -> Path:
        wait_until((run_dir / "struck").exists, "the death of a worker")
        first_lines.append((run_dir / "metrics.jsonl").read_text().split("\n")[0])
        return run_dir

    with recovery_shown("a worker killed in mid-epoch", await_death):
        run_training(make_job(run_dir))
    assert len(worker_pids() - before) == 4, "two workers should have been replaced by two new ones"
    assert logged_epochs(run_dir) == [1, 2, 3, 4, 5]
    # Not begun anew: the first epoch that the last checkpoint remembers is the one that ran before the kill.
    first = json.loads(first_lines[0])
    assert last_checkpoint(run_dir).progress.history[0]["train_s"] == first["train_s"]
    assert_same_run(run_dir, undisturbed)
    assert_one_wandb_run(run_dir)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["checkpoint", "validation"])
def test_a_worker_killed_at_an_awkward_moment_changes_nothing(
    moment: str, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hook in the process ends it: the first worker in the middle of writing, the second while it scores."""
    train_loop = training.train_loop

    def doomed_train_loop(arguments: dict[str, Any]) -> None:
        from nuciseg.engine import checkpoint, loop

        run_dir: Path = arguments["job"].run_dir
        flush, score = checkpoint._flush_to_disk, loop.score_samples

        def die_once() -> None:
            if not (run_dir / "died").exists():
                (run_dir / "died").touch()
                os.kill(os.getpid(), signal.SIGKILL)

        def doomed_flush(path: Path) -> None:
            if moment == "checkpoint" and "epoch-0002" in str(path):
                die_once()
            flush(path)

        def doomed_score(network: Any, samples: Any, indices: Any, place: Any) -> Any:
            if moment == "validation" and place.rank == 1 and CheckpointStore(run_dir).last is not None:
                die_once()
            return score(network, samples, indices, place)

        checkpoint._flush_to_disk, loop.score_samples = doomed_flush, doomed_score
        train_loop(arguments)

    monkeypatch.setattr(training, "train_loop", doomed_train_loop)
    run_dir = tmp_path / "killed"

    def await_death() -> Path:
        wait_until((run_dir / "died").exists, "the death of a worker")
        return run_dir

    with recovery_shown(f"a worker killed in mid-{moment}", await_death):
        run_training(make_job(run_dir))
    assert logged_epochs(run_dir) == [1, 2, 3, 4, 5]
    assert_same_run(run_dir, undisturbed)
    assert_one_wandb_run(run_dir)


@pytest.mark.slow
def test_a_run_whose_workers_die_again_and_again_ends_with_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second worker dies in each first step, and the other one loses the connection to it."""
    strike_second_worker(monkeypatch, signal.SIGKILL, lambda run_dir: lambda: True)
    run_dir = tmp_path / "dying"
    with pytest.raises(TrainingError, match=r"the workers died more often than run\.max_failures \(0\) allows"):
        run_training(make_job(run_dir, **{"run.max_failures": 0}))
    assert isinstance(noted_failure(run_dir), TrainingError)


@pytest.mark.slow
def test_a_run_whose_workers_die_after_each_epoch_comes_to_its_end(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on spot machines: deaths count in a row, and each epoch makes good for those before it."""

    def an_epoch_more(run_dir: Path) -> Callable[[], bool]:
        metrics = run_dir / "metrics.jsonl"
        num_before = len(read_metrics(metrics))
        return lambda: len(read_metrics(metrics)) > num_before

    strike_second_worker(monkeypatch, signal.SIGKILL, an_epoch_more)
    run_dir = tmp_path / "dying"
    run_training(make_job(run_dir, **{"run.max_failures": 0}))
    assert logged_epochs(run_dir) == [1, 2, 3, 4, 5]
    assert_same_run(run_dir, undisturbed)
    assert_one_wandb_run(run_dir)


@pytest.mark.slow
def test_a_worker_that_hangs_is_replaced(undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TIMEOUT_VARIABLE, "5")  # Ray's own: 10 minutes
    strike_once_in_mid_epoch(monkeypatch, signal.SIGSTOP)
    run_dir = tmp_path / "hanging"

    def await_halt() -> Path:
        wait_until((run_dir / "struck").exists, "the halt of a worker")
        return run_dir

    try:
        with recovery_shown("a worker halted, noticed after 5 s", await_halt):
            run_training(make_job(run_dir))
    finally:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # as it should be
            os.kill(int((run_dir / "struck").read_text()), signal.SIGKILL)
    assert logged_epochs(run_dir) == [1, 2, 3, 4, 5]
    assert_same_run(run_dir, undisturbed)


def test_more_workers_than_there_is_room_for_are_refused_at_once(tmp_path: Path) -> None:
    start = time.monotonic()
    for refuse in (lambda job: check_room(job.config, verbose=False), run_training):
        with pytest.raises(ResourceError) as raised:
            refuse(make_job(tmp_path / "run", **{"scale.num_workers": 9}))
        message = str(raised.value)
        assert "scale.num_workers is 9" in message
        assert "CPUs: 4" in message
        assert "has room for 4 such workers" in message
    assert time.monotonic() - start < 20
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_gpus_that_no_node_has_are_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"scale\.use_gpu is true but"):
        check_room(make_job(tmp_path / "run", **{"scale.use_gpu": True}).config, verbose=False)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_the_run_without_endless_retries(tmp_path: Path) -> None:
    before = worker_pids()
    run_dir = tmp_path / "run"
    explosive = {"optim.kind": "sgd", "optim.lr": 100.0, "optim.weight_decay": 10.0, "train.clip_norm": None,
                 "schedule.warmup_share": 0.0, "model.norm": "none"}  # fmt: skip
    with pytest.raises(NonFiniteLossError, match=r"in step \d+ at learning rate \S+ \(loss .*; gradient norm "):
        run_training(make_job(run_dir, **explosive))
    assert isinstance(noted_failure(run_dir), NonFiniteLossError)
    assert len(worker_pids() - before) <= 4, "the run was begun again more than once"


@pytest.fixture
def cramped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers whose memory takes only batches that are cut into two parts or more.

    What torch raises where memory runs out is raised by a hook at the edge, in the workers' own processes: filling the
    memory of the machine that runs the tests would end other processes too.
    """
    train_loop = training.train_loop

    def cramped_train_loop(arguments: dict[str, Any]) -> None:
        from nuciseg.engine.loop import Trainer

        backward = Trainer._backward

        def limited(self: Trainer, batch: Any, global_size: int) -> Any:
            if self.config.train.accumulate < 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
            return backward(self, batch, global_size)

        Trainer._backward = limited  # type: ignore[method-assign]
        try:
            train_loop(arguments)
        finally:
            Trainer._backward = backward  # type: ignore[method-assign]

    monkeypatch.setattr(training, "train_loop", cramped_train_loop)


def used_config(run_dir: Path) -> Config:
    return last_checkpoint(run_dir).config


@pytest.mark.usefixtures("cramped")
@pytest.mark.parametrize("num_workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_memory_that_runs_out_is_met_once_with_half_the_parts(num_workers: int, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_training(make_job(run_dir, **{"scale.num_workers": num_workers, "train.epochs": 2}))
    assert used_config(run_dir).train.accumulate == 2
    assert logged_epochs(run_dir) == [1, 2]
    assert noted_failure(run_dir) is None


def test_memory_that_runs_out_again_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nuciseg.engine.loop import Trainer

    attempts: list[int] = []

    def too_small(self: Trainer, batch: Any, global_size: int) -> Any:
        attempts.append(self.config.train.accumulate)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Trainer, "_backward", too_small)
    with pytest.raises(OutOfMemoryError, match=r"raise train\.accumulate or lower data\.crop_px"):
        run_training(make_job(tmp_path / "run", **{"scale.num_workers": 1}))
    assert attempts == [1, 2]


def test_one_worker_runs_in_this_process(tmp_path: Path) -> None:
    """No second layer of actors: they cost about ten seconds a trial."""
    before = worker_pids()
    run_training(make_job(tmp_path / "run", **{"scale.num_workers": 1, "train.epochs": 1}))
    assert (tmp_path / "run" / FINISHED_FILE).exists()
    assert worker_pids() == before


def test_a_finished_run_that_is_resumed_is_left_alone(undisturbed: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*") if path.is_file()}
    run_training(make_job(undisturbed, **{"scale.num_workers": 1}))
    after = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*") if path.is_file()}
    assert after == before
