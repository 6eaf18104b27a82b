"""Score a checkpoint on one split, beside the trivial baselines, and write down every image.

    OUT/
    ├── scores.json         all figures, how they were averaged, and what they were obtained with
    ├── images.csv          one row an image, worst first
    ├── contact_sheet.png   input | truth | prediction of the worst images, failures marked
    ├── overlays/           the same for every image, larger: 0001_ID.png is the worst
    └── labels/             the predicted labels (int32 TIFF), for other programs to score

They are made in a folder of their own inside OUT and moved when all are whole, scores.json last.
"""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from nuciseg import __version__
from nuciseg.baselines import BASELINES
from nuciseg.config import DataConfig
from nuciseg.data.cache import CachedSamples
from nuciseg.data.fetching import local_folder
from nuciseg.data.formats import CLUSTER_FORMATS
from nuciseg.data.formats.folders import own_folder
from nuciseg.engine.checkpoint import Checkpoint, find_checkpoint
from nuciseg.engine.datasets import divide, format_of, open_samples, open_split_samples, refuse_smaller_than
from nuciseg.engine.dependence import scores_by_marking
from nuciseg.engine.inference import predict_probabilities, score_instances
from nuciseg.engine.network import Network, load_network
from nuciseg.engine.shipped import is_shipped
from nuciseg.errors import CheckpointError, DataError, ResourceError
from nuciseg.images import read_labels, require_writable, write_bytes, write_labels_tiff, write_png
from nuciseg.metrics import IOU_PERCENTS, ImageScores, Scores, score_image
from nuciseg.plots import contact_sheet, triptych
from nuciseg.targets import Target
from nuciseg.types import Record

SplitName = Literal["test", "train", "validation"]

SCORES_FILE, IMAGES_FILE, SHEET_FILE = "scores.json", "images.csv", "contact_sheet.png"
OVERLAYS_FOLDER, LABELS_FOLDER = "overlays", "labels"
SHEET_IMAGES, SHEET_COLUMNS, SHEET_CELL_PX = 100, 3, 200
OVERLAY_CELL_PX = (320, 1024)  # smallest and largest side of one of the three pictures
AVERAGING = {
    "clusters_separated": "clusters whose nuclei match the true ones one to one, each pair with IoU >= 0.5",
    "ap_pooled": "TP / (TP + FP + FN) over the nuclei of all images together, optimal matching at IoU >= the threshold",
    "ap_per_image": "the mean over images of the same ratio of each image",
    "ap_mean": "the mean over the thresholds 0.50 to 0.95 in steps of 0.05",
    "ap_mean_to_90": "the same without the threshold 0.95",
    "border": "pixels of all images together: border predicted against border of the target drawn from the true labels",
}


@dataclass(frozen=True)
class EvaluationResult:
    """What an evaluation found; `image_rows` are those of images.csv, worst first."""

    checkpoint: Path
    epoch: int
    split: str
    split_hash: str
    target: Target
    scores: Scores
    baselines: Mapping[str, Scores]
    by_marking: Mapping[str, Scores]  # with other drawn borders; empty where the images have none
    image_rows: tuple[Mapping[str, Any], ...]
    out: Path


@dataclass(frozen=True)
class _Scored:
    """One image's own scores and those of the baselines on it."""

    index: int
    own: ImageScores
    baselines: Mapping[str, ImageScores]
    num_open_borders: int | None

    @property
    def mean_ap(self) -> float:
        return sum(map(self.own.average_precision, IOU_PERCENTS)) / len(IOU_PERCENTS)

    @property
    def badness(self) -> tuple[float, float, str]:
        """Sorts the worst first; among equals by id, so that the order is always the same."""
        return self.own.average_precision(50), self.mean_ap, self.own.id


def evaluate_checkpoint(
    checkpoint: Path, data: DataConfig | None, split: SplitName, out: Path, *, device: torch.device
) -> EvaluationResult:
    """Score `checkpoint` (or a run's best one) on a split and write the files above into `out`.

    `data` None means the data that the checkpoint was trained on. "validation" and "train" are the two sides of the
    checkpoint's own split. Files of an earlier evaluation in `out` are replaced, others left alone. The files appear
    when all are whole, scores.json last.
    Raises CheckpointError, also where the data gives another split than the checkpoint's or where the test images are
    those it was trained on; DataError; ResourceError.
    """
    folder = find_checkpoint(checkpoint)
    network, loaded = load_network(folder, device)
    data = data or loaded.config.data
    samples, indices = _open(data, loaded, folder, split)
    refuse_smaller_than(network.stride, samples)
    with _unpublished(out) as temporary:
        scored = sorted(_score_all(network, samples, indices, temporary / LABELS_FOLDER), key=lambda each: each.badness)
        rows = tuple(_draw_all(scored, samples, temporary))
        result = EvaluationResult(
            checkpoint=folder,
            epoch=loaded.progress.epoch,
            split=split,
            split_hash=loaded.split_hash,
            target=network.target,
            scores=Scores.total(each.own for each in scored),
            baselines={name: Scores.total(each.baselines[name] for each in scored) for name in BASELINES},
            by_marking=scores_by_marking(network, samples, indices) if format_of(data) in CLUSTER_FORMATS else {},
            image_rows=rows,
            out=out,
        )
        _write_rows(rows, temporary / IMAGES_FILE)
        report = json.dumps(_report(result, loaded, data, samples), indent=1, allow_nan=False)
        write_bytes(temporary / SCORES_FILE, f"{report}\n".encode())
    return result


def default_out(checkpoint: Path, split: SplitName) -> Path:
    """`evaluation-SPLIT` in the folder of the run that the checkpoint folder belongs to.

    For weights that come with the package `evaluation-NAME-SPLIT` in the current folder.
    """
    if is_shipped(checkpoint):
        return Path(f"evaluation-{checkpoint.name}-{split}")
    return run_of(checkpoint) / f"evaluation-{split}"


def run_of(checkpoint: Path) -> Path:
    """The run's folder of a checkpoint folder; of one that was copied out of its run, the folder itself."""
    return checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint


def _open(
    data: DataConfig, loaded: Checkpoint, folder: Path, split: SplitName
) -> tuple[CachedSamples, tuple[int, ...]]:
    if split == "test":
        samples = open_samples(data, "test")
        if _was_trained_on(samples, data, loaded):
            raise CheckpointError(
                f"{folder} was trained on the very images in {data.root}, so their scores would be no test; give a "
                "folder that has a test/ part of other images or take --split validation"
            )
        return samples, tuple(range(len(samples)))
    samples, found = open_split_samples(data)
    if found.hash != loaded.split_hash:
        raise CheckpointError(
            f"{folder} was trained on split {loaded.split_hash}, the images in {data.root or 'data.synthetic'} give "
            f"{found.hash}: its {split} images are not known; give the data it was trained on or take --split test"
        )
    return samples, found.train if split == "train" else found.validation


def _was_trained_on(samples: CachedSamples, data: DataConfig, loaded: Checkpoint) -> bool:
    """Whether `samples`, the test images of `data`, are the training and validation images of `loaded`.

    Drawn images never are: what is drawn depends on the split.
    """
    trained = loaded.config.data.model_copy(update={"cache_dir": data.cache_dir})
    was_drawn = trained.root is None and trained.format in ("auto", "synthetic")
    if data.root is None or was_drawn:
        return False
    try:
        return open_samples(trained, "train").path.name == samples.path.name  # the name is a hash of the contents
    except DataError:  # they are not there any more, or weights came without; the hash of their names is left
        if own_folder(local_folder(data.root, data.cache_dir), "test") is not None or len(set(samples.groups)) < 2:
            return False
        records = [Record(id, None, (), group) for id, group in zip(samples.ids, samples.groups, strict=True)]
        try:
            return divide(records, trained).hash == loaded.split_hash
        except DataError:  # they cannot be divided as the training images were: they are others, or the list is gone
            return False


def _score_all(
    network: Network, samples: CachedSamples, indices: tuple[int, ...], labels_folder: Path
) -> Iterator[_Scored]:
    """Predict every image once, keep its labels in a file and score it."""
    target = network.target
    for found in predict_probabilities(network, samples, indices):
        sample = samples[found.index]
        instances = target.decode(found.maps_KHW)
        write_labels_tiff(_labels_file(labels_folder, found.id), instances.labels_HW)
        own = score_instances(target, found, instances, sample.labels_HW)
        baselines = _score_baselines(target, found.id, sample.image_HWC[..., 0], sample.labels_HW)
        yield _Scored(found.index, own, baselines, target.open_borders(found.maps_KHW))


def _score_baselines(
    target: Target, id: str, image_HW: NDArray[Any], labels_HW: NDArray[np.int32]
) -> dict[str, ImageScores]:
    border_true_HW = target.border_of(labels_HW)
    scores = {}
    for name, baseline in BASELINES.items():
        instances, border_HW = baseline(image_HW, target)
        scores[name] = score_image(id, instances.labels_HW, labels_HW, border_HW, border_true_HW)
    return scores


def _draw_all(scored: list[_Scored], samples: CachedSamples, folder: Path) -> Iterator[dict[str, Any]]:
    """Draw every image and the contact sheet; yields the images' rows."""
    panels = []
    for rank, each in enumerate(scored, start=1):
        sample = samples[each.index]
        predicted_HW = read_labels(_labels_file(folder / LABELS_FOLDER, each.own.id))
        failed = each.own.average_precision(50) < 1
        name = f"{rank:04d}_{each.own.id}.png"
        cell_px = int(np.clip(max(predicted_HW.shape), *OVERLAY_CELL_PX))
        pictures = sample.image_HWC, sample.labels_HW, predicted_HW, each.own.id
        write_png(folder / OVERLAYS_FOLDER / name, triptych(*pictures, failed=failed, cell_px=cell_px))
        if rank <= SHEET_IMAGES:
            panels.append(triptych(*pictures, failed=failed, cell_px=SHEET_CELL_PX))
        row = image_row(each.own, predicted_HW.shape)
        yield {**row, "open_borders": each.num_open_borders, "overlay": f"{OVERLAYS_FOLDER}/{name}"}
    scores = Scores.total(each.own for each in scored)
    shown = f", the worst {SHEET_IMAGES} of {len(scored)}" if len(scored) > SHEET_IMAGES else ""
    title = f"{scores.clusters_separated} of {scores.clusters} clusters separated{shown}"
    legend = "input | truth | prediction; red: a nucleus without partner of IoU >= 0.5"
    write_png(folder / SHEET_FILE, contact_sheet(panels, SHEET_COLUMNS, title, legend))


def image_row(own: ImageScores, shape: tuple[int, ...]) -> dict[str, Any]:
    """One image's figures, for a table; `shape` is its height and width in pixels."""
    average_precisions = {percent: own.average_precision(percent) for percent in IOU_PERCENTS}
    return {
        "id": own.id,
        "height": shape[0],
        "width": shape[1],
        "nuclei_true": own.num_true,
        "nuclei_found": own.num_predicted,
        "separated": own.separated,
        "ap50": average_precisions[50],
        "ap70": average_precisions[70],
        "ap90": average_precisions[90],
        "ap_mean": sum(average_precisions.values()) / len(IOU_PERCENTS),
        "mean_matched_iou": own.mean_matched_iou,
        "border_dice": own.border_dice,
    }


def _write_rows(rows: tuple[Mapping[str, Any], ...], path: Path) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_bytes(path, text.getvalue().encode())


def _report(result: EvaluationResult, loaded: Checkpoint, data: DataConfig, samples: CachedSamples) -> dict[str, Any]:
    return {
        "checkpoint": str(result.checkpoint),
        "epoch": result.epoch,
        "split": result.split,
        "split_hash": result.split_hash,
        "data": {
            "format": format_of(data),
            "root": str(data.root) if data.root else None,
            "content_hash": samples.path.name,
        },
        "seed": loaded.config.seed,
        "target": result.target.config.model_dump(mode="json"),
        "nuciseg": __version__,
        "averaging": AVERAGING,
        **result.scores.summary(),
        "baselines": {name: scores.summary() for name, scores in result.baselines.items()},
        "by_marking": {name: scores.summary() for name, scores in result.by_marking.items()},
    }


def _labels_file(folder: Path, id: str) -> Path:
    return folder / f"{id}.tif"


@contextmanager
def _unpublished(out: Path) -> Iterator[Path]:
    """A folder inside `out` (which may be a mount point, so it cannot be renamed itself) whose content goes to `out`
    where all went well; where not, `out` is as it was before."""
    existed = out.exists()
    require_writable(out)
    temporary = out / f".evaluation.{os.getpid()}"
    try:
        temporary.mkdir(exist_ok=True)
        yield temporary
        _publish(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if not existed and not any(out.iterdir()):
            out.rmdir()


def _publish(temporary: Path, out: Path) -> None:
    try:
        (out / SCORES_FILE).unlink(missing_ok=True)  # while it is there, what lies beside it belongs to it
        for folder in (OVERLAYS_FOLDER, LABELS_FOLDER):
            shutil.rmtree(out / folder, ignore_errors=True)
        for name in (OVERLAYS_FOLDER, LABELS_FOLDER, SHEET_FILE, IMAGES_FILE, SCORES_FILE):
            os.replace(temporary / name, out / name)
    except OSError as error:
        raise ResourceError(
            f"The evaluation cannot be written to {out} ({error.strerror}); choose another folder with --out."
        ) from error
