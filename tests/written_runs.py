"""Folders of runs and searches as training leaves them, by the writers that training has, without the training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from small_runs import small_config

from nuciseg.config import Config, write_config
from nuciseg.data.splits import Split, split_records
from nuciseg.distributed.failures import note_failure
from nuciseg.distributed.trials import RESULTS_FILE, SAMPLE_FILE, Trial
from nuciseg.distributed.worker import CONFIG_FILE, FINISHED_FILE, IMAGES_FILE, describe_run_dir
from nuciseg.engine.checkpoint import write_json
from nuciseg.engine.evaluation import image_row
from nuciseg.errors import TrainingError
from nuciseg.metrics import IOU_PERCENTS, SHARE_UNIT, ImageScores, Scores
from nuciseg.tracking import RunIdentity, TrackingConfig, open_tracker
from nuciseg.types import Record

NUM_IMAGES = 10


def split(seed: int = 0) -> Split:
    return split_records([Record(f"image{at}", None, (), f"image{at}") for at in range(2 * NUM_IMAGES)], 0.5, seed)


def images(ids: Sequence[str], num_separated: int) -> list[ImageScores]:
    """Pairs of nuclei, of which the first `num_separated` are found and the rest taken for one."""
    found = []
    for at, id in enumerate(ids):
        right = at < num_separated
        pairs = 2 if right else 0
        levels = tuple(pairs for _ in IOU_PERCENTS)
        found.append(ImageScores(id, 2, 2 if right else 1, right, levels, pairs * SHARE_UNIT, 5, 5, 5))
    return found


def epoch_rows(numbers_separated: Sequence[int]) -> list[dict[str, float]]:
    """An epoch for each number of images, of NUM_IMAGES, that it separates."""
    ids = split().validation_ids
    return [
        {"train_loss": 1 / epoch, "train_s": 2.0, "validation_s": 1.0}
        | Scores.total(images(ids, number)).flat_summary()
        for epoch, number in enumerate(numbers_separated, start=1)
    ]


def write_run(
    folder: Path,
    numbers_separated: Sequence[int],
    *,
    finished: bool = True,
    failure: str | None = None,
    split_seed: int = 0,
    config: Config | None = None,
) -> Path:
    """A run of `config` whose epochs separated so many of its ten validation images."""
    divided = split(split_seed)
    settings = {"train.epochs": max(len(numbers_separated), 1), "train.metric": "cluster_score"}
    config = config or small_config(**settings)
    describe_run_dir(config, divided, folder)
    identity = RunIdentity(folder.name, folder.name, folder.name, "train")
    tracker = open_tracker(TrackingConfig(kind="none"), identity, folder, {})
    rows = epoch_rows(numbers_separated)
    for epoch, row in enumerate(rows, start=1):
        tracker.log_epoch(epoch, row)
    if rows:
        best = max(range(len(rows)), key=lambda at: numbers_separated[at])
        table = [image_row(each, (40, 30)) for each in images(divided.validation_ids, numbers_separated[best])]
        write_json({"checkpoint": f"epoch-{best + 1:04d}", "images": table}, folder / IMAGES_FILE)
        if finished:
            write_json({"checkpoint": f"epoch-{best + 1:04d}", "scores": rows[best]}, folder / FINISHED_FILE)
    if failure is not None:
        note_failure(folder, TrainingError(failure))
    return folder


def search_config(space: Mapping[str, Any], epochs: int = 4) -> Config:
    settings = {"train.epochs": epochs, "train.metric": "cluster_score", "search.space": dict(space)}
    return small_config(**settings)


def write_search(
    folder: Path, config: Config, trials: Sequence[tuple[Mapping[str, Any], Sequence[int]]], *, ranked: bool = True
) -> Path:
    """A search whose trials drew these settings and separated so many images.

    `ranked`: these are all its trials, but for a grid that has more; False: it still goes on.
    """
    if ranked:
        config = config.replaced({"search.num_trials": max(len(trials), 1)})
    folder.mkdir(parents=True)
    write_config(config, folder / CONFIG_FILE)
    results = []
    for at, (sample, numbers) in enumerate(trials):
        id = f"trial{at:02d}"
        write_run(folder / id, numbers, config=config.replaced({"search.space": {}}))
        write_json(dict(sample), folder / id / SAMPLE_FILE)
        best = max(numbers) / NUM_IMAGES
        results.append(Trial(id, sample, best, best, len(numbers), 3.0 * len(numbers), None))
    if ranked:
        results.sort(key=lambda trial: trial.rank, reverse=True)
        write_json([asdict(trial) for trial in results], folder / RESULTS_FILE)
    return folder
