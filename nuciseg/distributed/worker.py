"""What every worker of a run does: open the data, train, keep the run's folder in order, report each epoch."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nuciseg.config import Config, write_config
from nuciseg.data.splits import Split
from nuciseg.distributed.failures import batch_parts_factor, is_asked_to_stop, note_failure, noted_failure
from nuciseg.distributed.mirror import Mirror
from nuciseg.distributed.priority import come_to_foreground
from nuciseg.engine.calibration import calibrate
from nuciseg.engine.checkpoint import CheckpointStore, load_checkpoint, read_json, replace_config, write_json
from nuciseg.engine.datasets import TrainingSet, open_training_set
from nuciseg.engine.epoch_part import Wish
from nuciseg.engine.evaluation import image_row
from nuciseg.engine.inference import Place, predict_instances, score_samples
from nuciseg.engine.loop import EpochReport, train
from nuciseg.engine.network import Network, load_network, stride_of
from nuciseg.engine.precision import local_device
from nuciseg.errors import NucisegError, StoppedError, StorageAwayError
from nuciseg.metrics import ImageScores, Scores, rank
from nuciseg.patience import patiently
from nuciseg.plots import triptych
from nuciseg.startup import imports_are_done
from nuciseg.tracking import RunIdentity, Tracker, open_tracker

CONFIG_FILE = "config.yaml"
SPLIT_FILE = "split.json"
FINISHED_FILE = "finished.json"
IMAGES_FILE = "validation_images.json"
LOOK_S = 1.0
CONFER_S = 5.0  # as often as Ray looks whether a node is to go
OVERLAYS_EVERY_EPOCHS = 5  # and after each of the first: a scheduler may stop the run there


@dataclass(frozen=True)
class Job:
    """One run: what to train, where its folder is, how W&B names it. The same for every worker.

    With a `bucket`, the address of a folder there, `run_dir` is this process's copy of it.
    """

    config: Config
    run_dir: Path
    identity: RunIdentity
    verbose: bool = False
    bucket: str | None = None

    @property
    def mirror(self) -> Mirror:
        return Mirror(self.run_dir, self.bucket)


def run_worker(
    job: Job, place: Place, report: Callable[[EpochReport], None], must_one_go: Callable[[], bool] = lambda: False
) -> None:
    """Train to the end from whatever the run's folder holds; nothing is left to do for a finished run.

    Every worker calls `report` after every epoch, and now and then `must_one_go`: whether the machine of one has to go.
    Raises NucisegError, with the reason noted in the folder.
    """
    imports_are_done()
    come_to_foreground()
    failure = noted_failure(job.run_dir)
    if failure is not None:
        raise failure
    if patiently((job.run_dir / FINISHED_FILE).exists):
        return
    parts_factor = batch_parts_factor(job.run_dir)
    try:
        _run(job, _cut_smaller(job.config, parts_factor), place, report, must_one_go)
    except NucisegError as error:
        note_failure(job.run_dir, error, parts_factor)
        with contextlib.suppress(StorageAwayError):  # what is raised came first
            if not isinstance(error, StorageAwayError):
                job.mirror.push()
        raise


def describe_run_dir(config: Config, split: Split, run_dir: Path) -> None:
    """Write down what is trained on what: all that resuming needs. Raises ResourceError."""
    split.write(run_dir / SPLIT_FILE)  # first: a folder with a configuration but no split is a search
    write_config(config, run_dir / CONFIG_FILE)


def best_score(history: Sequence[Mapping[str, float]], metric: str) -> float:
    """The best validation score so far: what trials are ranked by, since the best checkpoint is what is kept."""
    return max(float(row[metric]) for row in history)


def _run(
    job: Job,
    config: Config,
    place: Place,
    report: Callable[[EpochReport], None],
    must_one_go: Callable[[], bool],
) -> None:
    data = open_training_set(config, stride_of(config))
    store = CheckpointStore(job.run_dir, on_saved=job.mirror.push)
    diary = _Diary(job, config, data, store) if place.rank == 0 else None

    def on_epoch(epoch: EpochReport) -> None:
        if diary is not None:
            diary.write(epoch)
            job.mirror.push()  # a scheduler that hears of the epoch may end this process
        report(epoch)

    exit_code = 1
    try:
        progress = train(config, data, place, store, on_epoch, _looking_around(job.run_dir), must_one_go)
        if progress.batches:
            raise StoppedError(
                f"asked to stop in epoch {progress.epoch + 1}, after a checkpoint; go on with --resume {job.mirror}"
            )
        if diary is not None:
            diary.conclude(place)
        exit_code = 0
    finally:
        if diary is not None:
            diary.tracker.finish(exit_code)
    if diary is not None:
        job.mirror.push()


def _looking_around(run_dir: Path) -> Callable[[], Wish]:
    """Looks into the folder, which may be a network's, and has the workers confer, now and then."""
    next_look_s = next_conference_s = 0.0

    def wish() -> Wish:
        nonlocal next_look_s, next_conference_s
        now_s = time.monotonic()
        if now_s < next_look_s:
            return Wish.GO_ON
        next_look_s = now_s + LOOK_S
        if is_asked_to_stop(run_dir):
            return Wish.STOP
        if now_s < next_conference_s:
            return Wish.GO_ON
        next_conference_s = now_s + CONFER_S
        return Wish.CONFER

    return wish


class _Diary:
    """What rank 0 writes into the run's folder and to W&B."""

    def __init__(self, job: Job, config: Config, data: TrainingSet, store: CheckpointStore) -> None:
        self.job, self.config, self.data, self.store = job, config, data, store
        job.run_dir.mkdir(parents=True, exist_ok=True)
        describe_run_dir(config, data.split, job.run_dir)
        self.tracker = _open_tracker(job, config, store)
        job.mirror.push()  # resumed from anywhere, it is the same W&B run

    def write(self, report: EpochReport) -> None:
        epoch = report.progress.epoch
        self.tracker.log_epoch(epoch, report.metrics)
        if report.is_best:
            self._write_images(report.image_scores)
        if (epoch <= OVERLAYS_EVERY_EPOCHS or epoch % OVERLAYS_EVERY_EPOCHS == 0) and epoch < self.config.train.epochs:
            _draw_panel(report.network, self.data, self.tracker, epoch)

    def conclude(self, place: Place) -> None:
        """Choose thresholds where that is wanted, draw what the best checkpoint answers, log what is left."""
        best, last = self.store.best, self.store.last
        assert best is not None  # training has at least one epoch
        assert last is not None
        if self.config.train.calibrate:
            best = self._calibrated(dict.fromkeys((best, last)), place)
        network, _ = load_network(best, place.device)
        _draw_panel(network, self.data, self.tracker, load_checkpoint(last).progress.epoch)
        _conclude(self.job.run_dir, best, self.tracker)

    def _calibrated(self, folders: Iterable[Path], place: Place) -> Path:
        """The best of these checkpoints, each decoded as suits it; it has its thresholds and scores from now on.

        Which epoch is the best was found with the thresholds as they are configured, and a later one may want others.
        """
        samples, validation = self.data.samples, self.data.split.validation
        metric = self.config.train.metric
        found = []
        for folder in folders:
            network, checkpoint = load_network(folder, place.device)
            target = calibrate(network, samples, validation, metric)
            network, _ = load_network(folder, place.device, target)
            images = score_samples(network, samples, validation)
            config = checkpoint.config.model_copy(update={"target": target})
            found.append((folder, config, images, Scores.total(images).flat_summary()))
        best, config, images, scores = max(found, key=lambda each: rank(each[-1], metric))
        replace_config(best, config, scores)
        self.store.call_best(best)
        self._write_images(images)
        return best

    def _write_images(self, images: Iterable[ImageScores]) -> None:
        shapes = dict(zip(self.data.samples.ids, self.data.samples.shapes, strict=True))
        rows = [image_row(scores, shapes[scores.id]) for scores in images]
        assert self.store.best is not None  # it was scored
        write_json({"checkpoint": self.store.best.name, "images": rows}, self.job.run_dir / IMAGES_FILE)


def conclude_stopped(job: Job) -> None:
    """Log to the end a run that a scheduler stopped: such a run is ended in the middle of its last report."""
    store = CheckpointStore(job.run_dir)
    if (
        store.best is None
        or store.last is None
        or (job.run_dir / FINISHED_FILE).exists()
        or noted_failure(job.run_dir) is not None
    ):
        return
    tracker = _open_tracker(job, job.config, store)
    if tracker.shows_pictures:
        checkpoint = load_checkpoint(store.last)
        data = open_training_set(checkpoint.config, stride_of(checkpoint.config))
        _draw_panel(load_network(store.best, local_device())[0], data, tracker, checkpoint.progress.epoch)
    _conclude(job.run_dir, store.best, tracker)
    tracker.finish(0)
    job.mirror.push()


def _draw_panel(network: Network, data: TrainingSet, tracker: Tracker, epoch: int) -> None:
    """A fixed panel: the same validation images each time."""
    if not tracker.shows_pictures:
        return
    panel = data.split.validation[: network.config.tracking.num_overlays]
    overlays = {}
    for found, instances in predict_instances(network, data.samples, panel):
        sample = data.samples[found.index]
        overlays[found.id] = triptych(sample.image_HWC, sample.labels_HW, instances.labels_HW, found.id)
    tracker.log_overlays(epoch, overlays)


def _open_tracker(job: Job, config: Config, store: CheckpointStore) -> Tracker:
    last = load_checkpoint(store.last) if store.last is not None else None
    return open_tracker(
        config.tracking,
        job.identity,
        job.run_dir,
        config.model_dump(mode="json"),
        history=last.progress.history if last is not None else (),
        verbose=job.verbose,
    )


def _conclude(run_dir: Path, best: Path, tracker: Tracker) -> None:
    scores = load_checkpoint(best).scores
    images = run_dir / IMAGES_FILE
    written = read_json(images) if patiently(images.exists) else {}
    if written.get("checkpoint") == best.name:  # not where the run was ended between this checkpoint and this file
        tracker.log_image_scores(written["images"])
    tracker.log_checkpoint(best)
    tracker.log_summary({f"best_{name}": value for name, value in scores.items()})
    write_json({"checkpoint": best.name, "scores": dict(scores)}, run_dir / FINISHED_FILE)


def _cut_smaller(config: Config, factor: int) -> Config:
    if factor == 1:
        return config
    parts = min(config.train.accumulate * factor, config.data.batch_size)
    return config.replaced({"train.accumulate": parts})
