"""After a search: the winner trained to the end, and evaluated once on the test images."""

from __future__ import annotations

from pathlib import Path

from nuciseg.config import Config, DataConfig
from nuciseg.data.fetching import local_folder
from nuciseg.data.formats import get_format
from nuciseg.data.formats.folders import own_folder
from nuciseg.distributed.mirror import Mirror
from nuciseg.distributed.progress import followed
from nuciseg.distributed.runs import train_identity
from nuciseg.distributed.training import run_training
from nuciseg.distributed.worker import Job
from nuciseg.engine.checkpoint import CheckpointStore, load_checkpoint
from nuciseg.engine.datasets import format_of, open_samples, refuse_smaller_than
from nuciseg.engine.evaluation import EvaluationResult, SplitName, default_out, evaluate_checkpoint
from nuciseg.engine.network import stride_of
from nuciseg.engine.precision import local_device


def check_test_images(config: Config) -> None:
    """Decode the test images, if there are any, into the cache; raises DataError before the search that needs them."""
    if has_test_images(config.data):
        refuse_smaller_than(stride_of(config), open_samples(config.data, "test"))


FINAL_FOLDER = "final"


def train_final(config: Config, search: Mirror, trial: Mirror, *, verbose: bool) -> Mirror:
    """Train `config` in the search's folder `final`, from where it was where it was interrupted; returns the folder.

    A winner whose trial was as long as `train.epochs` is there already: its checkpoints are taken over, and only what
    trials leave out, calibration, is done.
    """
    run = search.inner(FINAL_FOLDER)
    run_dir = run.folder
    run.fetch()
    if CheckpointStore(run_dir).last is None and num_epochs(trial.folder) >= config.train.epochs:
        trial.fetch()
        CheckpointStore(run_dir).take_over(CheckpointStore(trial.folder))
    identity = train_identity(config, run_dir, search.folder.name)
    with followed(run_dir, config.train.epochs, config.train.metric):
        run_training(Job(config, run_dir.resolve(), identity, verbose, run.uri))
    return run


def num_epochs(run_dir: Path) -> int:
    """For how many epochs the run has been trained."""
    last = CheckpointStore(run_dir).last
    return load_checkpoint(last).progress.epoch if last is not None else 0


def evaluate_final(run_dir: Path, config: Config) -> EvaluationResult:
    """Score the run's best checkpoint on the test images, or on validation where there are none."""
    best = CheckpointStore(run_dir).best
    assert best is not None  # it was just trained
    split: SplitName = "test" if has_test_images(config.data) else "validation"
    return evaluate_checkpoint(best, None, split, default_out(best, split), device=local_device())


def has_test_images(config: DataConfig) -> bool:
    """Whether there are labelled test images. Raises DataError."""
    if config.pool_test:
        return False
    if format_of(config) == "synthetic":
        return config.synthetic.num_test > 0
    root = None if config.root is None else local_folder(config.root, config.cache_dir)
    if root is None or own_folder(root, "test") is None:
        return False
    # The Data Science Bowl's own test images came without masks: there is nothing to score on them.
    return bool(get_format(format_of(config)).read(root, "test", []))
