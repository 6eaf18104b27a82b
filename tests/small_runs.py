"""Runs of seconds on drawn nuclei, and what makes two runs the same."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from nuciseg.config import Config, load_config, merged
from nuciseg.engine.checkpoint import Checkpoint, CheckpointStore, Progress, load_checkpoint
from nuciseg.engine.datasets import TrainingSet, open_training_set
from nuciseg.engine.inference import Place
from nuciseg.engine.loop import EpochReport, train
from nuciseg.engine.network import stride_of

# Four epochs of four steps of a network of two thousand weights, on 16 drawn pairs of nuclei.
SMALL: dict[str, Any] = {
    "data": {
        "synthetic": {"num_train": 20, "num_test": 2, "mean_diameter_px": 16.0, "nuclei_per_cluster": [2, 2]},
        "crop_px": 64,
        "batch_size": 4,
        "num_loader_threads": 0,
    },
    "model": {"depth": 2, "width": 4, "norm": "group", "dropout": 0.2},
    "train": {"epochs": 4, "precision": "fp32", "metric": "border_dice"},
    "tracking": {"kind": "none"},
}
MEASURED_TIMES = ("train_s", "validation_s", "images_per_s", "data_wait_share")


QUICK_TO_LEARN: dict[str, Any] = merged(
    SMALL,
    {
        "data": {"synthetic": {"num_train": 60}, "batch_size": 2},
        "augment": {"enabled": False},
        "model": {"dropout": 0.0},
        "loss": {"weights": {"dice": 4.0}},
        "schedule": {"kind": "constant"},
        "train": {"ema_decay": None},
    },
)
"""At learning rate 0.05 the network finds borders within an epoch."""


def small_config(**changes: Any) -> Config:
    """`SMALL` with values put at dotted keys."""
    return load_config(overrides=SMALL).replaced(changes)


def last_checkpoint(run_dir: Path) -> Checkpoint:
    """The newest checkpoint, with what resuming needs."""
    last = CheckpointStore(run_dir).last
    assert last is not None, f"{run_dir} has no checkpoint"
    return load_checkpoint(last, training=True)


def truncate_last_checkpoint(run_dir: Path) -> Path:
    """As a disk does that loses what it had not written yet; returns the checkpoint."""
    last = CheckpointStore(run_dir).last
    assert last is not None, f"{run_dir} has no checkpoint"
    weights = last / "weights.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    return last


def figures(history: Iterable[Mapping[str, float]]) -> list[dict[str, float]]:
    """What a run was, without how fast the machine happened to be."""
    return [{key: value for key, value in row.items() if key not in MEASURED_TIMES} for row in history]


def assert_same_run(run_dir: Path, undisturbed_dir: Path) -> None:
    """Weights, optimizer, averages and history agree in every bit."""
    found, expected = last_checkpoint(run_dir), last_checkpoint(undisturbed_dir)
    assert figures(found.progress.history) == figures(expected.progress.history)
    assert (found.progress.step, found.progress.best_epoch) == (expected.progress.step, expected.progress.best_epoch)
    for mine, theirs in ((found.weights, expected.weights), (found.training, expected.training)):
        assert set(mine) == set(theirs)
        different = [name for name in mine if not torch.equal(mine[name], theirs[name])]
        assert not different


def logged_epochs(run_dir: Path) -> list[int]:
    """The epochs in `metrics.jsonl`, in the order written; none before there is such a file."""
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return []
    *lines, _torn = path.read_text(encoding="utf-8").split("\n")
    return [int(json.loads(line)["epoch"]) for line in lines]


def wait_until(true: Callable[[], bool], what: str, limit_s: float = 240.0) -> None:
    """Look again and again until `true()`; fail with `what` was waited for."""
    deadline = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < deadline, f"waited {limit_s:.0f} s for {what}"
        time.sleep(0.02)


def seconds_until_epoch(run_dir: Path, epoch: int, since_s: float) -> float:
    """Wait until an epoch is logged; the seconds that it took since `since_s`."""
    wait_until(lambda: epoch in logged_epochs(run_dir), f"epoch {epoch} of {run_dir.name}")
    return (run_dir / "metrics.jsonl").stat().st_mtime - since_s


def show_seconds(what: str, seconds: float) -> None:
    """For `pytest -rP`; docs/reliability.md has those of one machine."""
    print(f"seconds: {what}: {seconds:.1f}")


@contextmanager
def recovery_shown(what: str, fault: Callable[[], Path]) -> Iterator[None]:
    """While the block trains: `fault` makes or awaits a fault and gives the run's folder; the seconds from there to the
    next epoch are printed."""
    run_dirs: list[Path] = []

    def watch() -> None:
        run_dirs.append(fault())
        since_s = time.time()
        show_seconds(what, seconds_until_epoch(run_dirs[0], len(logged_epochs(run_dirs[0])) + 1, since_s))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    yield
    watcher.join()
    assert run_dirs, f"there was no fault: {what}"


def open_data(config: Config) -> TrainingSet:
    return open_training_set(config, stride_of(config))


def run(
    config: Config, run_dir: Path, place: Place | None = None, on_epoch: Callable[[EpochReport], None] | None = None
) -> Progress:
    return train(
        config, open_data(config), place or Place(), CheckpointStore(run_dir), on_epoch or (lambda report: None)
    )
