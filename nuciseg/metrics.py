"""Scores as additive counts: one `ImageScores` an image, their sum is `Scores`, ratios are taken once at the end.

Every field is an integer, also the sums of shares (IoU, AP of one image), which are held in units of 2^-53. Integer
addition knows no order, so any number of workers in any order gives the same scores to the last digit.

- AP at t = TP / (TP + FP + FN) with optimal one-to-one matching of nuclei at IoU >= t, the definition of the 2018 Data
  Science Bowl and of `stardist.matching` ("accuracy"). `pooled` sums the counts over images first; `per_image` is the
  mean of the images' own APs.
- Cluster score: the share of images with at least one true nucleus in which predicted and true nuclei match one to
  one, each pair with IoU >= 0.5.

Where there is nothing to count: an image with neither true nor predicted nuclei has AP 1 (it is right; as in the Data
Science Bowl's evaluation; stardist counts 0) and adds nothing to the pooled counts. A pooled ratio over nothing is 1
where nothing was expected and nothing was found (AP, border), and 0 for a mean over nothing (cluster score without
clusters, IoU without matches, AP per image without images).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

IOU_PERCENTS: Final = tuple(range(50, 100, 5))  # integers, so that IoU >= t is decided exactly
SHARE_UNIT: Final = 1 << 53
METRIC_NAMES: Final = (
    "cluster_score",
    "ap50_pooled",
    "ap50_per_image",
    "ap70_pooled",
    "ap70_per_image",
    "ap90_pooled",
    "ap90_per_image",
    "ap_mean_pooled",
    "ap_mean_per_image",
    "ap_mean_to_90_pooled",
    "ap_mean_to_90_per_image",
    "mean_matched_iou",
    "border_iou",
    "border_dice",
)
"""Keys of `Scores.flat_summary` that trials and checkpoints can be ranked by; for all of them higher is better."""

TIE_BREAK: Final = "ap_mean_per_image"
"""Many networks separate the same number of clusters; this says which outlines the nuclei better."""


def rank(scores: Mapping[str, float], metric: str) -> tuple[float, float]:
    """What networks are compared by: `metric` and, where it is equal, `TIE_BREAK`; higher is better."""
    return scores[metric], scores[TIE_BREAK]


@dataclass(frozen=True)
class ImageScores:
    """Counts of one image. `true_positives` follows `IOU_PERCENTS`; `iou_sum`, of pairs with IoU >= 0.5, in 2^-53."""

    id: str
    num_true: int
    num_predicted: int
    separated: bool
    true_positives: tuple[int, ...]
    iou_sum: int
    border_true_positives: int
    border_false_positives: int
    border_false_negatives: int

    @property
    def false_positives(self) -> tuple[int, ...]:
        return tuple(self.num_predicted - tp for tp in self.true_positives)

    @property
    def false_negatives(self) -> tuple[int, ...]:
        return tuple(self.num_true - tp for tp in self.true_positives)

    def average_precision(self, percent: int) -> float:
        """AP of this image at IoU >= `percent` / 100; 1 without any true or predicted nucleus."""
        return _average_precision(self.true_positives[IOU_PERCENTS.index(percent)], self.num_true, self.num_predicted)

    @property
    def mean_matched_iou(self) -> float:
        """Mean IoU of the pairs with IoU >= 0.5; 0 without a pair."""
        return _mean(self.iou_sum, self.true_positives[0])

    @property
    def border_dice(self) -> float:
        both = 2 * self.border_true_positives
        return _ratio(both, both + self.border_false_positives + self.border_false_negatives)


@dataclass(frozen=True)
class Scores:
    """Counts of any number of images; add them with `+`, start from `Scores()` or `Scores.total`."""

    images: int = 0
    clusters: int = 0
    clusters_separated: int = 0
    num_true: int = 0
    num_predicted: int = 0
    true_positives: tuple[int, ...] = field(default=(0,) * len(IOU_PERCENTS))
    image_ap_sums: tuple[int, ...] = field(default=(0,) * len(IOU_PERCENTS))  # in 2^-53
    iou_sum: int = 0  # in 2^-53
    border_true_positives: int = 0
    border_false_positives: int = 0
    border_false_negatives: int = 0

    def __add__(self, other: Scores) -> Scores:
        return Scores(
            images=self.images + other.images,
            clusters=self.clusters + other.clusters,
            clusters_separated=self.clusters_separated + other.clusters_separated,
            num_true=self.num_true + other.num_true,
            num_predicted=self.num_predicted + other.num_predicted,
            true_positives=_add(self.true_positives, other.true_positives),
            image_ap_sums=_add(self.image_ap_sums, other.image_ap_sums),
            iou_sum=self.iou_sum + other.iou_sum,
            border_true_positives=self.border_true_positives + other.border_true_positives,
            border_false_positives=self.border_false_positives + other.border_false_positives,
            border_false_negatives=self.border_false_negatives + other.border_false_negatives,
        )

    @staticmethod
    def of(image: ImageScores) -> Scores:
        """The scores of one image."""
        return Scores(
            images=1,
            clusters=int(image.num_true > 0),
            clusters_separated=int(image.separated),
            num_true=image.num_true,
            num_predicted=image.num_predicted,
            true_positives=image.true_positives,
            image_ap_sums=tuple(_to_units(image.average_precision(percent)) for percent in IOU_PERCENTS),
            iou_sum=image.iou_sum,
            border_true_positives=image.border_true_positives,
            border_false_positives=image.border_false_positives,
            border_false_negatives=image.border_false_negatives,
        )

    @staticmethod
    def total(image_scores: Iterable[ImageScores]) -> Scores:
        """The sum over images, the same for any order and any sharding."""
        return sum((Scores.of(image) for image in image_scores), Scores())

    def summary(self) -> dict[str, int | float | dict[str, float]]:
        """All figures; the APs by threshold ("0.50" ... "0.95"). Says in each name how it was averaged.

        `ap_mean_*` is the mean over the thresholds 0.50 to 0.95 in steps of 0.05; `ap_mean_to_90_*` that of 0.50 to
        0.90, as the StarDist papers have it.
        """
        border_errors = self.border_false_positives + self.border_false_negatives
        pooled = {p: _average_precision(tp, self.num_true, self.num_predicted) for p, tp in self._by_percent()}
        per_image = {p: _mean(s, self.images) for p, s in zip(IOU_PERCENTS, self.image_ap_sums, strict=True)}
        return {
            "images": self.images,
            "nuclei_true": self.num_true,
            "nuclei_found": self.num_predicted,
            "clusters": self.clusters,
            "clusters_separated": self.clusters_separated,
            "cluster_score": self.clusters_separated / self.clusters if self.clusters else 0.0,
            "ap_pooled": {f"{p / 100:.2f}": ap for p, ap in pooled.items()},
            "ap_per_image": {f"{p / 100:.2f}": ap for p, ap in per_image.items()},
            "ap_mean_pooled": sum(pooled.values()) / len(IOU_PERCENTS),
            "ap_mean_per_image": sum(per_image.values()) / len(IOU_PERCENTS),
            "ap_mean_to_90_pooled": _mean_to_90(pooled),
            "ap_mean_to_90_per_image": _mean_to_90(per_image),
            "mean_matched_iou": _mean(self.iou_sum, self.true_positives[0]),
            "border_iou": _ratio(self.border_true_positives, self.border_true_positives + border_errors),
            "border_dice": _ratio(2 * self.border_true_positives, 2 * self.border_true_positives + border_errors),
        }

    def flat_summary(self) -> dict[str, float]:
        """`summary` as one level of floats for logs: "ap_pooled" / "0.50" becomes "ap50_pooled"."""
        flat: dict[str, float] = {}
        for key, value in self.summary().items():
            if isinstance(value, dict):
                average = key.removeprefix("ap_")
                flat |= {f"ap{round(100 * float(t))}_{average}": ap for t, ap in value.items()}
            else:
                flat[key] = float(value)
        return flat

    def _by_percent(self) -> Iterable[tuple[int, int]]:
        return zip(IOU_PERCENTS, self.true_positives, strict=True)


def score_image(
    id: str,
    predicted_labels_HW: NDArray[np.int32],
    true_labels_HW: NDArray[np.int32],
    border_predicted_HW: NDArray[np.bool_],
    border_true_HW: NDArray[np.bool_],
    valid_HW: NDArray[np.bool_] | None = None,
) -> ImageScores:
    """Compare one image's predicted with its true labels (0 background, positive nuclei) and border masks.

    Pixels outside `valid_HW` (None: all valid) or with a negative true label are ignored: they count in no area, no
    IoU and no border. A predicted nucleus that lies in them by more than half its area is dropped.

    Raises ValueError if the arrays differ in shape.
    """
    shapes = {a.shape for a in (predicted_labels_HW, true_labels_HW, border_predicted_HW, border_true_HW)}
    if len(shapes) != 1 or (valid_HW is not None and valid_HW.shape not in shapes):
        raise ValueError(f"The labels and borders of image {id!r} must have one shape, not {sorted(shapes)}.")
    valid_HW = true_labels_HW >= 0 if valid_HW is None else valid_HW & (true_labels_HW >= 0)
    predicted_N, true_N = without_ignored(predicted_labels_HW, valid_HW)[valid_HW], true_labels_HW[valid_HW]
    iou_TP, at_least_TP = _ious(true_N, predicted_N)
    num_true, num_predicted = iou_TP.shape
    true_positives, iou_sum = _match(iou_TP, at_least_TP)
    border_predicted_N, border_true_N = border_predicted_HW[valid_HW], border_true_HW[valid_HW]
    return ImageScores(
        id=id,
        num_true=num_true,
        num_predicted=num_predicted,
        separated=num_true > 0 and num_true == num_predicted == true_positives[0],
        true_positives=true_positives,
        iou_sum=iou_sum,
        border_true_positives=int(np.count_nonzero(border_predicted_N & border_true_N)),
        border_false_positives=int(np.count_nonzero(border_predicted_N & ~border_true_N)),
        border_false_negatives=int(np.count_nonzero(~border_predicted_N & border_true_N)),
    )


def without_ignored(predicted_labels_HW: NDArray[np.int32], valid_HW: NDArray[np.bool_]) -> NDArray[np.int32]:
    """The predicted labels that count: none outside `valid_HW`, nor of a nucleus that lies there by more than half."""
    if valid_HW.all():
        return predicted_labels_HW
    inside_HW = np.where(valid_HW, predicted_labels_HW, 0)
    whole_ids, whole_px = np.unique(predicted_labels_HW[predicted_labels_HW > 0], return_counts=True)
    inside_ids, inside_px = np.unique(inside_HW[inside_HW > 0], return_counts=True)
    mostly_ignored = 2 * inside_px < whole_px[np.searchsorted(whole_ids, inside_ids)]
    return np.where(np.isin(inside_HW, inside_ids[mostly_ignored]), 0, inside_HW).astype(np.int32)


def _ious(
    true_N: NDArray[np.int32], predicted_N: NDArray[np.int32]
) -> tuple[NDArray[np.float64], list[NDArray[np.bool_]]]:
    """IoU of each true with each predicted nucleus, and for each of `IOU_PERCENTS` whether it is reached, exactly."""
    (num_true, true_index_N), (num_predicted, predicted_index_N) = _consecutive(true_N), _consecutive(predicted_N)
    pairs = true_index_N * num_predicted + predicted_index_N
    overlap_px = np.bincount(pairs, minlength=num_true * num_predicted).reshape(num_true, num_predicted)
    union_px = overlap_px.sum(1, keepdims=True) + overlap_px.sum(0, keepdims=True) - overlap_px
    overlap_px, union_px = overlap_px[1:, 1:], union_px[1:, 1:]
    return overlap_px / np.maximum(union_px, 1), [100 * overlap_px >= percent * union_px for percent in IOU_PERCENTS]


def _consecutive(ids_N: NDArray[np.int32]) -> tuple[int, NDArray[np.int64]]:
    """How many ids there are with the background, and ids 0, 1, 2, ... in the same order; negative ones are background.

    By counting: sorting the pixels, as `np.unique` does, would be most of the time of scoring.
    """
    ids_N = np.maximum(ids_N, 0)
    if ids_N.max(initial=0) > 4 * ids_N.size + (1 << 16):  # ids so far apart that counting them would fill the memory
        ids, index_N = np.unique(np.append(0, ids_N), return_inverse=True)
        return len(ids), index_N[1:].astype(np.int64)
    present = np.bincount(ids_N, minlength=1) > 0
    present[0] = True
    return int(np.count_nonzero(present)), (np.cumsum(present) - 1)[ids_N]


def _match(iou_TP: NDArray[np.float64], at_least_TP: list[NDArray[np.bool_]]) -> tuple[tuple[int, ...], int]:
    """True positives at each of `IOU_PERCENTS` and the summed IoU (in 2^-53) of the pairs at 0.5.

    At 0.5 a nucleus can have two partners of exactly that IoU: as in `stardist.matching` the assignment has the most
    pairs and, among those, the greatest summed IoU. Above 0.5 partners are unique, so the pairs need only be counted.
    """
    if not iou_TP.size:
        return (0,) * len(IOU_PERCENTS), 0
    gain_TP = at_least_TP[0] + iou_TP / (2 * min(iou_TP.shape))
    rows, columns = linear_sum_assignment(gain_TP, maximize=True)
    matched = at_least_TP[0][rows, columns]
    counts = (int(np.count_nonzero(matched)), *(int(np.count_nonzero(m)) for m in at_least_TP[1:]))
    return counts, sum(_to_units(iou) for iou in iou_TP[rows, columns][matched])


def _add(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(x + y for x, y in zip(a, b, strict=True))


def _to_units(share: float) -> int:
    return round(float(share) * SHARE_UNIT)


def _mean(units: int, count: int) -> float:
    return units / (SHARE_UNIT * count) if count else 0.0


def _mean_to_90(by_percent: Mapping[int, float]) -> float:
    aps = [ap for percent, ap in by_percent.items() if percent <= 90]
    return sum(aps) / len(aps)


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 1.0


def _average_precision(true_positives: int, num_true: int, num_predicted: int) -> float:
    return _ratio(true_positives, num_true + num_predicted - true_positives)
