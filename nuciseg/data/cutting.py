"""Clusters of touching nuclei cut out of labelled fields: a data set in the `nucleus` format of one's own images.

Shape legend: H rows, W columns, C channels, N nuclei.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from nuciseg.data.cutouts import areas_px, zeroed_outside
from nuciseg.data.formats.nucleus import labels_from_solution
from nuciseg.data.synthetic import MIN_HOLE_PX, outer_border, solution_border
from nuciseg.images import saturated_value
from nuciseg.labels import regrow, relabel
from nuciseg.types import Sample

Window = tuple[slice, slice]

CONTEXT_PX = 3  # of the field around a cluster: its edge is resized with what lies beside it
STRETCH_PERCENTILES = (0.1, 99.9)  # of a cluster's light; these become 1 and 254 of 8 bit
MIN_SIDE_PX = 32  # the largest stride of a network, and so the smallest image that every network takes
MIN_READ_BACK_IOU = 0.9  # of each nucleus with what a reader of the drawn solution makes of it


class LeftOut(StrEnum):
    """Why a cluster is not in the data set."""

    FEW = "fewer nuclei than asked for (single ones)"
    MANY = "more nuclei than asked for"
    EDGE = "cut by the image's edge"
    IGNORED = "beside pixels that are to be ignored"
    SMALL = "a nucleus smaller than asked for"
    LARGE = "a longer side than asked for"
    NARROW = "too narrow for the border: it would not read back as the same nuclei"


@dataclass(frozen=True)
class CutSettings:
    """Which clusters are cut out, and how they are drawn. Field: before it is resized; written: after."""

    min_nuclei: int = 2
    max_nuclei: int | None = None
    gap_px: float = 0.0  # field; nuclei with no more background between them are one cluster
    min_area_px: int = 0  # field; of the smallest nucleus of a cluster
    max_side_px: int | None = None  # written
    scale: float = 1.0
    keep_edge: bool = False  # also clusters that the field's edge cuts
    marking: Literal["drawn", "none"] = "drawn"


@dataclass(frozen=True)
class Cuts:
    """The clusters of one field: uint8 with C = 1, labels 1..N; and how many were left out, by reason."""

    clusters: list[Sample] = field(default_factory=list)
    left_out: Counter[LeftOut] = field(default_factory=Counter)


def cut_field(sample: Sample, settings: CutSettings) -> Cuts:
    """Cut the clusters out of a field: `image_HWC` uint8 or uint16 with C = 1, labels 0, 1..N, or negative: ignored."""
    labels_HW = np.maximum(sample.labels_HW, 0)
    clusters_HW = cluster_numbers(labels_HW, settings.gap_px)[labels_HW]
    areas_N = areas_px(labels_HW)
    cuts = Cuts()
    for number, (rows, columns) in enumerate(ndimage.find_objects(clusters_HW), start=1):
        around = _with_context((rows, columns), labels_HW.shape)
        own_HW = np.where(clusters_HW[around] == number, labels_HW[around], 0)
        is_at_edge = _touches_edge((rows, columns), labels_HW.shape)
        reason = _unfit(own_HW, sample.labels_HW[around] < 0, areas_N, is_at_edge, settings)
        if reason is None:
            num_nuclei = np.unique(own_HW).size - 1
            cluster = _cluster(sample.image_HWC[around], relabel(own_HW), settings)
            reason = _unfit_as_drawn(cluster, num_nuclei, settings)
            if reason is None:
                cuts.clusters.append(cluster)
                continue
        cuts.left_out[reason] += 1
    return cuts


def _unfit(
    labels_HW: NDArray[np.int32],
    ignored_HW: NDArray[np.bool_],
    areas_N: NDArray[np.int64],
    is_at_edge: bool,
    settings: CutSettings,
) -> LeftOut | None:
    """Why a cluster is not wanted, as it lies in its field; `labels_HW` without the nuclei of others."""
    ids = np.unique(labels_HW[labels_HW > 0])
    if ids.size < settings.min_nuclei:
        return LeftOut.FEW
    if settings.max_nuclei is not None and ids.size > settings.max_nuclei:
        return LeftOut.MANY
    if is_at_edge and not settings.keep_edge:
        return LeftOut.EDGE
    if ignored_HW.any() and np.any(cv2.dilate((labels_HW > 0).astype(np.uint8), np.ones((3, 3)))[ignored_HW]):
        return LeftOut.IGNORED
    if areas_N[ids - 1].min() < settings.min_area_px:
        return LeftOut.SMALL
    return None


def _unfit_as_drawn(cluster: Sample, num_nuclei: int, settings: CutSettings) -> LeftOut | None:
    if settings.max_side_px is not None and max(cluster.labels_HW.shape) > settings.max_side_px:
        return LeftOut.LARGE
    return None if reads_back(cluster, num_nuclei) else LeftOut.NARROW


def cluster_numbers(labels_HW: NDArray[np.int32], gap_px: float = 0.0) -> NDArray[np.int32]:
    """The cluster 1, 2, ... of each nucleus 1..N, by its label; 0 for the background.

    Nuclei are of one cluster where they touch, diagonally too, or where at most `gap_px` of background lie between
    them, directly or by way of others. The gap is measured from either side to the middle between the two.
    """
    num_nuclei = int(labels_HW.max(initial=0))
    nearest_HW, distance_HW = labels_HW, np.zeros(labels_HW.shape)
    if gap_px > 0 and num_nuclei:
        distance_HW, (rows_HW, columns_HW) = ndimage.distance_transform_edt(labels_HW == 0, return_indices=True)
        nearest_HW = labels_HW[rows_HW, columns_HW]
    pairs = [np.zeros((2, 0), np.int32)]
    for here, there in _neighbours():
        first, second = nearest_HW[here], nearest_HW[there]
        are_near = (first != second) & (first > 0) & (second > 0)
        are_near &= distance_HW[here] + distance_HW[there] <= gap_px
        pairs.append(np.stack([first[are_near], second[are_near]]))
    rows, columns = np.concatenate(pairs, axis=1) - 1
    graph = coo_array((np.ones(rows.size, np.bool_), (rows, columns)), shape=(num_nuclei, num_nuclei))
    numbers_N = connected_components(graph, directed=False)[1] + 1
    return np.concatenate([[0], numbers_N]).astype(np.int32)


def _neighbours() -> Iterator[tuple[Window, Window]]:
    """The views of an image whose pixels at the same place touch: beside, below, and on either diagonal."""
    everything, first, last = slice(None), slice(None, -1), slice(1, None)
    yield (everything, first), (everything, last)
    yield (first, everything), (last, everything)
    yield (first, first), (last, last)
    yield (first, last), (last, first)


def _touches_edge(window: Window, shape: tuple[int, ...]) -> bool:
    return any(part.start == 0 or part.stop == side for part, side in zip(window, shape, strict=True))


def _with_context(window: Window, shape: tuple[int, ...]) -> Window:
    rows, columns = (
        slice(max(part.start - CONTEXT_PX, 0), min(part.stop + CONTEXT_PX, side))
        for part, side in zip(window, shape, strict=True)
    )
    return rows, columns


# ------------------------------------------------------------------------------------------------------- drawing
def _cluster(image_HWC: NDArray[Any], labels_HW: NDArray[np.int32], settings: CutSettings) -> Sample:
    """One cluster as the `nucleus` format has it: cut out tightly, uint8, 0 outside, with or without its line."""
    light_HW = image_HWC[..., 0].astype(np.float32)
    if settings.scale != 1:
        light_HW, labels_HW = _resized(light_HW, labels_HW, settings.scale)
    light_HW, labels_HW = _tight(light_HW, labels_HW)
    labels_HW = regrow(labels_HW, _small_holes(labels_HW > 0))
    if image_HWC.dtype != np.uint8:
        light_HW = _stretched(light_HW, labels_HW > 0)
    image_HW = zeroed_outside(light_HW, labels_HW, np.dtype(np.uint8))
    if settings.marking == "drawn":
        image_HW[outer_border(labels_HW)] = saturated_value(image_HW)
    return Sample(image_HW[..., None], labels_HW)


def _resized(
    light_HW: NDArray[np.float32], labels_HW: NDArray[np.int32], scale: float
) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Both `scale` times as large. A pixel belongs to the nucleus that has most of it, which keeps outlines smooth."""
    height, width = (max(round(side * scale), 1) for side in labels_HW.shape)
    interpolation = cv2.INTER_LINEAR if scale > 1 else cv2.INTER_AREA

    def resize(values_HW: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.asarray(cv2.resize(values_HW, (width, height), interpolation=interpolation))

    resized_HW = np.zeros((height, width), np.int32)
    most_HW = resize((labels_HW == 0).astype(np.float32))
    for label in range(1, int(labels_HW.max()) + 1):
        share_HW = resize((labels_HW == label).astype(np.float32))
        resized_HW[share_HW > most_HW] = label
        most_HW = np.maximum(most_HW, share_HW)
    return resize(light_HW), resized_HW


def _tight(
    light_HW: NDArray[np.float32], labels_HW: NDArray[np.int32]
) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Both cut to the box around the nuclei, then padded on all sides where that is smaller than any network takes."""
    x, y, width, height = cv2.boundingRect((labels_HW > 0).astype(np.uint8))
    missing = [max(MIN_SIDE_PX - side, 0) for side in (height, width)]
    margins = [(side // 2, side - side // 2) for side in missing]
    window = slice(y, y + height), slice(x, x + width)
    return np.pad(light_HW[window], margins), np.pad(labels_HW[window], margins)


def _small_holes(inside_HW: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Enclosed background so small that the line around it would fill it: pixels that were missed in drawing."""
    outside_HW = np.pad(~inside_HW, 1, constant_values=True).astype(np.uint8)
    _, holes_HW, stats, _ = cv2.connectedComponentsWithStats(outside_HW, connectivity=8)
    is_small = stats[:, cv2.CC_STAT_AREA] < MIN_HOLE_PX
    is_small[[0, holes_HW[0, 0]]] = False  # the nuclei, and what lies around them
    return np.asarray(is_small[holes_HW[1:-1, 1:-1]])


def _stretched(light_HW: NDArray[np.float32], inside_HW: NDArray[np.bool_]) -> NDArray[np.float32]:
    """The light of more than 8 bit brought to 1 ... 254; whatever its range was, a network's input normalises it."""
    if not inside_HW.any():
        return light_HW
    low, high = np.percentile(light_HW[inside_HW], STRETCH_PERCENTILES)
    return np.asarray(1 + (light_HW - low) * (253 / max(high - low, 1)), np.float32)


def reads_back(cluster: Sample, num_nuclei: int) -> bool:
    """Whether the drawn solution, read as the `nucleus` format is, gives the same nuclei 1..`num_nuclei` again.

    Nuclei that are hardly wider than the line vanish beneath it, and a waist that is narrower makes two of one.
    """
    solution_HW = solution_border(cluster.labels_HW).astype(np.uint8) * 255
    read_HW = labels_from_solution(cluster.image_HWC[..., 0], solution_HW)
    if int(read_HW.max()) != num_nuclei:
        return False
    table = np.zeros((num_nuclei + 1, num_nuclei + 1), np.int64)
    np.add.at(table, (cluster.labels_HW, read_HW), 1)
    unions = table.sum(axis=1)[1:, None] + table.sum(axis=0)[None, 1:] - table[1:, 1:]
    best_N = (table[1:, 1:] / np.maximum(unions, 1)).max(axis=1)
    return bool(best_N.min() >= MIN_READ_BACK_IOU)


# ------------------------------------------------------------------------------------------------------ measuring
def median_diameter_px(samples: Iterable[Sample]) -> float | None:
    """Median over all nuclei that no edge cuts of the diameter of a disk of their area; None where there is none."""
    areas: list[NDArray[np.int64]] = []
    for sample in samples:
        labels_HW = np.maximum(sample.labels_HW, 0)
        at_edge = np.unique(np.concatenate([labels_HW[0], labels_HW[-1], labels_HW[:, 0], labels_HW[:, -1]]))
        areas_N = areas_px(labels_HW)
        areas_N[at_edge[at_edge > 0] - 1] = 0
        areas.append(areas_N[areas_N > 0])
    all_areas = np.concatenate(areas) if areas else np.zeros(0)
    return float(np.median(2 * np.sqrt(all_areas / np.pi))) if all_areas.size else None
